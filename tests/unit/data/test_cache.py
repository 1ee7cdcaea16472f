"""Reading caches: values are safetensors' own, and a damaged member is quarantined and replaced like a picture."""

import itertools
import json
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch

from ldm.data.cache import MEMBER, CachedReader, parse
from ldm.data.decode import BadSample
from ldm.data.encode import EncodeConfig, build_cache
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.mixture import MixtureConfig, Source, open_data
from ldm.data.shards import Index, Shards
from ldm.types import Batch
from tests.unit.data.standins import HASHES, moments, states

Make = Callable[..., Path]


@pytest.fixture
def cache(make_set: Make, tmp_path: Path) -> Path:
    """36 samples of two variants and two captions each in four shards."""
    config = EncodeConfig(path=str(make_set(36)), size=8, flip=True, variants=2, batch=5, part=9, dtype="bfloat16")
    build_cache(config, tmp_path / "cache", moments=moments, text=states, hashes=HASHES)
    return tmp_path / "cache"


def member(cache: Path, number: int) -> tuple[Path, int, int]:
    """The tar of a sample's cached member, its offset and size, by the index file."""
    for shard in Manifest.read(cache).shards:
        index = Index.read(cache / shard.index)
        if (key := f"s{number:05d}") in index.keys:
            found = index.members(index.keys.index(key))[MEMBER]
            return cache / shard.file, int(index.offsets[found]), int(index.sizes[found])
    raise AssertionError(number)


def spoil(cache: Path, number: int, change: Callable[[bytearray], None]) -> None:
    path, offset, size = member(cache, number)
    data = bytearray(path.read_bytes())
    part = data[offset : offset + size]
    change(part)
    assert len(part) == size
    data[offset : offset + size] = part
    path.write_bytes(data)


def zeros(part: bytearray) -> None:
    part[:] = bytes(len(part))


def long_header(part: bytearray) -> None:
    part[:8] = struct.pack("<Q", 1 << 60)


