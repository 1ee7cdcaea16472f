"""Tars that are cut, gone or changed after they were indexed: their samples are replaced, all others stay in place."""

import itertools
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch

from ldm.data.encode import EncodeConfig, build_cache, encode, finish
from ldm.data.inspection import inspect
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.mixture import MixtureConfig, Source, open_data
from ldm.data.remote import RemoteConfig
from ldm.data.shards import Shards
from ldm.data.write import ShardWriter
from tests.unit.data.standins import HASHES, moments, states
from tests.unit.data.tarred import pack
from tests.unit.data.test_cache import take

Make = Callable[..., Path]
CUT = 9000


def cut(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[:CUT])


def grow(tar: Path) -> None:
    """Another sample was packed behind the others."""
    tar.write_bytes(tar.read_bytes() + bytes(10240))


def other(tar: Path) -> None:
    """Packed again in another order; no place is what it was."""
    pack(tar, [("x.png", b"x" * 5000), ("y.png", b"y"), ("y.json", b"{}")])


def spoiled_index(tar: Path) -> None:
    tar.with_suffix(".index").write_bytes(b"\0" * 100)


def empty(tar: Path) -> None:
    tar.write_bytes(b"")


def page(tar: Path) -> None:
    tar.write_bytes(b"<html>")


def folder(tar: Path) -> None:
    tar.unlink()
    tar.mkdir()


