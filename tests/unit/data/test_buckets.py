"""Aspect-ratio buckets: every batch has one shape, no picture is lost, SDXL's conditioning is right."""

import io
import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.cli.data import _print_buckets, main
from ldm.data.buckets import BucketConfig, assign, nearest
from ldm.data.build import BuildConfig, build
from ldm.data.encode import EncodeConfig, encode, finish
from ldm.data.indexing import index
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.write import ShardWriter
from ldm.recipes.sources import load_autoencoder
from tests import miniature


def test_sdxl_shapes() -> None:
    shapes = BucketConfig(size=1024, ratio=4.0).shapes()
    assert {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (1344, 768), (1536, 640), (640, 1536)} <= set(shapes)
    assert all(w % 64 == h % 64 == 0 and w * h <= 1024 * 1024 for w, h in shapes)
    assert {(h, w) for w, h in shapes} == set(shapes)
    assert nearest((1600, 1200), shapes) == (1152, 896)
    assert nearest((100, 100), shapes) == (1024, 1024)


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=80), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_merging_loses_nothing_and_leaves_no_small_bucket(sizes: list[tuple[int, int]], least: int) -> None:
    named = {str(i): s for i, s in enumerate(sizes)}
    result = assign(named, BucketConfig(size=512, least=least))
    assert result.bucket.keys() == named.keys()
    counts = Counter(result.bucket.values())
    assert len(counts) == 1 or min(counts.values()) >= least
    for bucket, parts in result.merged.items():
        assert sum(parts.values()) < counts[bucket] or least > counts[bucket]
    assert sum(e["pictures"] for e in result.report().values()) == len(sizes)  # type: ignore[misc]


@pytest.fixture
def bucketed(tmp_path: Path) -> tuple[Path, dict[str, tuple[int, int]]]:
    """Forty pictures of four aspects, each a gradient along x and y that tells where a crop was taken."""
    root = tmp_path / "pictures"
    root.mkdir()
    sizes = {}
    for i in range(40):
        width, height = [(200, 200), (300, 160), (150, 290), (64, 64)][i % 4] if i != 39 else (170, 400)
        x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        picture = np.stack([x, y, np.full_like(x, i)], -1).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        (root / f"p{i:02d}.png").write_bytes(buffer.getvalue())
        (root / f"p{i:02d}.txt").write_text(f"picture {i}")
        sizes[f"p{i:02d}"] = (width, height)
    config = BuildConfig(buckets=BucketConfig(size=128, step=32, least=8), format="png")
    build(root, tmp_path / "out", config)
    return tmp_path / "out", sizes


def test_batches_have_one_shape_and_every_picture_comes_once(
    bucketed: tuple[Path, dict[str, tuple[int, int]]],
) -> None:
    folder, sizes = bucketed
    notes = Manifest.read(folder).notes["buckets"]
    assert sum(e["pictures"] for e in notes.values()) == 40
    assert sum(sum(e["merged"].values()) for e in notes.values()) == 0 or min(e["pictures"] for e in notes.values()) > 7
    config = DataConfig(path=str(folder), buckets=True, last="wrap")
    loader = Loader(config, seed=0, micro_batch=4)
    batches = list(itertools.islice(loader.batches(), loader.steps_per_epoch))
    assert {k for b in batches for k in b["key"]} == set(sizes)
    shapes = [tuple(b["image"].shape[2:]) for b in batches]
    assert len(set(shapes)) > 2
    assert shapes != sorted(shapes)
    halves = [Loader(config, seed=0, micro_batch=2, rank=r, world=2) for r in range(2)]
    for step, whole in enumerate(batches):
        parts = [h.batch(step, 0) for h in halves]
        assert parts[0]["key"] + parts[1]["key"] == whole["key"]
        assert torch.equal(torch.cat([p["image"] for p in parts]), whole["image"])


