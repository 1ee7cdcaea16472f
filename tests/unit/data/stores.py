"""A small server of a folder in the dialects of S3 and of Google's storage, as their clients ask for objects."""

from __future__ import annotations

import json
import re
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.unit.data.serving import FolderServer, RangeHandler, running

_DATE = "2026-01-01T00:00:00.000Z"


class Store(FolderServer):
    """Serves `folder`/BUCKET/KEY."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, _Handler)


def serving(folder: Path) -> AbstractContextManager[Store]:
    """A running server."""
    return running(Store(folder))


class _Handler(RangeHandler):
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

    def _s3(self, bucket: str, key: str, query: dict[str, str]) -> None:
        file = self.owner.folder / bucket / key
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
        file = self.owner.folder / bucket / name
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
        root = self.owner.folder / bucket
        files = sorted(p for p in root.rglob("*") if p.is_file())
        names = [(str(p.relative_to(root)), p.stat().st_size) for p in files]
        return [(n, s) for n, s in names if n.startswith(prefix)]

    def _bytes(self, file: Path) -> None:
        fault = self.owner.fault() if self.command == "GET" else None
        if fault == "503":
            self._s3_error(503, "SlowDown")
            return
        status, part, extra = self.ranged(file.read_bytes())
        extra |= {"ETag": '"0"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        self._answer(status, "application/octet-stream", part, extra, cut=fault == "cut")

    def _answer(
        self, status: int, kind: str, body: bytes, extra: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.owner.answers[f"{status} {'cut' if cut else 'whole'}"] += 1
        self.answer(status, body, {"Content-Type": kind, **(extra or {})}, cut=cut)
