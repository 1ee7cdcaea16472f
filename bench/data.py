"""The data path against its limit (reading and decoding by hand), webdataset and MosaicML streaming: the same files."""

from __future__ import annotations

import itertools
import json
import shutil
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
    build(source, folder / "shards", BuildConfig(shard_samples=count // 4))  # other packages' workers divide shards
    return folder / "shards"


def by_loader(shards: Path, workers: int) -> int:
    """One epoch of our loader, nothing kept in memory."""
    loader = Loader(DataConfig(path=str(shards), size=SIZE, memory=0), seed=0, micro_batch=16, workers=workers)
    return sum(len(b["key"]) for b in loader.batches(0, loader.steps_per_epoch))


def cached(folder: Path, count: int) -> Path:
    """A cache of moments of 4 x 32 x 32 latents."""
    with ShardWriter(folder / "cached", "train") as writer:
        for i in range(count):
            data = safetensors.torch.save({"moments": torch.randn(1, 8, 32, 32).half()})
            writer.add(f"s{i:06d}", {"json": json.dumps({"caption": f"c {i}"}).encode(), "cache.safetensors": data})
    shards = tuple(writer.shards)
    Manifest(name="cached", shards=shards, folder=folder / "cached", cached={"size": 256, "variants": 1}).write()
    return folder / "cached"


def cached_rate(folder: Path, memory: int) -> float:
    """Cached samples a second on this thread, after one warm epoch; with memory for captions and places, or none."""
    loader = Loader(DataConfig(path=str(folder), cached=True, memory=memory), seed=0, micro_batch=256)
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
    """Whole paths from shards to float batches, each with the same number of workers (theirs are processes)."""
    plural = {w: f"{w} worker{'s' * (w != 1)}" for w in ((0, 2) if options.quick else (0, 1, 2))}
    cases: dict[str, Callable[[], object]] = {}
    pairs: list[tuple[str, str]] = []
    problem = peers.streaming_problem()
    if problem is None:
        peers.write_streaming(shards, folder / "mds")
    else:
        print(f"streaming (MosaicML) cannot be imported, left out: {problem}")
    for w, workers in plural.items():
        threads = max(w, 1)
        hand = f"by hand, {threads} thread{'s' * (threads != 1)}"
        cases[hand] = lambda threads=threads: peers.by_hand(shards, SIZE, threads)
        cases[f"loader, {workers}"] = lambda w=w: by_loader(shards, w)
        cases[f"webdataset, {workers}"] = peers.by_webdataset(shards, SIZE, w)
        pairs += [(hand, f"loader, {workers}"), (f"webdataset, {workers}", f"loader, {workers}")]
        if problem is None:
            # Workers of several data sets of one folder would share the state that it keeps for the machine.
            shutil.copytree(folder / "mds", folder / f"mds{w}")
            cases[f"streaming, {workers}"] = peers.by_streaming(folder / f"mds{w}", SIZE, w)
            pairs.append((f"streaming, {workers}", f"loader, {workers}"))
    for name, case in cases.items():
        assert case() == count, name  # and wakes the workers
    seconds = interleaved(cases, options.times(7), warmup=0 if options.quick else 1)
    result = report(f"data, {count} JPEGs of 512x384 to {SIZE} px", seconds, pairs)
    print("  (by hand over loader is the share of the limit that the loader reaches: wanted 0.9; the others: 1.2)")
    result["pictures_per_second"] = {name: count / Spread.of(values).median for name, values in seconds.items()}
    return result | {"streaming": problem or "imported"}


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
    result = report("building shards; decodes every picture to find damage", seconds, [("build", "plain tar")])
    count = len(list(source.glob("*.jpg")))
    result["pictures_per_second"] = {name: count / Spread.of(values).median for name, values in seconds.items()}
    for name, value in result["pictures_per_second"].items():
        print(f"  {name:<34} {value:10.1f} pictures/s")
    return result


def run(options: Options) -> dict[str, Any]:
    """Measure on the CPU; workers are threads of this process, so pin as many cores as there are workers."""
    count = 32 if options.quick else 512
    torch.set_num_threads(1)  # a case shall use as many cores as it has workers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = pictures(folder, count)
        result = compare_paths(folder, shards, count, options)
        result["decoders"] = compare_decoders(shards, options)
        result["building"] = compare_building(folder, options)
        latents = cached(folder, 512 if options.quick else 6000)
        rates = {kept: [cached_rate(latents, kept) for _ in range(options.times(5))] for kept in (1 << 30, 0)}
        result["cached_samples_per_second"] = statistics.median(rates[1 << 30])
        result["cached_samples_per_second_nothing_kept"] = statistics.median(rates[0])
        result["first_batch_seconds"] = {str(s): first_batch(shards, s) for s in (10, 10_000_000)}
    result["order_step_seconds"], result["order_bytes"] = order_at_scale(options.times(100))
    for name, value in result["pictures_per_second"].items():
        print(f"  {name:<34} {value:10.1f} pictures/s")
    print(
        f"  cached moments, 4x32x32 latents: {result['cached_samples_per_second']:.0f} samples/s a core (wanted: 20000)"
    )
    beyond = result["cached_samples_per_second_nothing_kept"]
    print(f"  the same when memory has no room for captions and places: {beyond:.0f} samples/s")
    for step, value in result["first_batch_seconds"].items():
        print(f"  first batch after resuming at step {step}: {value:.3f} s (wanted: under 2)")
    print(f"  order, 1e9 samples in 1e5 shards: {result['order_step_seconds'] * 1e3:.3f} ms a step (wanted: under 1)")
    print(f"  order, the same: {result['order_bytes'] / 1e6:.1f} MB at most")
    return result
