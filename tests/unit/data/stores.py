"""A small server of a folder in the dialects of S3 and of Google's storage, as their clients ask for objects."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_DATE = "2026-01-01T00:00:00.000Z"


class Store(ThreadingHTTPServer):
    """Serves `folder`/BUCKET/KEY. `faults` maps the number of a request for bytes to what goes wrong with it."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[int, str] = {}
        self.numbers = itertools.count()
        self.answers: Counter[str] = Counter()

    @property
    def address(self) -> str:
        """Its root."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(folder: Path) -> Iterator[Store]:
    """A running server."""
    store = Store(folder)
    threading.Thread(target=store.serve_forever, daemon=True).start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {k: v[0] for k, v in parse_qs(parts.query).items()}
        google = re.fullmatch(r"(/download)?/storage/v1/b/([^/]+)/o/?(.*)", path)
        if google:
            self._google(google[2], google[3], bool(google[1]) or query.get("alt") == "media", query)
        elif not self.headers.get("Authorization", "").startswith("AWS4-HMAC-SHA256 Credential=test/"):
            self._s3_error(403, "AccessDenied")
        else:
            bucket, _, key = path.strip("/").partition("/")
            self._s3(bucket, key, query)

    @property
    def _store(self) -> Store:
        assert isinstance(self.server, Store)
        return self.server

    def _s3(self, bucket: str, key: str, query: dict[str, str]) -> None:
        file = self._store.folder / bucket / key
        if key and file.is_file():
            self._bytes(file)
        elif key:
            self._s3_error(404, "NoSuchKey")
        else:
            found = self._list(bucket, query.get("prefix", ""))
            contents = "".join(
                f"<Contents><Key>{escape(n)}</Key><Size>{s}</Size><LastModified>{_DATE}</LastModified></Contents>"
                for n, s in found
            )
            body = f"<ListBucketResult><Name>{bucket}</Name><KeyCount>{len(found)}</KeyCount>{contents}"
            self._answer(200, "application/xml", f"{body}<IsTruncated>false</IsTruncated></ListBucketResult>".encode())

    def _s3_error(self, status: int, code: str) -> None:
        self._answer(status, "application/xml", f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

    def _google(self, bucket: str, name: str, media: bool, query: dict[str, str]) -> None:
        file = self._store.folder / bucket / name
        if not name:
            items = [self._told(bucket, n, s) for n, s in self._list(bucket, query.get("prefix", ""))]
            self._answer(200, "application/json", json.dumps({"items": items} if items else {}).encode())
        elif not file.is_file():
            body = json.dumps({"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}})
            self._answer(404, "application/json", body.encode())
        elif media:
            self._bytes(file)
        else:
            told = self._told(bucket, name, file.stat().st_size)
            self._answer(200, "application/json", json.dumps(told).encode())

    @staticmethod
    def _told(bucket: str, name: str, size: int) -> dict[str, str]:
        kind = "application/octet-stream"
        told = {"name": name, "bucket": bucket, "size": str(size), "contentType": kind, "storageClass": "STANDARD"}
        return {**told, "kind": "storage#object", "timeCreated": _DATE, "updated": _DATE, "generation": "1"}

    def _list(self, bucket: str, prefix: str) -> list[tuple[str, int]]:
        root = self._store.folder / bucket
        files = sorted(p for p in root.rglob("*") if p.is_file())
        names = [(str(p.relative_to(root)), p.stat().st_size) for p in files]
        return [(n, s) for n, s in names if n.startswith(prefix)]

    def _bytes(self, file: Path) -> None:
        fault = None
        if self.command == "GET":
            fault = self._store.faults.get(next(self._store.numbers))
        if fault == "503":
            self._s3_error(503, "SlowDown")
            return
        data = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = data[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None] if wanted else data
        extra = {"ETag": '"0"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        if wanted:
            extra["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}"
        self._answer(206 if wanted else 200, "application/octet-stream", part, extra, cut=fault == "cut")

    def _answer(
        self, status: int, kind: str, body: bytes, extra: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self._store.answers[f"{status} {'cut' if cut else 'whole'}"] += 1
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection |= cut
