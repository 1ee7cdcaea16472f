"""The data path against its limit (reading and decoding by hand) and against webdataset, on the same files."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from webdataset.compat import WebDataset

from bench.timing import Options, Spread, interleaved, report
from ldm.data import decode
from ldm.data.build import BuildConfig, build
from ldm.data.images import resize
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.order import Order, slots
from ldm.data.write import ShardWriter

SIZE = 256


def pictures(folder: Path, count: int) -> Path:
    """JPEGs of 512 x 384 with structure at several scales, and captions, as shards."""
    source = folder / "pictures"
    source.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize(
            (512, 384), Image.Resampling.BICUBIC
        )
        small.save(source / f"{i:05d}.jpg", quality=90)
        (source / f"{i:05d}.txt").write_text(f"picture {i}")
    build(source, folder / "shards", BuildConfig(shard_samples=256))
    return folder / "shards"


def by_hand(shards: Path) -> int:
    """The limit: read the tar from start to end, decode at reduced scale, resize, to float."""
    done = 0
    for path in sorted(shards.glob("*.tar")):
        for sample in WebDataset(str(path), shardshuffle=False):
            image = resize(decode.picture(sample["jpg"], at_least=(SIZE, SIZE)), (SIZE, SIZE), "crop")
            torch.from_numpy(np.array(image)).float()
            done += 1
    return done


def by_webdataset(shards: Path) -> int:
    """webdataset's own pipeline: PIL decoding, resize, crop, to float, batches."""

    def transform(image: Image.Image) -> torch.Tensor:
        covering = resize(image, (SIZE, SIZE), "crop")
        left = (covering.width - SIZE) // 2
        crop = np.asarray(covering)[:SIZE, left : left + SIZE]
        return torch.from_numpy(crop.copy()).permute(2, 0, 1).float() / 127.5 - 1

    urls = [str(p) for p in sorted(shards.glob("*.tar"))]
    data = WebDataset(urls, shardshuffle=False).shuffle(256).decode("pilrgb").to_tuple("jpg", "txt")
    return sum(len(batch[1]) for batch in data.map_tuple(transform, None).batched(16))


def by_loader(shards: Path, workers: int) -> int:
    """One epoch of our loader, nothing kept in memory."""
    loader = Loader(DataConfig(path=str(shards), size=SIZE, memory=0), seed=0, micro_batch=16, workers=workers)
    stream = loader.batches(0)
    return sum(len(b["key"]) for b in itertools.islice(stream, loader.steps_per_epoch))


def cached(folder: Path, count: int) -> Loader:
    """A loader over cached moments of 4 x 32 x 32 latents."""
    with ShardWriter(folder / "cached", "train") as writer:
        for i in range(count):
            data = safetensors.torch.save({"moments": torch.randn(1, 8, 32, 32).half()})
            writer.add(f"s{i:06d}", {"json": json.dumps({"caption": f"c {i}"}).encode(), "cache.safetensors": data})
    shards = tuple(writer.shards)
    Manifest(name="cached", shards=shards, folder=folder / "cached", cached={"size": 256}).write()
    return Loader(DataConfig(path=str(folder / "cached"), cached=True), seed=0, micro_batch=256)


def cached_rate(loader: Loader) -> float:
    """Cached samples a second on this thread, after one warm epoch."""
    stream = loader.batches(0)
    for _ in range(loader.steps_per_epoch):
        next(stream)
    steps = loader.steps_per_epoch * 3
    start = time.perf_counter()
    done = sum(len(next(stream)["key"]) for _ in range(steps))
    return done / (time.perf_counter() - start)


def first_batch(shards: Path, step: int) -> float:
    """Seconds from nothing to the first batch at a step."""
    start = time.perf_counter()
    next(Loader(DataConfig(path=str(shards), size=SIZE), seed=0, micro_batch=16).batches(step))
    return time.perf_counter() - start


def order_at_scale(steps: int) -> float:
    """Median seconds of a rank's step of order.py at 1e9 samples in 1e5 shards."""
    sizes = tuple(np.random.default_rng(0).integers(9_000, 11_000, 100_000).tolist())
    order = Order(sizes=sizes, batch=2048)
    part = slots(2048, rank=0, world=8, accumulate=1, micro_step=0)
    order.ids(0, part)
    times = []
    for step in range(1000, 1000 + steps):
        start = time.perf_counter()
        order.ids(step, part)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run(options: Options) -> dict[str, Any]:
    """Measure on the CPU; workers are threads of this process, so pin as many cores as there are workers."""
    count = 32 if options.quick else 512
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = pictures(folder, count)
        cases: dict[str, Callable[[], object]] = {
            "by hand": lambda: by_hand(shards),
            "webdataset": lambda: by_webdataset(shards),
            **{f"loader, {w} workers": lambda w=w: by_loader(shards, w) for w in (0, 1, 2)},
        }
        seconds = interleaved(cases, options.times(7), warmup=1)
        pairs = [("by hand", "loader, 0 workers"), *[("webdataset", f"loader, {w} workers") for w in (0, 1, 2)]]
        result = report(f"data, {count} JPEGs of 512x384 to {SIZE} px", seconds, pairs)
        rates = {name: count / Spread.of(values).median for name, values in seconds.items()}
        result["pictures_per_second"] = rates
        result["cached_samples_per_second"] = cached_rate(cached(folder, 512 if options.quick else 6000))
        result["first_batch_seconds"] = {str(s): first_batch(shards, s) for s in (10, 10_000_000)}
    result["order_step_seconds"] = order_at_scale(options.times(100))
    for name, value in rates.items():
        print(f"  {name:<34} {value:10.1f} pictures/s")
    print(f"  cached moments, 4x32x32 latents: {result['cached_samples_per_second']:.0f} samples/s (wanted: 20000)")
    for step, value in result["first_batch_seconds"].items():
        print(f"  first batch after resuming at step {step}: {value:.3f} s (wanted: under 2)")
    print(f"  order, 1e9 samples in 1e5 shards: {result['order_step_seconds'] * 1e3:.3f} ms a step (wanted: under 1)")
    return result
