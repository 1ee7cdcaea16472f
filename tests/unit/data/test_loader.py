"""The loader: equal over ranks, workers and resumes, steady with bad samples, right in pixels."""

import gc
import io
import itertools
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.tags import Tags
from ldm.data.write import ShardWriter
from ldm.rng import Rng
from ldm.types import Batch
from tests.unit.data.pictures import color_of, png

Make = Callable[..., Path]


def take(loader: Loader, start: int, count: int) -> list[Batch]:
    return list(itertools.islice(loader.batches(start), count))


def joined(config: DataConfig, step: int, world: int, accumulate: int, workers: int = 0) -> dict[str, object]:
    """The global batch of a step as ranks see it, put together in the order of positions."""
    rows = []
    for rank in range(world):
        micro = 12 // world // accumulate
        loader = Loader(
            config, seed=5, micro_batch=micro, accumulate=accumulate, rank=rank, world=world, workers=workers
        )
        for batch in take(loader, step, accumulate):
            rows += zip(
                batch["position"].tolist(), batch["key"], batch["caption"], batch["image"].unbind(), strict=True
            )
    rows.sort(key=lambda r: r[0])
    return {
        "position": [r[0] for r in rows],
        "key": [r[1] for r in rows],
        "caption": [r[2] for r in rows],
        "image": torch.stack([r[3] for r in rows]),
    }


def test_pixels_and_captions_belong_together(make_set: Make) -> None:
    loader = Loader(DataConfig(path=str(make_set(30)), size=8), seed=0, micro_batch=10)
    for batch in take(loader, 0, 3):
        for key, image, caption in zip(batch["key"], batch["image"], batch["caption"], strict=True):
            number = int(key[1:])
            expected = torch.tensor(color_of(number)) / 127.5 - 1
            assert torch.allclose(image, expected[:, None, None].expand(3, 8, 8), atol=1e-6)
            assert caption in (f"picture {number}", f"a picture of {number}")
    assert batch["image"].dtype == torch.float32
    assert batch["image"].is_contiguous()
    assert batch["weight"].tolist() == [1.0] * 10


@pytest.mark.parametrize(("world", "accumulate", "workers"), [(1, 3, 0), (2, 1, 2), (3, 2, 0), (4, 1, 1), (6, 2, 0)])
def test_the_same_global_batches_for_any_division(make_set: Make, world: int, accumulate: int, workers: int) -> None:
    config = DataConfig(path=str(make_set(31)), size=6, crop="random", flip=True)
    for step in (0, 4):
        one = joined(config, step, 1, 1)
        other = joined(config, step, world, accumulate, workers)
        assert one["position"] == other["position"] == list(range(step * 12, step * 12 + 12))
        assert one["key"] == other["key"]
        assert one["caption"] == other["caption"]
        assert torch.equal(one["image"], other["image"])  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_losses_agree_across_world_sizes(make_set: Make, world: int) -> None:
    """A denoising loss whose noise is keyed by position: ranks' means average to the single process's."""
    config = DataConfig(path=str(make_set(30)), size=8, crop="random", flip=True)

    def loss(rank: int, size: int, step: int) -> float:
        (batch,) = take(Loader(config, seed=0, micro_batch=12 // size, rank=rank, world=size), step, 1)
        rng = Rng.of(0, batch["position"])
        noise, drop = rng.normal("noise", (3, 8, 8)), rng.uniform("drop") < 0.1
        seen = torch.where(drop[:, None, None, None], noise, batch["image"] + noise)
        return float((seen.tanh() - noise).square().mean(dim=(1, 2, 3)).mean())

    for step in (0, 1, 7):
        parts = [loss(rank, world, step) for rank in range(world)]
        assert sum(parts) / world == pytest.approx(loss(0, 1, step), rel=1e-6)


def test_resume_equals_going_on(make_set: Make) -> None:
    config = DataConfig(path=str(make_set(20)), size=8, crop="random")
    make = lambda: Loader(config, seed=1, micro_batch=3, accumulate=2, workers=1)  # noqa: E731
    straight, resumed = take(make(), 0, 16)[10:], take(make(), 5, 6)
    for a, b in zip(straight, resumed, strict=True):
        assert a["key"] == b["key"]
        assert a["caption"] == b["caption"]
        assert torch.equal(a["position"], b["position"])
        assert torch.equal(a["image"], b["image"])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_so_many_steps_and_no_more(make_set: Make, workers: int) -> None:
    loader = Loader(DataConfig(path=str(make_set(20)), size=8), seed=1, micro_batch=2, accumulate=2, workers=workers)
    made = [b["position"].tolist() for b in loader.batches(7, 2)]
    assert made == [[28, 29], [30, 31], [32, 33], [34, 35]]
    assert list(loader.batches(7, 0)) == []


def test_far_resume_is_immediate(make_set: Make) -> None:
    loader = Loader(DataConfig(path=str(make_set(20)), size=8), seed=1, micro_batch=4)
    (batch,) = take(loader, 10_000_000, 1)
    assert batch["position"].tolist() == [40_000_000 + i for i in range(4)]


def test_captions_follow_their_weights(make_set: Make) -> None:
    loader = Loader(DataConfig(path=str(make_set(40)), size=8), seed=0, micro_batch=40)
    texts = Counter(c.startswith("a ") for b in take(loader, 0, 60) for c in b["caption"])
    share = texts[True] / sum(texts.values())
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 2400) ** 0.5
    plain = Loader(
        DataConfig(path=str(make_set(9, name="b")), captions="first", template="<{}>"), seed=0, micro_batch=9
    )
    assert all(c.startswith("<picture ") for c in take(plain, 0, 1)[0]["caption"])


def test_tags_are_shuffled_and_dropped_but_the_first_stay() -> None:
    tags = Tags(keep=1, dropout=0.25)
    made = [tags.apply("cat, red, round, big, soft", 0, p).split(", ") for p in range(800)]
    assert all(m[0] == "cat" and set(m) <= {"cat", "red", "round", "big", "soft"} for m in made)
    share = sum(len(m) - 1 for m in made) / (4 * 800)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 3200) ** 0.5
    assert len({tuple(m) for m in made if len(m) == 5}) == 24
    assert tags.apply("cat, red", 0, 7) == tags.apply("cat, red", 0, 7)


