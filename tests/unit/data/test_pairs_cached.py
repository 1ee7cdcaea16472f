"""Pairs in caches against the same pairs made online: latents, compact pixels, variants, and what does not fit."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from ldm.config.load import decode
from ldm.data.cache import MEMBER
from ldm.data.encode import EncodeConfig, build_cache, encode, finish
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.shards import Shards
from ldm.types import Batch
from tests.unit.data.paired import hole, noise, write_set
from tests.unit.data.standins import HASHES, moments, states

PAIRS = {
    "condition": {"kind": "canny", "low": 50, "high": 100},
    "original": {"kind": "stored", "cache": "latents"},
    "reference": {"kind": "stored"},
    "inpaint_mask": {"kind": "stored_mask"},
    "masked": {"kind": "masked"},
    "small": {"kind": "small", "factor": 2, "cache": "latents"},
}


def data(path: Path, pairs: dict[str, Any] | None = None, **more: Any) -> DataConfig:
    return decode(
        DataConfig, {"path": str(path), "size": 8, "pairs": PAIRS if pairs is None else pairs, **more}, "data"
    )


def encoding(path: Path, pairs: dict[str, Any] | None = None, **more: Any) -> EncodeConfig:
    tree = {"path": str(path), "size": 8, "pairs": PAIRS if pairs is None else pairs, "dtype": "float32", "part": 4}
    return decode(EncodeConfig, tree | more, "encode")


def take(config: DataConfig, count: int) -> list[Batch]:
    return list(itertools.islice(Loader(config, seed=4, micro_batch=3).batches(), count))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    samples = [
        {"png": noise(i), "original.png": noise(50 + i), "reference.png": noise(90 + i), "mask.png": hole()}
        for i in range(9)
    ]
    return write_set(tmp_path / "set", samples)


def cache(config: EncodeConfig, out: Path) -> Manifest:
    return build_cache(config, out, moments=moments, text=states, hashes=HASHES)


def test_cached_pairs_are_those_made_online(folder: Path, tmp_path: Path) -> None:
    cache(encoding(folder), tmp_path / "cache")
    online = {b["key"][0]: b for b in take_one(data(folder))}
    for told in (data(tmp_path / "cache", cached=True), data(tmp_path / "cache", {}, cached=True)):
        for batch in take(told, 3):
            assert set(PAIRS) - batch.keys() == {"original", "masked", "small"}
            for row, key in enumerate(batch["key"]):
                for name in ("condition", "reference", "inpaint_mask"):
                    assert batch[name].dtype == torch.float32
                    assert torch.equal(batch[name][row], online[key][name][0]), name
                for name in ("original", "masked", "small"):
                    expected = moments(online[key][name] * 2 - 1)[0]
                    torch.testing.assert_close(batch[f"{name}.moments"][row], expected, rtol=0, atol=1e-6)


def take_one(config: DataConfig) -> list[Batch]:
    return list(itertools.islice(Loader(config, seed=4, micro_batch=1).batches(), 9))


def test_pixels_are_stored_as_one_byte_a_value_and_one_channel_where_all_are_equal(
    folder: Path, tmp_path: Path
) -> None:
    cache(encoding(folder), tmp_path / "cache")
    members = Shards(Manifest.read(tmp_path / "cache"), "train").read(0)[1]
    stored = {k: (tuple(v.shape), v.dtype) for k, v in load(members[MEMBER]).items() if k.startswith("pair.")}
    assert stored == {
        "pair.condition": ((1, 1, 8, 8), torch.uint8),
        "pair.reference": ((1, 3, 8, 8), torch.uint8),
        "pair.inpaint_mask": ((1, 1, 8, 8), torch.uint8),
        "pair.original.moments": ((1, 8, 4, 4), torch.float32),
        "pair.masked.moments": ((1, 8, 4, 4), torch.float32),
        "pair.small.moments": ((1, 8, 2, 2), torch.float32),
    }


def test_a_variants_partners_belong_to_its_crop_and_flip(tmp_path: Path) -> None:
    """The condition is the picture itself, so its pixels tell which variant the moments are of."""
    folder = write_set(tmp_path / "set", [{"png": noise(i), "condition.png": noise(i)} for i in range(6)])
    pairs = {"condition": {"kind": "stored"}}
    cache(encoding(folder, pairs, crop="random", flip=True, variants=4), tmp_path / "cache")
    told = data(tmp_path / "cache", pairs, cached=True, crop="random", flip=True)
    seen = set()
    for batch in take(told, 20):
        torch.testing.assert_close(batch["moments"], moments(batch["condition"] * 2 - 1), rtol=0, atol=1e-6)
        seen |= {v.numpy().tobytes() for v in batch["condition"]}
    assert len(seen) > 12


def test_random_masks_have_variants_of_their_own_for_any_number_of_processes(folder: Path, tmp_path: Path) -> None:
    pairs = {"inpaint_mask": {"kind": "random_mask"}, "masked": {"kind": "masked"}}
    config = encoding(folder, pairs, variants=4)
    one = cache(config, tmp_path / "one")
    for rank in (1, 0, 2):
        encode(config, tmp_path / "three", moments=moments, text=states, hashes=HASHES, rank=rank, world=3)
    assert finish(config, tmp_path / "three").shards == one.shards  # with the tars' hashes
    pictures = {k: load(m[MEMBER])["pair.inpaint_mask"] for k, m in Shards(one, "train")}
    assert len({row.numpy().tobytes() for mask in pictures.values() for row in mask}) > 15


def test_a_bad_partner_is_left_out_and_listed(tmp_path: Path) -> None:
    samples = [{"png": noise(i), "original.png": noise(i)} for i in range(5)]
    del samples[2]["original.png"]
    samples[4]["original.png"] = noise(0, 12, 20)
    pairs = {"original": {"kind": "stored", "cache": "latents"}}
    manifest = cache(encoding(write_set(tmp_path / "set", samples), pairs), tmp_path / "cache")
    assert manifest.samples() == 3
    bad = [json.loads(line) for line in (tmp_path / "cache" / "quarantine.jsonl").read_text().splitlines()]
    assert [(b["key"], b["reason"]) for b in bad] == [("s00002", "no_partner"), ("s00004", "partner_size")]


def test_other_pairs_than_the_caches_are_refused(folder: Path, tmp_path: Path) -> None:
    cache(encoding(folder), tmp_path / "cache")
    other = {**PAIRS, "condition": {"kind": "canny", "low": 10, "high": 100}}
    with pytest.raises(ValueError, match=r"the cache was made with pairs=.*'low': 50.0.*this run has .*'low': 10.0"):
        Loader(data(tmp_path / "cache", other, cached=True), seed=0, micro_batch=2)
    with pytest.raises(ValueError, match=r"was begun with pairs=.*encode into another folder"):
        cache(encoding(folder, other), tmp_path / "cache")
    plain = build_cache(encoding(folder, {}), tmp_path / "plain", moments=moments, text=states, hashes=HASHES)
    assert "pairs" not in (plain.cached or {})
    with pytest.raises(ValueError, match=r"made with pairs=None, this run has"):
        Loader(data(tmp_path / "plain", cached=True), seed=0, micro_batch=2)


def test_pairs_need_latents_beside_them(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are cached beside latents, which need an autoencoder"):
        encode(encoding(folder), tmp_path / "cache", moments=None, text=states, hashes=HASHES)


def test_a_cache_without_a_pairs_tensor_is_damaged(folder: Path, tmp_path: Path) -> None:
    """As after an edit of the manifest: named, never an absent tensor in a batch."""
    out = tmp_path / "cache"
    cache(encoding(folder, {}), out)
    tree = json.loads((out / "manifest.json").read_text())
    tree["cached"]["pairs"] = {"condition": {"kind": "canny"}}
    (out / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"damaged.*no pair.condition"):
        take(data(out, {}, cached=True), 1)
