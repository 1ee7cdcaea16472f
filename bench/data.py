"""The data path against its limit (reading and decoding by hand), webdataset and MosaicML streaming: the same files."""

from __future__ import annotations

import itertools
import json
import statistics
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from bench import pictures as peers
from bench.timing import Options, Spread, interleaved, report
from ldm.data import jpeg
from ldm.data.build import BuildConfig, build
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.order import Order, slots
from ldm.data.shards import Shards
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


def order_at_scale(steps: int) -> tuple[float, float]:
    """Median seconds of a rank's step of order.py at 1e9 samples in 1e5 shards, and its bytes of memory."""
    sizes = tuple(np.random.default_rng(0).integers(9_000, 11_000, 100_000).tolist())
    part = slots(2048, rank=0, world=8, accumulate=1, micro_step=0)
    tracemalloc.start()
    order = Order(sizes=sizes, batch=2048)
    order.ids(0, part)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    times = []
    for step in range(1000, 1000 + steps):
        start = time.perf_counter()
        order.ids(step, part)
        times.append(time.perf_counter() - start)
    return statistics.median(times), memory


def compare_decoders(shards: Path, options: Options) -> dict[str, Any]:
    """Decoding and resizing alone, by every decoder that is installed."""
    reader = Shards(Manifest.read(shards), "train")
    files = [reader.read(i, only=("jpg",))[1]["jpg"] for i in range(min(len(reader), 8 if options.quick else 64))]
    cases = {n: lambda f=f: [f(data) for data in files] for n, f in peers.decoders(SIZE).items()}
    missing = [name for name, module in peers.PACKAGES.items() if not peers.installed(module)]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")
    seconds = interleaved(cases, options.times(9), warmup=1)
    pairs = [("PIL, PIL's resize", name) for name in cases if name != "PIL, PIL's resize"]
    return report(f"decoders, {len(files)} JPEGs; chosen here: {jpeg.fastest()}", seconds, pairs) | {"missing": missing}


def compare_paths(folder: Path, shards: Path, count: int, options: Options) -> dict[str, Any]:
    """Whole paths from shards to float batches."""
    cases: dict[str, Callable[[], object]] = {
        "by hand": lambda: peers.by_hand(shards, SIZE),
        "webdataset": lambda: peers.by_webdataset(shards, SIZE),
        **{f"loader, {w} workers": lambda w=w: by_loader(shards, w) for w in (0, 1, 2)},
    }
    pairs = [("by hand", "loader, 0 workers"), *[("webdataset", f"loader, {w} workers") for w in (0, 1, 2)]]
    if peers.write_streaming(shards, folder / "mds"):
        cases["streaming"] = lambda: peers.by_streaming(folder / "mds", SIZE)
        pairs += [("streaming", f"loader, {w} workers") for w in (0, 1, 2)]
    else:
        print("streaming (MosaicML) cannot be imported: left out")
    seconds = interleaved(cases, options.times(7), warmup=1)
    result = report(f"data, {count} JPEGs of 512x384 to {SIZE} px", seconds, pairs)
    result["pictures_per_second"] = {name: count / Spread.of(values).median for name, values in seconds.items()}
    return result


def compare_building(folder: Path, options: Options) -> dict[str, Any]:
    """`ldm data build` of pictures that need no change, against a plain tar of the same files."""
    numbers = itertools.count()
    source = folder / "pictures"

    def tar() -> None:
        with tarfile.open(folder / "plain.tar", "w") as out:
            for path in sorted(source.iterdir()):
                out.add(path, path.name)

    cases = {"build": lambda: build(source, folder / f"built{next(numbers)}", BuildConfig()), "plain tar": tar}
    seconds = interleaved(cases, options.times(5), warmup=1)
    return report("building shards; decodes every picture to find damage", seconds, [("build", "plain tar")])


def run(options: Options) -> dict[str, Any]:
    """Measure on the CPU; workers are threads of this process, so pin as many cores as there are workers."""
    count = 32 if options.quick else 512
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = pictures(folder, count)
        result = compare_paths(folder, shards, count, options)
        result["decoders"] = compare_decoders(shards, options)
        result["building"] = compare_building(folder, options)
        result["cached_samples_per_second"] = cached_rate(cached(folder, 512 if options.quick else 6000))
        result["first_batch_seconds"] = {str(s): first_batch(shards, s) for s in (10, 10_000_000)}
    result["order_step_seconds"], result["order_bytes"] = order_at_scale(options.times(100))
    for name, value in result["pictures_per_second"].items():
        print(f"  {name:<34} {value:10.1f} pictures/s")
    print(f"  cached moments, 4x32x32 latents: {result['cached_samples_per_second']:.0f} samples/s (wanted: 20000)")
    for step, value in result["first_batch_seconds"].items():
        print(f"  first batch after resuming at step {step}: {value:.3f} s (wanted: under 2)")
    print(f"  order, 1e9 samples in 1e5 shards: {result['order_step_seconds'] * 1e3:.3f} ms a step (wanted: under 1)")
    print(f"  order, the same: {result['order_bytes'] / 1e6:.1f} MB at most")
    return result