def test_size_and_crop_conditioning_say_where_the_crop_is(bucketed: tuple[Path, dict[str, tuple[int, int]]]) -> None:
    folder, sizes = bucketed
    config = DataConfig(path=str(folder), buckets=True, last="wrap", crop="random", flip=True)
    loader = Loader(config, seed=0, micro_batch=4)
    moved = 0
    for batch in itertools.islice(loader.batches(), 20):
        height, width = batch["image"].shape[2:]
        assert batch["target_size"].tolist() == [[height, width]] * 4
        rows = zip(batch["key"], batch["image"], batch["original_size"], batch["crop_top_left"], strict=True)
        for key, image, original, corner in rows:
            assert tuple(original.tolist()) == sizes[key][::-1]
            top, left = corner.tolist()
            scale = max(width / sizes[key][0], height / sizes[key][1])
            whole = (round(sizes[key][0] * scale), round(sizes[key][1] * scale))
            seen = (image + 1) * 127.5
            middle = seen[:, height // 2, width // 2]
            flipped = seen[0, 0, 0] > seen[0, 0, -1]
            at_x = (left + width // 2) / whole[0] * 255
            assert abs(float(middle[0]) - (255 - at_x if flipped else at_x)) < 6
            assert abs(float(middle[1]) - (top + height // 2) / whole[1] * 255) < 6
            moved += int(top > 0 or left > 0)
    assert moved > 10


def test_a_bucket_smaller_than_a_batch_is_named(bucketed: tuple[Path, dict[str, tuple[int, int]]]) -> None:
    with pytest.raises(
        ValueError, match=r"bucket \d+x\d+: the data set has \d+ samples, fewer than the global batch 32"
    ):
        Loader(DataConfig(path=str(bucketed[0]), buckets=True), seed=0, micro_batch=32)
    with pytest.raises(ValueError, match=r"data.buckets: 'emoji' has none"):
        Loader(DataConfig(path="emoji", buckets=True), seed=0, micro_batch=1)
    with pytest.raises(ValueError, match="multiple of the step"):
        BucketConfig(size=100)
    assert math.isclose(BucketConfig(size=128, step=32).ratio, 2.0)


def halves(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 6, H/8, W/8), a stand-in for an encoder."""
    pooled = torch.nn.functional.avg_pool2d(images, 8)
    return torch.cat([pooled, pooled * 2], 1)


def test_caches_of_buckets_hold_what_online_gives(
    bucketed: tuple[Path, dict[str, tuple[int, int]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sizes = bucketed
    config = EncodeConfig(path=str(folder), buckets=True, dtype="float32", batch=3, part=5)
    for rank in (1, 0, 2):
        encode(config, tmp_path / "cache", moments=halves, text=None, hashes={}, rank=rank, world=3)
    manifest = finish(config, tmp_path / "cache")
    report, source = manifest.notes["buckets"], Manifest.read(folder).notes["buckets"]
    assert report == source  # nothing was bad, so nothing is lost
    assert sum(e["pictures"] for e in report.values()) == len(sizes)
    _print_buckets(manifest)
    assert "bucket 128x128: " in capsys.readouterr().out

    data = DataConfig(path=str(tmp_path / "cache"), cached=True, buckets=True, last="wrap")
    loader = Loader(data, seed=0, micro_batch=4)
    online = {}
    for batch in itertools.islice(
        Loader(replace(data, path=str(folder), cached=False), seed=0, micro_batch=4).batches(), 60
    ):
        for key, image in zip(batch["key"], batch["image"], strict=True):
            online[key] = image
    seen, shapes = set(), set()
    for batch in itertools.islice(loader.batches(), loader.steps_per_epoch):
        expected = torch.cat([halves(online[k][None]) for k in batch["key"]])
        torch.testing.assert_close(batch["moments"], expected)
        assert batch["target_size"].tolist() == [[8 * n for n in expected.shape[2:]]] * 4
        seen |= set(batch["key"])
        shapes.add(tuple(expected.shape[2:]))
    assert seen == set(sizes)
    assert len(shapes) > 2
    with pytest.raises(ValueError, match="needs buckets: true"):
        Loader(replace(data, buckets=False), seed=0, micro_batch=4)
    with pytest.raises(ValueError, match="made with flip=False, this run has True"):
        Loader(replace(data, flip=True), seed=0, micro_batch=4)


def test_the_command_encodes_buckets(
    bucketed: tuple[Path, dict[str, tuple[int, int]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sizes = bucketed
    model = miniature.vae(tmp_path / "model")
    command = ["encode", str(folder), str(tmp_path / "cache"), "--buckets", "--vae", str(model), "--batch", "8"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{len(sizes)} samples, " in said
    assert "bucket 128x128: " in said
    assert "relative error of storing as float16: moments " in said
    data = DataConfig(path=str(tmp_path / "cache"), cached=True, buckets=True, last="wrap")
    batch = Loader(data, seed=0, micro_batch=4).batch(0, 0)
    height, width = batch["target_size"][0].int().tolist()
    factor = load_autoencoder(str(model)).factor
    assert tuple(batch["moments"].shape[2:]) == (height // factor, width // factor)


def test_existing_tars_get_buckets_by_indexing(
    bucketed: tuple[Path, dict[str, tuple[int, int]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tars of mixed aspects, as img2dataset writes them, are not changed: each has one index a bucket."""
    folder, sizes = bucketed
    tars = tmp_path / "tars"
    samples = [
        s
        for shard in Manifest.read(folder).shards
        for s in wds.WebDataset(str(folder / shard.file), shardshuffle=False)
    ]
    samples.sort(key=lambda s: s["__key__"])
    with ShardWriter(tars, "0000", max_samples=15) as writer:
        for sample in samples:
            writer.add(sample["__key__"], {e: sample[e] for e in ("png", "json")})
        writer.add("zz", {"png": b"no picture", "json": b"{}"})
    before = {p.name: p.read_bytes() for p in tars.glob("*.tar")}
    assert (
        main(["index", str(tars), "--buckets", "128", "--bucket-step", "32", "--bucket-least", "8", "--workers", "1"])
        == 0
    )
    out = capsys.readouterr().out
    assert "1 samples whose picture has no size" in out
    assert "bucket " in out
    assert {p.name: p.read_bytes() for p in tars.glob("*.tar")} == before
    manifest = Manifest.read(tars)
    assert {s.file for s in manifest.shards} == set(before)
    assert len(manifest.shards) > len(before)
    assert manifest.notes["buckets"] == Manifest.read(folder).notes["buckets"]
    loader = Loader(
        DataConfig(path=str(tars), buckets=True, last="wrap", require_captions=False), seed=0, micro_batch=4
    )
    batches = list(itertools.islice(loader.batches(), loader.steps_per_epoch))
    assert {k for b in batches for k in b["key"]} == set(sizes)
    index(tars)  # without buckets again
    assert {s.bucket for s in Manifest.read(tars).shards} == {None}
    assert Manifest.read(tars).samples() == 41
