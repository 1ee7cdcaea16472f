"""A cache belongs to the samples it was made of: other samples, or other states of texts, are refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.data.buckets import BucketConfig
from ldm.data.build import BuildConfig, build
from ldm.data.encode import EncodeConfig, build_cache, encode, finish
from ldm.data.fingerprint import fingerprint
from ldm.data.indexing import index
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.shards import Shards
from tests.unit.data.pictures import color_of, png
from tests.unit.data.standins import HASHES, moments, states
from tests.unit.data.tarred import Member, pack
from tests.unit.data.test_offsets import first_form

SETTINGS = {**HASHES, "text_settings": "tt"}


def scored(folder: Path, numbers: range = range(12)) -> Path:
    """Two tars of pictures with scores."""
    for t in range(2):
        members: list[Member] = []
        for i in list(numbers)[6 * t : 6 * t + 6]:
            record = json.dumps({"caption": f"picture {i}", "score": i})
            members += [(f"{i:03d}.png", png(color_of(i), (40 + 24 * (i % 2), 40))), (f"{i:03d}.json", record.encode())]
        pack(folder / f"{t}.tar", members)
    index(folder)
    return folder


def cache(data: Path, out: Path, hashes: dict[str, str] = SETTINGS, **more: Any) -> Manifest:
    config = EncodeConfig(path=str(data), size=8, part=5, **more)
    return build_cache(config, out, moments=moments, text=states, hashes=hashes)


def never(images: Tensor) -> Tensor:
    raise AssertionError("encoded again")


def keys(data: Path) -> list[str]:
    return [k for k, _ in Shards(Manifest.read(data), "all")]


def turn(data: Path) -> None:
    """The tars' names change places: the same tars in another order."""
    (data / "0.tar").rename(data / "x.tar")
    (data / "1.tar").rename(data / "0.tar")
    (data / "x.tar").rename(data / "1.tar")
    (data / "manifest.json").unlink()
    index(data)


def repeat(data: Path) -> None:
    tree = json.loads((data / "manifest.json").read_text())
    tree["shards"][0]["repeats"] = 3
    (data / "manifest.json").write_text(json.dumps(tree))