DAMAGE = {  # what is done, which of the 12 samples of the second tar are lost, and the reason
    "cut": (cut, range(4, 12), "truncated"),
    "gone": (Path.unlink, range(12), "missing"),
    "a folder": (folder, range(12), "missing"),
    "grown": (grow, range(0), ""),
    "another": (other, range(12), "truncated"),
    "its index spoiled": (spoiled_index, range(0), ""),
    "empty": (empty, range(12), "damaged"),
    "a page": (page, range(12), "damaged"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_all_others_stay_in_their_places(
    make_set: Make, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, lost_rows, reason = DAMAGE[kind]
    data = make_set(36, shard_samples=12)
    listed = tmp_path / "quarantine.jsonl"
    config = DataConfig(path=str(data), size=8, max_bad=1.0, quarantine=str(listed), memory=0)
    whole = take(Loader(config, seed=3, micro_batch=12), 0, 6)
    lost = {f"s{12 + row:05d}" for row in lost_rows}
    damage(data / "train-00001.tar")
    capfd.readouterr()
    loader = Loader(config, seed=3, micro_batch=12)
    batches = take(loader, 0, 6)
    for before, after in zip(whole, batches, strict=True):
        assert before["position"].tolist() == after["position"].tolist()
        for row, key in enumerate(before["key"]):
            if key in lost:
                assert after["key"][row] not in lost
            else:
                assert after["key"][row] == key
                assert torch.equal(after["image"][row], before["image"][row])
                assert after["caption"][row] == before["caption"][row]
    assert loader.bad == len(lost)
    if lost:
        entries = [json.loads(line) for line in listed.read_text().splitlines()]
        assert {e["key"] for e in entries} == lost
        assert {(e["shard"], e["reason"]) for e in entries} == {("train-00001.tar", reason)}
    said = [line for line in capfd.readouterr().err.splitlines() if "train-00001" in line]
    assert len(said) == 1  # once, not for each sample
    for world in (2, 3):
        ranks = [Loader(config, seed=3, micro_batch=12 // world, rank=r, world=world) for r in range(world)]
        parts = [r.batch(5, 0) for r in ranks]
        assert [k for p in parts for k in p["key"]] == batches[5]["key"]


def test_too_much_damage_stops_the_run_and_names_the_tar(make_set: Make) -> None:
    data = make_set(36, shard_samples=12)
    cut(data / "train-00001.tar")
    loader = Loader(DataConfig(path=str(data), size=8), seed=0, micro_batch=36)
    with pytest.raises(ValueError, match=r"x truncated in train-00001\.tar; the last: .*copied in part or changed"):
        take(loader, 0, 2)
    for tar in data.glob("*.tar"):
        tar.unlink()
    loader = Loader(DataConfig(path=str(data), size=8, max_bad=1.0), seed=0, micro_batch=4)
    with pytest.raises(ValueError, match=r"1000 samples in a row are bad; the last is missing: .* does not exist"):
        take(loader, 0, 1)


def test_a_tar_that_is_cut_while_it_is_read(make_set: Make) -> None:
    """It is open already: the samples behind the end are replaced as they are met."""
    data = make_set(24, shard_samples=12)
    loader = Loader(DataConfig(path=str(data), size=8, max_bad=1.0, memory=0), seed=0, micro_batch=24)
    assert len(set(take(loader, 0, 1)[0]["key"])) == 24
    os.truncate(data / "train-00001.tar", CUT)
    assert len(set(take(loader, 1, 1)[0]["key"])) < 24
    assert {reason for _, reason in loader.quarantine.counts} == {"truncated"}


def test_a_disk_that_cannot_read_a_place(make_set: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_set(12, shard_samples=12)
    pread = os.pread
    index = Shards(Manifest.read(data), "train").index(0)
    spoiled = int(index.offsets[index.members(4)["png"]])

    def fails(descriptor: int, size: int, offset: int) -> bytes:
        if offset == spoiled:
            raise OSError(5, os.strerror(5))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", fails)
    loader = Loader(DataConfig(path=str(data), size=8), seed=0, micro_batch=12)
    assert "s00004" not in take(loader, 0, 1)[0]["key"]
    assert dict(loader.quarantine.counts) == {("train-00000.tar", "unreadable"): 1}

    def memory(*_: object) -> bytes:
        raise OSError(12, os.strerror(12))

    monkeypatch.setattr(os, "pread", memory)
    with pytest.raises(OSError, match="Cannot allocate"):
        Loader(DataConfig(path=str(data), size=8), seed=0, micro_batch=12).batch(0, 0)


def test_one_bad_tar_ends_neither_encoding_nor_a_look(make_set: Make, tmp_path: Path) -> None:
    data = make_set(36, shard_samples=12)
    cut(data / "train-00001.tar")
    (data / "train-00002.tar").unlink()
    config = EncodeConfig(path=str(data), size=8, part=10)
    manifest = build_cache(config, tmp_path / "cache", moments=moments, text=states, hashes=HASHES)
    assert manifest.samples() == 16
    listed = [json.loads(line) for line in (tmp_path / "cache" / "quarantine.jsonl").read_text().splitlines()]
    assert [e["reason"] for e in listed] == ["truncated"] * 8 + ["missing"] * 12
    assert [e["key"] for e in listed] == [f"s{i:05d}" for i in range(16, 36)]
    summary = inspect(Manifest.read(data), tmp_path / "look")
    assert summary["bad"] == {"truncated": 8, "missing": 12}


def test_a_mixture_goes_on_too(make_set: Make) -> None:
    one, two = make_set(24, shard_samples=12, name="one"), make_set(24, shard_samples=12, name="two")
    (two / "train-00000.tar").unlink()
    sources = tuple(Source(data=DataConfig(path=str(p), size=8, max_bad=1.0)) for p in (one, two))
    stream = open_data(MixtureConfig(sources=sources), seed=0, micro_batch=12)
    found = [(k, s) for b in itertools.islice(stream.batches(0), 4) for k, s in zip(b["key"], b["source"], strict=True)]
    assert {k for k, s in found if s == "two"} <= {f"s{i:05d}" for i in range(12, 24)}
    assert len({k for k, s in found if s == "one"}) == 24


def test_a_far_tar_that_is_gone_or_cut(make_set: Make) -> None:
    data = make_set(36, shard_samples=12)
    whole = take(Loader(DataConfig(path=str(data), size=8), seed=3, micro_batch=12), 0, 3)
    system = fsspec.filesystem("memory")
    try:
        for path in data.iterdir():
            system.pipe_file(f"/far/set/{path.name}", path.read_bytes())
        system.pipe_file("/far/set/train-00001.tar", (data / "train-00001.tar").read_bytes()[:CUT])
        system.rm("/far/set/train-00002.tar")
        remote = RemoteConfig(retries=0)
        config = DataConfig(path="memory://far/set", size=8, max_bad=1.0, remote=remote)
        batches = take(Loader(config, seed=3, micro_batch=12), 0, 3)
        there = {f"s{i:05d}" for i in range(16)}
        for before, after in zip(whole, batches, strict=True):
            for a, b in zip(before["key"], after["key"], strict=True):
                assert b == a if a in there else b in there
    finally:
        system.rm("/far", recursive=True)


def test_a_cut_cache_is_replaced_then_mended_by_the_same_encoding(
    make_set: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, out = make_set(36, shard_samples=12), tmp_path / "cache"
    config = EncodeConfig(path=str(data), size=8, part=12)
    first = build_cache(config, out, moments=moments, text=states, hashes=HASHES)
    tars = {p.name: p.read_bytes() for p in out.glob("*.tar")}
    cached = DataConfig(path=str(out), cached=True, max_bad=1.0)
    whole = take(Loader(cached, seed=3, micro_batch=12), 0, 3)
    os.truncate(out / "train-p00001-00000.tar", 20_000)
    (out / "train-p00002-00000.tar").unlink()
    (out / "train-p00000.done.json").write_text("{")
    capfd.readouterr()
    batches = take(Loader(cached, seed=3, micro_batch=12), 0, 3)
    lost = {f"s{i:05d}" for i in range(12, 36)}
    for before, after in zip(whole, batches, strict=True):
        kept = [row for row, key in enumerate(before["key"]) if key not in lost]
        assert [after["key"][r] for r in kept] == [before["key"][r] for r in kept]
        assert torch.equal(after["moments"][kept], before["moments"][kept])
    assert "the same `ldm data encode` again encodes its part anew" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"part train-p0000\d is missing; run the same encoding again"):
        finish(config, out)
    encode(config, out, moments=moments, text=states, hashes=HASHES)
    assert finish(config, out) == first
    assert {p.name: p.read_bytes() for p in out.glob("*.tar")} == tars


def test_a_full_disk_leaves_no_part_of_a_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is full in the midst or at the end."""

    for number, place in enumerate(("write", "end")):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            fill(folder, patch, "addfile" if place == "write" else "close")
        assert not [p for p in folder.iterdir() if not p.name.endswith(".index")]


def fill(folder: Path, patch: pytest.MonkeyPatch, what: str) -> None:
    with ShardWriter(folder, "train") as writer:
        writer.add("a", {"png": b"x" * 2000})
        patch.setattr(tarfile.TarFile, what, full)
        writer.add("b", {"png": b"y"})


def full(*_: object) -> None:
    raise OSError(28, os.strerror(28))
