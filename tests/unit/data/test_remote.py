"""Reading over real sockets: an HTTP server with ranges that also fails, stalls and cuts short."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from ldm.data.manifest import Manifest
from ldm.data.remote import Remote, RemoteConfig, RemoteError, ShardCache
from ldm.data.shards import Shards
from tests.unit.data.remote import QUICK, batches, same
from tests.unit.data.serving import FolderServer, RangeHandler, running

pytest.importorskip("aiohttp")
Make = Callable[..., Path]


class Handler(RangeHandler):
    def do_GET(self) -> None:
        fault = self.owner.fault() if self.command == "GET" else None
        self.owner.answers[self.path.rsplit("/", 1)[-1]] += 1
        path = self.owner.folder / self.path.lstrip("/")
        if not path.is_file() or fault == "500":
            self.answer(500 if fault else 404, b"", {})
            return
        status, part, headers = self.ranged(path.read_bytes())
        if fault == "stall":
            self.owner.release.wait(30)
        self.answer(status, part, headers, cut=fault == "cut")


@pytest.fixture
def served(make_set: Make) -> Iterator[tuple[FolderServer, Path]]:
    folder = make_set(30, shard_samples=12)
    with running(FolderServer(folder, Handler)) as server:
        yield server, folder


def test_http_ranges_give_what_the_disk_gives(served: tuple[FolderServer, Path]) -> None:
    server, folder = served
    assert same(batches(server.address, QUICK, workers=1), batches(str(folder), QUICK))
    assert sum(v for k, v in server.answers.items() if k.endswith(".tar")) <= 30 + 2  # one request a sample


def test_failures_stalls_and_cuts_are_survived(served: tuple[FolderServer, Path]) -> None:
    server, folder = served
    kinds = itertools.cycle(["500", "cut", "500", "cut", "500"])
    server.faults = {n: next(kinds) for n in range(2, 30, 3)} | {7: "stall"}
    assert same(
        batches(server.address, RemoteConfig(retries=8, timeout=1.0, backoff=0.01)), batches(str(folder), QUICK)
    )


def test_a_lasting_failure_names_the_address_and_the_cause(served: tuple[FolderServer, Path]) -> None:
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


def test_the_cache_keeps_shards_within_its_bound(served: tuple[FolderServer, Path], tmp_path: Path) -> None:
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
    before = sum(v for k, v in server.answers.items() if k.endswith(".tar"))
    assert same(batches(server.address, whole), expected)
    assert sum(v for k, v in server.answers.items() if k.endswith(".tar")) == before  # all from the cache


def test_a_full_disk_falls_back_to_ranges(
    served: tuple[FolderServer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, folder = served

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Remote, "download", full)
    remote = RemoteConfig(cache=str(tmp_path / "cache"), retries=1, timeout=5.0)
    assert same(batches(server.address, remote), batches(str(folder), QUICK))
    assert ShardCache(tmp_path / "cache", 1).bytes == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(served: tuple[FolderServer, Path], tmp_path: Path) -> None:
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


def test_a_spoiled_download_is_refused(served: tuple[FolderServer, Path], tmp_path: Path) -> None:
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