CHANGES: dict[str, Callable[[Path], object]] = {
    "another filter": lambda data: index(data, where="score >= 6"),
    "none": lambda data: index(data),
    "another order": turn,
    "repeats": repeat,
    "buckets": lambda data: index(data, where="score < 6", buckets=BucketConfig(size=64, step=32, least=1)),
    "a tar more": lambda data: (pack(data / "2.tar", [("z.png", png((1, 1, 1))), ("z.txt", b"z")]), index(data)),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_other_samples_are_refused_before_anything_starts(tmp_path: Path, change: str) -> None:
    data, out = scored(tmp_path / "set"), tmp_path / "cache"
    index(data, where="score < 6")
    if change == "another order":
        index(data)
    cache(data, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    CHANGES[change](data)
    config = EncodeConfig(path=str(data), size=8, part=5)
    with pytest.raises(ValueError, match=r"begun with another source: split 'train' had \d+ samples, now \d+.*remove"):
        encode(config, out, moments=never, text=states, hashes=SETTINGS)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_the_same_samples_are_taken_wherever_they_lie(tmp_path: Path) -> None:
    """Names of folders, splits of the index and the size of parts change nothing."""
    data, out = scored(tmp_path / "set"), tmp_path / "cache"
    index(data, where="score < 6")
    first = cache(data, out)
    moved = data.rename(tmp_path / "elsewhere")
    index(moved, where="score <= 5.5")
    config = EncodeConfig(path=str(moved), size=8, part=2048)
    again = build_cache(config, out, moments=never, text=states, hashes=SETTINGS)
    assert again.shards == first.shards


def test_splits_and_captions_that_may_be_missing_are_told_apart(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(10):
        (root / f"{i}.png").write_bytes(png(color_of(i)))
        if i:
            (root / f"{i}.txt").write_text(f"{i}")
    build(root, tmp_path / "set", BuildConfig(require_captions=False, heldout=0.4))
    out = tmp_path / "cache"
    assert cache(tmp_path / "set", out, splits=("train", "heldout")).samples() == 9
    with pytest.raises(ValueError, match=r"another source: splits train, heldout then, train now"):
        cache(tmp_path / "set", out)
    with pytest.raises(ValueError, match=r"begun with require_captions=None, not False"):
        cache(tmp_path / "set", out, splits=("train", "heldout"), require_captions=False)
    whole = cache(tmp_path / "set", tmp_path / "all", splits=("train", "heldout"), require_captions=False)
    assert whole.samples() == 10
    config = DataConfig(path=str(tmp_path / "all"), cached=True, require_captions=False, split="all")
    assert "" in Loader(config, seed=0, micro_batch=10).batch(0, 0)["caption"]


def test_the_fingerprint_is_of_samples(tmp_path: Path) -> None:
    data = scored(tmp_path / "a")
    told = fingerprint(Manifest.read(data), "train")
    assert fingerprint(Manifest.read(scored(tmp_path / "b")), "train") == told
    tree = json.loads((data / "manifest.json").read_text())
    for shard in tree["shards"]:
        del shard["rows"]  # as version 0.1.0 wrote it
    (data / "manifest.json").write_text(json.dumps(tree))
    assert fingerprint(Manifest.read(data), "train") == told
    index(data, where="score != 3")
    assert fingerprint(Manifest.read(data), "train") != told


def aged(out: Path, source: Path, *, bad: bool = False) -> None:
    """A cache as version 0.1.0 left it: sorted hashes of tars, no settings of texts, its own form of indexes."""
    tree = json.loads((out / "cache.json").read_text())
    tree["source"] = sorted(s.sha256 for s in Manifest.read(source).shards)
    del tree["cached"]["text_settings"]
    (out / "cache.json").write_text(json.dumps(tree))
    for path in (*out.glob("*.done.json"), out / "manifest.json"):
        told = json.loads(path.read_text())
        for shard in told["shards"]:
            shard.pop("rows", None)
        if bad and path.name.endswith(".done.json"):
            told["bad"] = len(told["bad"])  # as before the quarantine of members
        if "cached" in told:
            told["cached"].pop("text_settings")
        path.write_text(json.dumps(told))
    for shard in Manifest.read(out).shards:
        found = Shards(Manifest.read(out), "all")
        row = [s.index for s in found.shards].index(shard.index)
        old = found.index(row)
        kinds = list(old.extensions)
        table = [[old.members(i).get(k, -1) for k in kinds] for i in range(len(old))]
        offsets = [[-1 if m < 0 else int(old.offsets[m]) for m in line] for line in table]
        sizes = [[-1 if m < 0 else int(old.sizes[m]) for m in line] for line in table]
        (out / shard.index).write_bytes(first_form(list(old.keys), kinds, offsets, sizes))


@pytest.mark.parametrize("counted", [False, True])
def test_an_older_cache_that_is_right_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str], counted: bool) -> None:
    """Its samples and states are proven to be the same, once; also where bad samples were only counted."""
    data, out = scored(tmp_path / "set"), tmp_path / "cache"
    broken = pack(
        data / "1.tar", [("006.png", b"broken"), ("006.txt", b"x"), ("007.png", png((1, 2, 3))), ("007.txt", b"y")]
    )
    assert broken.is_file()
    index(data)
    fresh = cache(data, out)
    assert fresh.notes["bad"] == 1
    aged(out, data, bad=counted)
    with pytest.raises(ValueError, match=r"by an older version, which did not record text_settings.*`ldm data encode`"):
        Loader(DataConfig(path=str(out), cached=True), seed=0, micro_batch=2, expect=SETTINGS)
    config = EncodeConfig(path=str(data), size=8)
    capfd.readouterr()
    again = build_cache(config, out, moments=never, text=states, hashes=SETTINGS)
    assert "made by an older version, and proven to be what is asked for" in capfd.readouterr().err
    assert [replace(s, rows=None) for s in fresh.shards] == list(again.shards)
    assert again.cached == fresh.cached
    listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [e["key"] for e in listed] == ["006"]
    Loader(DataConfig(path=str(out), cached=True), seed=0, micro_batch=2, expect=SETTINGS).batch(0, 0)
    build_cache(config, out, moments=never, text=states, hashes=SETTINGS)
    assert "older" not in capfd.readouterr().err


def test_an_older_cache_of_other_samples_is_refused(tmp_path: Path) -> None:
    data, out = scored(tmp_path / "set"), tmp_path / "cache"
    index(data, where="score < 6 or score > 8")
    cache(data, out)
    aged(out, data)
    index(data, where="score > 2")
    config = EncodeConfig(path=str(data), size=8)
    with pytest.raises(ValueError, match=r"an older version made it.*does not hold those.*encode into another folder"):
        encode(config, out, moments=never, text=states, hashes=SETTINGS)


def test_an_older_cache_of_other_tokens_is_refused(tmp_path: Path) -> None:
    """The same weights, but what follows the end of a text is another token."""
    data, out = scored(tmp_path / "set"), tmp_path / "cache"
    cache(data, out)
    aged(out, data)

    def padded(texts: list[str]) -> dict[str, Tensor]:
        found = states(texts)
        return {**found, "text": torch.cat([found["text"][:, :2], found["text"][:, 2:] * 0.5], 1)}

    config = EncodeConfig(path=str(data), size=8)
    with pytest.raises(ValueError, match="did not record text_settings, and captions encoded now give other states"):
        encode(config, out, moments=never, text=padded, hashes=SETTINGS)
    encode(config, out, moments=never, text=lambda t: {k: v * 1.001 for k, v in states(t).items()}, hashes=SETTINGS)


def test_a_cache_of_nothing_is_no_success(tmp_path: Path) -> None:
    pack(tmp_path / "set" / "0.tar", [("a.png", b"broken"), ("a.txt", b"a")])
    index(tmp_path / "set")
    with pytest.raises(ValueError, match=r"none of 1 samples could be encoded; the first: a: "):
        cache(tmp_path / "set", tmp_path / "cache")
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_settings_that_nobody_can_read_are_named(tmp_path: Path) -> None:
    data, out = scored(tmp_path / "set"), tmp_path / "cache"
    cache(data, out)
    for text in ("{", "[]", '{"cached": {}}'):
        (out / "cache.json").write_text(text)
        with pytest.raises(ValueError, match=r"cache\.json' .*encode into another folder"):
            finish(EncodeConfig(path=str(data), size=8), out)


def test_keys_that_come_again_are_cached_each(tmp_path: Path) -> None:
    """Two tars number their samples alike."""
    for t in range(2):
        members: list[Member] = []
        for i in range(4):
            members += [(f"{i}.png", png(color_of(10 * t + i))), (f"{i}.txt", f"{t} {i}".encode())]
        pack(tmp_path / "set" / f"{t}.tar", members)
    index(tmp_path / "set")
    cache(tmp_path / "set", tmp_path / "cache")
    batch = Loader(DataConfig(path=str(tmp_path / "cache"), cached=True), seed=0, micro_batch=8).batch(0, 0)
    assert sorted(batch["caption"]) == sorted(f"{t} {i}" for t in range(2) for i in range(4))
    index(tmp_path / "cache")
    assert len(keys(tmp_path / "cache")) == 8


def test_any_names_go_through_a_cache(tmp_path: Path) -> None:
    """Into its tar, its lists and back, byte for byte."""
    names = ["caf\u00e9", "line\nbreak", "tab\t'quote\"", "a b/[c] (d)", "n" * 200, "#%20"]
    members: list[Member] = []
    for i, name in enumerate(names):
        members += [(f"{name}.png", png(color_of(i))), (f"{name}.txt", f"{i}".encode())]
        members += [(f"bad {name}.png", b"broken"), (f"bad {name}.txt", b"x")]
    pack(tmp_path / "set" / "0.tar", members, encoding="latin-1")
    index(tmp_path / "set")
    made = cache(tmp_path / "set", tmp_path / "cache")
    assert made.samples() == len(names)
    wanted = [n.encode("latin-1").decode("utf-8", "surrogateescape") for n in names]
    assert keys(tmp_path / "cache") == wanted
    index(tmp_path / "cache")
    assert keys(tmp_path / "cache") == wanted
    lines = (tmp_path / "cache" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["key"] for line in lines] == [f"bad {n}" for n in wanted]
    batch = Loader(DataConfig(path=str(tmp_path / "cache"), cached=True), seed=0, micro_batch=6).batch(0, 0)
    assert sorted(batch["key"]) == sorted(wanted)
