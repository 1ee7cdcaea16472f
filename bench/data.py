"""`python bench/data.py`: the data path against its limit and against webdataset, on the same files, interleaved.

Each line is a median of ratios of neighbouring runs with its quartiles; what is measured is said on the line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import webdataset as wds
from PIL import Image

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
        for sample in wds.WebDataset(str(path), shardshuffle=False):
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
    data = wds.WebDataset(urls, shardshuffle=False).shuffle(256).decode("pilrgb").to_tuple("jpg", "txt")
    return sum(len(batch[1]) for batch in data.map_tuple(transform, None).batched(16))


def by_loader(shards: Path, workers: int) -> int:
    """One epoch of our loader, nothing kept in memory."""
    loader = Loader(DataConfig(path=str(shards), size=SIZE, memory=0), seed=0, micro_batch=16, workers=workers)
    stream = loader.batches(0)
    return sum(len(b["key"]) for b in itertools.islice(stream, loader.steps_per_epoch))


def rate(run: Callable[[], int]) -> float:
    """Samples a second."""
    start = time.perf_counter()
    return run() / (time.perf_counter() - start)


def compare(name: str, ours: Callable[[], int], theirs: Callable[[], int], rounds: int) -> None:
    """Print the median ratio of interleaved pairs with its quartiles."""
    ratios, rates = [], []
    for _ in range(rounds):
        reference = rate(theirs)
        rates.append(rate(ours))
        ratios.append(rates[-1] / reference)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    say(f"{name}: {middle:.2f} ({low:.2f} to {high:.2f}), {statistics.median(rates):.0f} pictures/s")


def cached(folder: Path, count: int) -> Loader:
    """A loader over cached moments of 4 x 32 x 32 latents."""
    with ShardWriter(folder / "cached", "train") as writer:
        for i in range(count):
            data = safetensors.torch.save({"moments": torch.randn(1, 8, 32, 32).half()})
            writer.add(f"s{i:06d}", {"json": json.dumps({"caption": f"c {i}"}).encode(), "cache.safetensors": data})
    shards = tuple(writer.shards)
    Manifest(name="cached", shards=shards, folder=folder / "cached", cached={"size": 256}).write()
    return Loader(DataConfig(path=str(folder / "cached"), cached=True), seed=0, micro_batch=256)


def cached_rate(loader: Loader) -> None:
    """Cached samples a second on this thread, after one warm epoch."""
    stream = loader.batches(0)
    for _ in range(loader.steps_per_epoch):
        next(stream)
    steps = loader.steps_per_epoch * 3
    per_second = rate(lambda: sum(len(next(stream)["key"]) for _ in range(steps)))
    say(f"cached moments, 4x32x32 latents: {per_second:.0f} samples/s on one core (wanted: 20000)")


def resume(shards: Path) -> None:
    """Time to the first batch at two places."""
    for step in (10, 10_000_000):
        start = time.perf_counter()
        loader = Loader(DataConfig(path=str(shards), size=SIZE), seed=0, micro_batch=16)
        next(loader.batches(step))
        say(f"first batch after resuming at step {step:,}: {time.perf_counter() - start:.3f} s (wanted: under 2)")


def order_at_scale() -> None:
    """order.py at 1e9 samples in 1e5 shards."""
    sizes = tuple(np.random.default_rng(0).integers(9_000, 11_000, 100_000).tolist())
    order = Order(sizes=sizes, batch=2048)
    part = slots(2048, rank=0, world=8, accumulate=1, micro_step=0)
    order.ids(0, part)
    times = []
    for step in range(1000, 1100):
        start = time.perf_counter()
        order.ids(step, part)
        times.append(time.perf_counter() - start)
    say(
        f"order of {order.total:,} samples in 100,000 shards: {statistics.median(times) * 1e3:.3f} ms a step (wanted: 1)"
    )


def say(line: str) -> None:
    """One line of the report."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = pictures(folder, args.pictures)
        by_hand(shards)
        compare("loader / reading by hand", lambda: by_loader(shards, 0), lambda: by_hand(shards), args.rounds)
        for workers in (1, 2):
            ours = lambda w=workers: by_loader(shards, w)  # noqa: E731
            compare(f"loader with {workers} workers / webdataset", ours, lambda: by_webdataset(shards), args.rounds)
        cached_rate(cached(folder, 6000))
        resume(shards)
    order_at_scale()


if __name__ == "__main__":
    main()