def test_tokenize_is_applied(make_set: Make) -> None:
    loader = Loader(
        DataConfig(path=str(make_set(9)), size=8),
        seed=0,
        micro_batch=4,
        tokenize=lambda texts: torch.tensor([[len(t)] for t in texts]),
    )
    (batch,) = take(loader, 0, 1)
    assert batch["tokens"].tolist() == [[len(c)] for c in batch["caption"]]


def test_bad_samples_are_replaced_alike_and_listed(make_set: Make, tmp_path: Path) -> None:
    listed = tmp_path / "q" / "quarantine.jsonl"
    config = DataConfig(path=str(make_set(36, bad=(4, 20))), size=8, quarantine=str(listed))
    loader = Loader(config, seed=0, micro_batch=12)
    batches = take(loader, 0, 9)
    assert all(b["image"].shape == (12, 3, 8, 8) for b in batches)
    assert not {"s00004", "s00020"} & {k for b in batches for k in b["key"]}
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted(e["key"] for e in entries) == ["s00004", "s00020"]
    assert loader.figures()["bad_samples"] == 2
    assert {e["reason"] for e in entries} == {"unknown_format"}
    keys = [k for b in batches for k in b["key"]]
    split = [
        k
        for step in range(9)
        for rank in range(3)
        for b in take(Loader(config, seed=0, micro_batch=4, rank=rank, world=3), step, 1)
        for k in b["key"]
    ]
    assert keys == split


