"""Reading over real sockets: an HTTP server with ranges that also fails, stalls and cuts short."""

import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from ldm.data.manifest import Manifest
from ldm.data.remote import Remote, RemoteConfig, RemoteError, ShardCache
from ldm.data.shards import Shards
from tests.unit.data.remote import QUICK, batches, same

pytest.importorskip("aiohttp")
Make = Callable[..., Path]


class Server(ThreadingHTTPServer):
    """Serves a folder; `faults` maps a request's number to what goes wrong with it."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[int, str] = {}
        self.numbers = itertools.count()
        self.seen: Counter[str] = Counter()
        self.release = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        fault = server.faults.get(next(server.numbers)) if self.command == "GET" else None
        server.seen[self.path.rsplit("/", 1)[-1]] += 1
        path = server.folder / self.path.lstrip("/")
        if not path.is_file() or fault == "500":
            self.send_response(500 if fault else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = data[int(wanted[1]) : int(wanted[2]) + 1] if wanted else data
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "stall":
            server.release.wait(30)
        if fault == "cut":
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return
        self.wfile.write(part)


@pytest.fixture
def served(make_set: Make) -> Iterator[tuple[Server, Path]]:
    folder = make_set(30, shard_samples=12)
    server = Server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, folder
    server.release.set()
    server.shutdown()
    server.server_close()


def test_http_ranges_give_what_the_disk_gives(served: tuple[Server, Path]) -> None:
    server, folder = served
    assert same(batches(server.address, QUICK, workers=1), batches(str(folder), QUICK))
    assert sum(v for k, v in server.seen.items() if k.endswith(".tar")) <= 30 + 2  # one request a sample


def test_failures_stalls_and_cuts_are_survived(served: tuple[Server, Path]) -> None:
    server, folder = served
    kinds = itertools.cycle(["500", "cut", "500", "cut", "500"])
    server.faults = {n: next(kinds) for n in range(2, 30, 3)} | {7: "stall"}
    assert same(
        batches(server.address, RemoteConfig(retries=8, timeout=1.0, backoff=0.01)), batches(str(folder), QUICK)
    )


def test_a_lasting_failure_names_the_address_and_the_cause(served: tuple[Server, Path]) -> None:
    server, _ = served
    server.faults = dict.fromkeys(range(1000), "500")
    with pytest.raises(RemoteError, match=r"manifest.json: failed 3 times; the last: .*500"):
        Manifest.read(server.address, RemoteConfig(retries=2, backoff=0.0))
    server.faults = {}
    with pytest.raises(RemoteError, match=r"nowhere/manifest\.json: FileNotFoundError"):
        Manifest.read(server.address + "/nowhere", QUICK)
    with pytest.raises(ValueError, match="nowhere"):  # one line at the command line, as every user's mistake
        Manifest.read(server.address + "/nowhere", QUICK)
    start = time.monotonic()
    server.faults = dict.fromkeys(range(1000), "stall")
    with pytest.raises(RemoteError, match=r"nothing came for 0.2 s"):
        Manifest.read(server.address, RemoteConfig(retries=1, timeout=0.2, backoff=0.0))
    assert time.monotonic() - start < 10


def test_the_cache_keeps_shards_within_its_bound(served: tuple[Server, Path], tmp_path: Path) -> None:
    server, folder = served
    shards = Manifest.read(folder).shards
    bound = max(s.bytes for s in shards) * 2
    remote = RemoteConfig(cache=str(tmp_path / "cache"), cache_bytes=bound, retries=3, timeout=5.0, backoff=0.01)
    expected = batches(str(folder), QUICK)
    assert same(batches(server.address, remote), expected)
    cache = ShardCache(tmp_path / "cache", bound)
    assert 0 < cache.bytes <= bound
    whole = RemoteConfig(cache=str(tmp_path / "cache2"), retries=3, timeout=5.0, backoff=0.01)
    batches(server.address, whole)
    before = sum(v for k, v in server.seen.items() if k.endswith(".tar"))
    assert same(batches(server.address, whole), expected)
    assert sum(v for k, v in server.seen.items() if k.endswith(".tar")) == before  # all from the cache


def test_a_full_disk_falls_back_to_ranges(
    served: tuple[Server, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, folder = served

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Remote, "download", full)
    remote = RemoteConfig(cache=str(tmp_path / "cache"), retries=1, timeout=5.0)
    assert same(batches(server.address, remote), batches(str(folder), QUICK))
    assert ShardCache(tmp_path / "cache", 1).bytes == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(served: tuple[Server, Path], tmp_path: Path) -> None:
    """A file system of 16 KiB: the first shard does not fit, nothing is left behind, and training goes on."""
    server, folder = served
    cache = tmp_path / "small"
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(cache)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        remote = RemoteConfig(cache=str(cache), retries=1, timeout=5.0)
        assert min(s.bytes for s in Manifest.read(folder).shards) > 16 << 10
        assert same(batches(server.address, remote), batches(str(folder), QUICK))
        assert not [p for p in cache.iterdir() if p.suffix != ".lock"]
        (cache / "filler").write_bytes(b"x" * (12 << 10))
        assert same(batches(server.address, remote), batches(str(folder), QUICK))
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_any_file_system_that_fsspec_knows(make_set: Make) -> None:
    folder = make_set(30, shard_samples=12)
    system = fsspec.filesystem("memory")
    try:
        for path in folder.iterdir():
            system.pipe_file(f"memory://pictures/set/{path.name}", path.read_bytes())
        assert same(batches("memory://pictures/set", QUICK), batches(str(folder), QUICK))
        with pytest.raises(RemoteError, match=r"memory://pictures/none/manifest.json: FileNotFoundError"):
            Manifest.read("memory://pictures/none", QUICK)
    finally:
        system.rm("/pictures", recursive=True)


@pytest.mark.parametrize(
    ("scheme", "module", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "remote"), ("https", "aiohttp", "remote")]
)
def test_a_client_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, scheme: str, module: str, extra: str
) -> None:
    for name in [n for n in sys.modules if n == module or n.startswith("fsspec.implementations.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(vars(sys.modules["fsspec.registry"])["_registry"], scheme, raising=False)
    with pytest.raises(ValueError, match=rf"fsspec cannot open {scheme}://: .*pip install 'ldm\[{extra}\]'"):
        Manifest.read(f"{scheme}://pictures/set", QUICK)


def test_a_spoiled_download_is_refused(served: tuple[Server, Path], tmp_path: Path) -> None:
    server, folder = served
    tar = folder / "train-00000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(bytes(data))
    remote = RemoteConfig(cache=str(tmp_path / "cache"), retries=1, timeout=5.0, backoff=0.0)
    with pytest.raises(ValueError, match=r"x damaged in train-00000\.tar; .*SHA-256 is not the manifest's"):
        batches(server.address, remote)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_commands_run_only_when_allowed(make_set: Make, tmp_path: Path) -> None:
    folder = make_set(12, shard_samples=12)
    manifest = Manifest.read(folder)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"train-00000.tar"', f'"pipe:cat {folder}/train-00000.tar"'))
    piped = Manifest.read(folder)
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"commands run only with data.remote.pipe=true"):
        Shards(piped, "train", RemoteConfig(cache=cache)).read(0)
    with pytest.raises(ValueError, match="needs a cache folder"):
        RemoteConfig(pipe=True)
    allowed = Shards(piped, "train", RemoteConfig(cache=cache, pipe=True))
    assert allowed.read(3) == Shards(manifest, "train").read(3)
