"""The embedded set: whole, split as it says, readable by WebDataset itself."""

import json

import pytest
import webdataset as wds

from ldm.data.decode import metadata
from ldm.data.manifest import Manifest, resolve, sha256
from ldm.data.offsets import Index
from ldm.data.samples import Samples
from ldm.data.scan import scan
from ldm.data.shards import Shards

MANIFEST = Manifest.read(resolve("emoji"))
META = {s: [metadata(m) for _, m in Shards(MANIFEST, s)] for s in MANIFEST.splits}


def test_shards_are_as_the_manifest_says() -> None:
    assert MANIFEST.splits == ("compositional", "heldout", "train")
    assert MANIFEST.samples() == 3119
    for shard in MANIFEST.shards:
        path = MANIFEST.folder / shard.file
        assert path.stat().st_size == shard.bytes < 20_000_000
        assert sha256(path) == shard.sha256
        made, stored = scan(path), Index.read(MANIFEST.folder / shard.index)
        assert made.problems == []
        assert made.index.keys == stored.keys
        assert _places(made.index) == _places(stored)


def _places(index: Index) -> list[dict[str, tuple[int, int]]]:
    """Offset and size of each member, by sample."""
    rows = range(len(index))
    return [{e: (index.offsets.item(m), index.sizes.item(m)) for e, m in index.members(i).items()} for i in rows]


def test_webdataset_reads_the_shards() -> None:
    shards = Shards(MANIFEST, "heldout")
    urls = [str(MANIFEST.folder / s.file) for s in shards.shards]
    theirs = {s["__key__"]: s for s in wds.WebDataset(urls, shardshuffle=False)}
    assert len(theirs) == len(shards)
    for key, members in shards:
        assert theirs[key]["webp"] == members["webp"]
        assert json.loads(theirs[key]["json"]) == metadata(members)


def test_no_concept_is_in_both_train_and_heldout() -> None:
    train = {m["concept"] for m in META["train"]} | {m["concept"] for m in META["compositional"]}
    held = {m["concept"] for m in META["heldout"]}
    assert not train & held
    assert 0.03 < len(held) / len(held | train) < 0.07
    assert {m["group"] for m in META["heldout"]} == {m["group"] for m in META["train"]}
    assert "flags" not in {m["group"] for m in META["train"]}


def test_compositional_parts_all_occur_in_train() -> None:
    def parts(meta: dict[str, str]) -> set[tuple[str, str, str]]:
        return {
            ("concept-tone", meta["concept"], meta["tone"]),
            ("concept-gender", meta["concept"], meta["gender"]),
            ("tone-gender", meta["tone"], meta["gender"]),
        }

    train = set().union(*[parts(m) for m in META["train"]])
    whole = {(m["concept"], m["tone"], m["gender"]) for m in META["train"]}
    for meta in META["compositional"]:
        assert parts(meta) <= train
        assert (meta["concept"], meta["tone"], meta["gender"]) not in whole
    concepts = {m["concept"] for m in META["compositional"]}
    all_of = [m for s in ("train", "compositional") for m in META[s] if m["concept"] in concepts]
    assert 0.05 < len(META["compositional"]) / len(all_of) < 0.2


def test_captions() -> None:
    samples = Samples(MANIFEST, "train", size=64)
    texts = {samples.key(i): samples.captions(i) for i in range(len(samples))}
    assert texts["1f34e"].texts[:3] == ("red apple", "a red apple", "3d emoji of a red apple")
    assert texts["1f60e"].texts[0] == "smiling face with sunglasses"
    assert all(t.strip() == t and t for c in texts.values() for t in c.texts)
    assert all(len(c.texts) >= 2 for c in texts.values())
    assert max(len(t) for c in texts.values() for t in c.texts) < 200


@pytest.mark.parametrize("sequence", ["1f44b-T", "1f469-T-200d-1f692", "1f46d-T", "1f6b5-T"])
def test_tones_get_darker(sequence: str) -> None:
    samples = Samples(MANIFEST, "all", size=64)
    where = {samples.key(i): i for i in range(len(samples))}
    codes = ("1f3fb", "1f3fd", "1f3fe", "1f3ff")  # medium-light is blond on most people, so lighter than light
    light = [float(samples.pixels([where[sequence.replace("T", c)]]).mean()) for c in codes]
    assert light == sorted(light, reverse=True)
    medium_light = float(samples.pixels([where[sequence.replace("T", "1f3fc")]]).mean())
    assert medium_light > light[1]
