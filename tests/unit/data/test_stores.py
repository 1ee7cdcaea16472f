"""S3 and Google's storage through their own clients over real sockets; the extra `ci` installs the clients."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ldm.data.manifest import Manifest
from ldm.data.remote import RemoteConfig, RemoteError, ShardCache
from ldm.data.shards import Shards
from tests.unit.data.remote import QUICK, batches, same
from tests.unit.data.stores import Store, serving

Make = Callable[..., Path]


@pytest.fixture
def store(make_set: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, Path]]:
    """A set in the folder `set` of the bucket `pictures`, and the environment that points both clients there."""
    (tmp_path / "pictures").mkdir()
    folder = make_set(30, shard_samples=12, name="pictures/set")
    with serving(tmp_path) as server:
        for name, value in {
            "AWS_ENDPOINT_URL": server.address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "STORAGE_EMULATOR_HOST": server.address,
        }.items():
            monkeypatch.setenv(name, value)
        yield server, folder


@pytest.fixture(params=["s3", "gs"])
def address(request: pytest.FixtureRequest, store: tuple[Store, Path]) -> str:
    """The set's, with a client that knows nothing of earlier servers."""
    module, name = {"s3": ("s3fs", "S3FileSystem"), "gs": ("gcsfs", "GCSFileSystem")}[request.param]
    vars(pytest.importorskip(module))[name].clear_instance_cache()
    return f"{request.param}://pictures/set"


def test_stores_give_what_the_disk_gives(store: tuple[Store, Path], address: str) -> None:
    _, folder = store
    assert same(batches(address, QUICK, workers=2), batches(str(folder), QUICK))
    remote, local = Shards(Manifest.read(address, QUICK), "train", QUICK), Shards(Manifest.read(folder), "train")
    assert [remote.read(i) for i in range(30)] == [local.read(i) for i in range(30)]


def test_whole_shards_come_into_the_cache(store: tuple[Store, Path], address: str, tmp_path: Path) -> None:
    _, folder = store
    bound = 2 * max(s.bytes for s in Manifest.read(folder).shards)
    remote = RemoteConfig(cache=str(tmp_path / "cache"), cache_bytes=bound, retries=3, timeout=10.0, backoff=0.01)
    assert same(batches(address, remote), batches(str(folder), QUICK))
    assert 0 < ShardCache(tmp_path / "cache", bound).bytes <= bound


def test_busy_stores_and_cut_answers_are_survived(store: tuple[Store, Path], address: str) -> None:
    server, folder = store
    server.faults = {3: "503", 6: "cut", 9: "cut", 12: "503"}
    assert same(batches(address, QUICK), batches(str(folder), QUICK))
    assert server.answers["503 whole"] == 2
    assert sum(n for kind, n in server.answers.items() if kind.endswith("cut")) == 2


def test_what_is_not_there_is_named(store: tuple[Store, Path], address: str) -> None:
    with pytest.raises(RemoteError, match=r"pictures/other/manifest\.json: FileNotFoundError"):
        Manifest.read(address.replace("/set", "/other"), QUICK)


def test_credentials_that_are_refused_are_named(store: tuple[Store, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: to ask again would not help."""
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    start = time.monotonic()
    with pytest.raises(RemoteError, match=r"s3://pictures/set/manifest\.json: PermissionError"):
        Manifest.read("s3://pictures/set", QUICK)
    assert time.monotonic() - start < 60
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3_of_another_make(make_set: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto's, if it is installed."""
    s3fs = pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    folder = make_set(30, shard_samples=12)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        _, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        system = s3fs.S3FileSystem(skip_instance_cache=True)
        system.mkdir("pictures")
        system.put(str(folder), "pictures/set", recursive=True)
        assert same(batches("s3://pictures/set", QUICK), batches(str(folder), QUICK))
        with pytest.raises(RemoteError, match="FileNotFoundError"):
            Manifest.read("s3://pictures/other", QUICK)
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