def test_every_bad_kind_is_told_apart_while_training(tmp_path: Path) -> None:
    """Tars of strangers: nothing stops, each bad sample is listed with its shard, key and reason, odd ones are used."""

    def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)  # type: ignore[arg-type]
        return buffer.getvalue()

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    good = {
        "cmyk": {"jpg": saved(Image.new("CMYK", (9, 9)), "JPEG")},
        "deep": {"png": saved(Image.fromarray(np.full((9, 9), 40_000, np.uint16)))},
        "palette": {"png": saved(Image.new("P", (9, 9)), transparency=0)},
        "turned": {"jpg": saved(noise, "JPEG", exif=turned)},
        "animated": {"gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:])},
        "pixel": {"png": png((1, 2, 3), (1, 1))},
        "line": {"png": png((1, 2, 3), (20_000, 1))},
        "misnamed": {"jpg": png((1, 2, 3))},
    }
    caption = {"txt": b"a caption"}
    bad = {
        "empty": {"jpg": b"", **caption},
        "damaged": {"jpg": saved(noise, "JPEG")[:500], **caption},
        "unknown_format": {"jpg": b"<html>", **caption},
        "huge": {"png": png((0, 0, 0), (12_000, 9_000)), **caption},
        "no_picture": caption,
        "no_caption": {"png": png((1, 2, 3))},
        "not_utf8": {"png": png((1, 2, 3)), "txt": b"caf\xe9"},
        "bad_json": {"png": png((1, 2, 3)), "json": b"{", **caption},
    }
    folder = tmp_path / "set"
    with ShardWriter(folder, "train", max_samples=5) as writer:
        for key, members in [*bad.items(), *((k, {**v, **caption}) for k, v in good.items())]:
            writer.add(key, members)
    Manifest(name="set", shards=tuple(writer.shards), folder=folder).write()
    listed = tmp_path / "quarantine.jsonl"
    config = DataConfig(path=str(folder), size=8, quarantine=str(listed), max_bad=0.5)
    loader = Loader(config, seed=0, micro_batch=4)
    batches = take(loader, 0, 8)
    assert {k for b in batches for k in b["key"]} == set(good)
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {e["key"]: e["reason"] for e in entries} == {key: key for key in bad}
    assert {e["shard"] for e in entries} == {"train-00000.tar", "train-00001.tar"}
    assert loader.quarantine.counts == {(e["shard"], e["reason"]): 1 for e in entries}
    assert all(e["error"] for e in entries)


def test_too_many_bad_samples_stop_the_run_and_say_why(make_set: Make) -> None:
    config = DataConfig(path=str(make_set(40, bad=tuple(range(0, 40, 2)))), size=8, max_bad=0.05)
    with pytest.raises(ValueError, match=r"samples are bad, more than max_bad=0.05: .*unknown_format in train-00000"):
        take(Loader(config, seed=0, micro_batch=20), 0, 2)


@pytest.mark.parametrize("memory", [0, 2500, 1 << 20])
def test_memory_bound_changes_nothing_but_cost(make_set: Make, memory: int) -> None:
    folder = str(make_set(20))
    loader = Loader(DataConfig(path=folder, size=8, memory=memory), seed=0, micro_batch=5)
    other = Loader(DataConfig(path=folder, size=8), seed=0, micro_batch=5)
    for a, b in zip(take(loader, 0, 12), take(other, 0, 12), strict=True):
        assert torch.equal(a["image"], b["image"])
    pictures = sum(p.pixels.nbytes for p in loader.samples._pictures.values())
    kept = pictures + 2048 * len(loader.samples._records)
    assert kept <= memory
    figures = loader.figures()
    assert figures["data_memory_gib"] == kept / 2**30
    assert figures["bad_samples"] == 0.0
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS")]
    assert figures["host_memory_gib"] == pytest.approx(int(line.split()[1]) / 2**20, rel=0.1)


def test_memory_does_not_grow_over_epochs(make_set: Make) -> None:
    folder = str(make_set(8))
    loader = Loader(DataConfig(path=folder, size=8, memory=5_000), seed=0, micro_batch=8, workers=2)
    stream = loader.batches(0)
    tracemalloc.start()
    try:
        for _ in range(20):
            next(stream)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(200):
            next(stream)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 200_000  # leaking 1,600 pictures would be 800 kB
    finally:
        tracemalloc.stop()


def test_mistakes_are_named(make_set: Make, tmp_path: Path) -> None:
    folder = make_set(9)
    with pytest.raises(ValueError, match=r"no folder, no manifest and no shipped data; shipped: \['emoji'"):
        Loader(DataConfig(path="emojy"), seed=0, micro_batch=1)
    with pytest.raises(ValueError, match=r"no manifest.json"):
        Loader(DataConfig(path=str(tmp_path)), seed=0, micro_batch=1)
    with pytest.raises(ValueError, match=r"split 'test' is not in 'set'; it has \['train'\]"):
        Loader(DataConfig(path=str(folder), split="test"), seed=0, micro_batch=1)
    with pytest.raises(ValueError, match="9 samples, fewer than the global batch 10"):
        Loader(DataConfig(path=str(folder)), seed=0, micro_batch=10)
    with pytest.raises(ValueError, match="holds no cache"):
        Loader(DataConfig(path=str(folder), cached=True), seed=0, micro_batch=1)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="not a manifest"):
        Loader(DataConfig(path=str(tmp_path / "x.json")), seed=0, micro_batch=1)
    tar = folder / "train-00000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    loader = Loader(DataConfig(path=str(folder), size=8), seed=0, micro_batch=9)
    with pytest.raises(ValueError, match="copied in part or changed"):
        take(loader, 0, 1)
