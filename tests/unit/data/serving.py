"""A server of a folder whose requests fail in ways that a test chooses; a thread of its own runs it."""

from __future__ import annotations

import itertools
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar


class FolderServer(ThreadingHTTPServer):
    """`faults` maps the number of a request for bytes to what goes wrong with it; `answers` counts what came of all."""

    daemon_threads = True

    def __init__(self, folder: Path, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.folder = folder
        self.faults: dict[int, str] = {}
        self.numbers = itertools.count()
        self.answers: Counter[str] = Counter()
        self.release = threading.Event()

    @property
    def address(self) -> str:
        """Its root."""
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self) -> str | None:
        """What goes wrong with this request for bytes."""
        return self.faults.get(next(self.numbers))


Server = TypeVar("Server", bound=FolderServer)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """The server at work inside."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()


class RangeHandler(BaseHTTPRequestHandler):
    """Quiet; HEAD is GET without a body; ranges of bytes as clients ask for them."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError

    @property
    def owner(self) -> FolderServer:
        """The server."""
        assert isinstance(self.server, FolderServer)
        return self.server

    def ranged(self, data: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Status, the part that was asked for, and the headers that say so."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"Accept-Ranges": "bytes"}
        if not wanted:
            return 200, data, headers
        part = data[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
        headers["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}"
        return 206, part, headers

    def answer(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        """Send it; `cut` ends half way and closes."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection |= cut