def swap(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    def change(part: bytearray) -> None:
        assert old in part
        part[:] = part.replace(old, new)

    return change


def not_numbers(part: bytearray) -> None:
    """Every variant of the moments, by safetensors' own offsets."""
    (length,) = struct.unpack_from("<Q", part)
    start, end = json.loads(part[8 : 8 + length])["moments"]["data_offsets"]
    part[8 + length + start : 8 + length + end] = b"\xff\x7f" * ((end - start) // 2)


DAMAGE = {
    2: zeros,
    7: long_header,
    11: swap(b'"moments"', b'"mements"'),
    13: swap(b'"BF16","shape":[2,8,4,4]', b'"BF16","shape":[2,8,4,5]'),
    17: swap(b'"BF16"', b'"PK16"'),
    23: not_numbers,
}


def take(loader: Loader, start: int, count: int) -> list[Batch]:
    return list(itertools.islice(loader.batches(start), count))


def test_values_are_what_safetensors_reads(cache: Path) -> None:
    reader = CachedReader(Shards(Manifest.read(cache), "train"), memory=0)
    shards = Shards(Manifest.read(cache), "train")
    ids, picks, variants = [35, 0, 4, 4], [1, 0, 0, 1], [0.0, 0.49, 0.5, 0.99]
    for sample in ids:
        reader.check(sample, 2)
    found, bad = reader.gather(ids, picks, variants)
    stored = [safetensors.torch.load(shards.read(i)[1][MEMBER]) for i in ids]
    assert not bad
    assert set(found) == set(stored[0])
    for name, values in found.items():
        which = [int(v * 2) for v in variants] if name in ("moments", "original_size", "crop_top_left") else picks
        assert torch.equal(values, torch.stack([s[name][k].float() for s, k in zip(stored, which, strict=True)]))


def test_a_far_cache_is_what_the_near_one_is(cache: Path) -> None:
    """By ranges, through fsspec; a damaged member there is replaced too."""
    spoil(cache, 9, zeros)
    system = fsspec.filesystem("memory")
    try:
        for path in cache.iterdir():
            system.pipe_file(f"/far/cache/{path.name}", path.read_bytes())
        near, far = (DataConfig(path=p, cached=True, flip=True) for p in (str(cache), "memory://far/cache"))
        pairs = zip(*(take(Loader(c, seed=1, micro_batch=12), 0, 4) for c in (near, far)), strict=True)
        for a, b in pairs:
            assert a["key"] == b["key"]
            assert "s00009" not in a["key"]
            assert all(torch.equal(a[n], b[n]) for n in ("moments", "text", "pooled", "crop_top_left"))
    finally:
        system.rm("/far", recursive=True)


def test_damaged_members_are_replaced_alike_and_listed(cache: Path, tmp_path: Path) -> None:
    listed = tmp_path / "quarantine.jsonl"
    config = DataConfig(path=str(cache), cached=True, flip=True, quarantine=str(listed), max_bad=0.5)
    whole = take(Loader(config, seed=3, micro_batch=12), 0, 6)
    assert not listed.exists()
    for number, change in DAMAGE.items():
        spoil(cache, number, change)
    spoiled = {f"s{n:05d}" for n in DAMAGE}
    loader = Loader(config, seed=3, micro_batch=12)
    batches = take(loader, 0, 6)
    replaced = 0
    for before, after in zip(whole, batches, strict=True):
        assert spoiled.isdisjoint(after["key"])
        assert after["moments"].isfinite().all()
        assert after["position"].tolist() == before["position"].tolist()
        for row, key in enumerate(before["key"]):
            if key in spoiled:
                replaced += 1
                continue
            assert after["key"][row] == key
            assert after["caption"][row] == before["caption"][row]
            for name in ("moments", "text", "pooled", "original_size", "crop_top_left"):
                assert torch.equal(after[name][row], before[name][row])
    assert replaced == 2 * len(spoiled)  # two epochs
    assert loader.figures()["bad_samples"] == len(spoiled)
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted(e["key"] for e in entries) == sorted(spoiled)
    assert {e["reason"] for e in entries} == {"damaged"}
    assert Counter(shard for shard, _ in loader.quarantine.counts.elements()) == Counter(e["shard"] for e in entries)
    for world, workers in ((2, 0), (3, 1)):
        micro = 12 // world
        ranks = [Loader(config, seed=3, micro_batch=micro, rank=r, world=world, workers=workers) for r in range(world)]
        for step in (4, 5):  # resumed where other samples were met first
            parts = [b for r in ranks for b in take(r, step, 1)]
            assert [k for p in parts for k in p["key"]] == batches[step]["key"]
            assert torch.equal(torch.cat([p["moments"] for p in parts]), batches[step]["moments"])


def test_one_spoiled_variant_is_replaced_where_it_is_drawn(cache: Path) -> None:
    """Otherwise the stream would depend on whether this rank met the spoiled variant before."""

    def second(part: bytearray) -> None:
        (length,) = struct.unpack_from("<Q", part)
        start, end = json.loads(part[8 : 8 + length])["moments"]["data_offsets"]
        part[8 + length + (start + end) // 2 : 8 + length + end] = b"\x80\x7f" * ((end - start) // 4)  # infinite

    spoil(cache, 5, second)
    config = DataConfig(path=str(cache), cached=True, flip=True)
    straight = [k for b in take(Loader(config, seed=0, micro_batch=12), 0, 45) for k in b["key"]]
    resumed = [k for step in range(45) for k in Loader(config, seed=0, micro_batch=12).batch(step, 0)["key"]]
    assert straight == resumed
    assert 0 < straight.count("s00005") < 15  # whole in some of the 15 epochs


def test_too_many_damaged_members_stop_the_run_and_say_why(cache: Path) -> None:
    for number in range(0, 36, 2):
        spoil(cache, number, zeros)
    config = DataConfig(path=str(cache), cached=True, max_bad=0.05)
    with pytest.raises(ValueError, match=r"samples are bad, more than max_bad=0.05: \d x damaged in train-p0000\d"):
        take(Loader(config, seed=0, micro_batch=12), 0, 3)


def test_a_mixture_of_caches_replaces_too(cache: Path) -> None:
    spoil(cache, 3, not_numbers)
    source = Source(data=DataConfig(path=str(cache), cached=True))
    stream = open_data(MixtureConfig(sources=(source, replace(source, share=2))), seed=0, micro_batch=9)
    keys = Counter(k for step in range(12) for k in stream.batch(step, 0)["key"])
    assert "s00003" not in keys
    assert len(keys) == 35


def test_what_cannot_be_a_header_is_refused() -> None:
    good = {"moments": {"dtype": "F16", "shape": [1, 2], "data_offsets": [0, 4]}}
    assert parse(json.dumps(good).encode(), 8 + len(json.dumps(good)) + 4).entries["moments"].shape == (1, 2)
    spoiled: list[object] = [
        [1],
        {},
        {"moments": 3},
        {"moments": {**good["moments"], "data_offsets": [-4, 0]}},
        {"moments": {**good["moments"], "data_offsets": [0, 4000], "shape": [1, 2000]}},
        {"moments": {**good["moments"], "shape": [1, 3]}},
        {"moments": {**good["moments"], "shape": [-1, -2]}},
        {"moments": {**good["moments"], "shape": []}},
        {"moments": {**good["moments"], "shape": "ab"}},
        {"moments": {**good["moments"], "dtype": ["F16"]}},
    ]
    for tree in spoiled:
        header = json.dumps(tree).encode()
        with pytest.raises(BadSample, match=r"damaged: cache\.safetensors"):
            parse(header, 8 + len(header) + 4)
    for header in (b"", b"\0" * 40, b"\xff{}", b"{" * 40):
        with pytest.raises(BadSample):
            parse(header, 100)


def test_shapes_that_differ_are_named(cache: Path) -> None:
    """What no damage explains, such as two caches copied into one folder, is the user's to mend."""
    path, offset, size = member(cache, 8)
    tar = bytearray(path.read_bytes())
    other = safetensors.torch.save({"moments": torch.zeros(2, 4, 4, 4), "text": torch.zeros(2, 3, 2)})
    assert len(other) <= size
    tar[offset : offset + size] = other + bytes(size - len(other))
    path.write_bytes(tar)
    config = DataConfig(path=str(cache), cached=True)
    with pytest.raises(ValueError, match=r"cached \w+ of sample 's\d+' is .*, of 's\d+' .*; they must agree"):
        take(Loader(config, seed=0, micro_batch=36), 0, 1)


def test_memory_of_a_cache_does_not_grow_over_epochs(cache: Path) -> None:
    """Resident memory as the log tells it; keeping the tensors of 200 epochs would be 14 MB."""
    loader = Loader(DataConfig(path=str(cache), cached=True), seed=0, micro_batch=36)
    stream = loader.batches()
    for _ in range(20):
        next(stream)
    before = loader.figures()
    for _ in range(200):
        next(stream)
    after = loader.figures()
    assert after["data_memory_gib"] == before["data_memory_gib"] <= 36 * 2048 * 2 / 2**30
    assert after["host_memory_gib"] - before["host_memory_gib"] < 5e6 / 2**30
