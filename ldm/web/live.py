"""The page of a run that follows it: served to a browser, made anew when the run's files change."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ldm.web import run as pages
from ldm.web.gallery import Gallery

SECONDS = 2.0
"""Between two looks of a page."""
_SCRIPT = """
<script>
(() => {
  let seen = STATE;
  const look = async () => {
    try {
      const state = await (await fetch("state", {cache: "no-store"})).json();
      document.title = document.title.replace(/^\\u26a0 /, "");
      if (state === seen) return;
      const page = new DOMParser().parseFromString(await (await fetch("./", {cache: "no-store"})).text(), "text/html");
      const box = document.querySelector("dialog");
      if (box && box.open) return;
      document.querySelector(".page").replaceWith(page.querySelector(".page"));
      seen = state;
    } catch { if (!document.title.startsWith("\\u26a0")) document.title = "\\u26a0 " + document.title; }
  };
  setInterval(look, MILLISECONDS);
})();
</script>
"""


def state(folder: Path) -> str:
    """Another text whenever the run's page would be another."""
    places = [folder / "log" / "metrics.jsonl", folder / "log" / "events.jsonl", folder / "done.json",
              folder / "config.yaml", *sorted((folder / "samples").glob("step-*.png"))]  # fmt: skip
    told = [(p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in places if p.is_file()]
    return f"{len(told)}-{hash(tuple(told)) & (2**64 - 1):x}"


def page(folder: Path, samples: int) -> str:
    """The page as it is now, with the script that follows; also before the run's first step."""
    try:
        gallery = pages.page(pages.read(folder), samples)
    except ValueError:
        gallery = Gallery(folder.resolve().name, "Its first step is not made yet; this page follows.", "ldm show run")
    html = gallery.html().replace("default-src 'none';", "default-src 'none'; connect-src 'self';", 1)
    script = _SCRIPT.replace("STATE", json.dumps(state(folder))).replace("MILLISECONDS", f"{1000 * SECONDS:g}")
    return html.replace("</body>", f"{script}</body>", 1)


class _Page(BaseHTTPRequestHandler):
    """`/` is the page, `/state` what it depends on."""

    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/state":
            self._send(json.dumps(state(self.server.folder)), "application/json")
        elif path == "/":
            self._send(self.server.html(), "text/html; charset=utf-8")
        else:
            self.send_error(404)

    def _send(self, text: str, kind: str) -> None:
        data = text.encode()
        self.send_response(200)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(data))), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed of each request."""


class Server(ThreadingHTTPServer):
    """Serves one run's page. Raises OSError where the port is taken."""

    daemon_threads = True

    def __init__(self, folder: Path, samples: int, host: str, port: int) -> None:
        self.folder, self.samples = folder, samples
        self._lock, self._made = threading.Lock(), ("", "")
        super().__init__((host, port), _Page)

    def html(self) -> str:
        """The page, made once for the same files."""
        with self._lock:
            now = state(self.folder)
            if self._made[0] != now:
                self._made = (now, page(self.folder, self.samples))
            return self._made[1]


def serve(folder: Path, samples: int, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Until interrupted. Raises ValueError for a folder that is not there, or a port that is taken."""
    if not folder.is_dir():
        raise ValueError(f"run {str(folder)!r}: no such folder")
    try:
        server = Server(folder, samples, host, port)
    except OSError as error:
        raise ValueError(f"--port: {port} cannot be used ({error.strerror})") from error
    with server:
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        ready(f"http://{shown}:{server.server_address[1]}/")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            return
