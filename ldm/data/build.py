"""A folder of pictures with captions -> shards, in parallel; what cannot be used is reported, never fatal."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import signal
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ldm.data import decode, images
from ldm.data.buckets import BucketConfig, Shape, assign, name
from ldm.data.decode import BadSample
from ldm.data.manifest import Manifest, Shard
from ldm.data.pairing import ALPHA, Search
from ldm.data.partners import packed
from ldm.data.sources import CaptionsFrom, Columns, Item, captions_beside, find, read, read_place, remarks
from ldm.data.write import ShardWriter

_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How shards are made. `size` shrinks the short side to it (never enlarges); None keeps the size.

    `format` "keep" stores the original bytes of upright RGB jpg, png and webp pictures that need no shrinking, and
    makes the others jpg. `heldout` is the share of samples, chosen by key, of the split "heldout". `min_side` leaves
    out smaller pictures. `pairs` are partners that each picture must have, by name, and where they are (None: the usual
    places, see `ldm.data.pairing`; alpha: the picture's opacity); `masks` says what of a mask is to be painted.
    `image_column` and `caption_column` are a table's where they have other names than usual.
    """

    size: int | None = None
    format: Literal["keep", "jpg", "png", "webp"] = "keep"
    quality: int = 95
    heldout: float = 0.0
    captions_from: CaptionsFrom = "files"
    require_captions: bool = True
    pairs: dict[str, str | None] = field(default_factory=dict)
    masks: Literal["white", "transparent"] = "white"
    image_column: str | None = None
    caption_column: str | None = None
    min_side: int = 1
    max_pixels: int = decode.MAX_PIXELS
    buckets: BucketConfig | None = None
    shard_bytes: int = 256 << 20
    shard_samples: int = 10_000
    workers: int = 1

    @property
    def columns(self) -> Columns:
        """What tables' columns are, and where partners are. Raises ValueError for a place that is none."""
        searches = tuple(Search.of(name, where) for name, where in self.pairs.items() if where != ALPHA)
        return Columns(pairs=searches, image=self.image_column, caption=self.caption_column)

    def __post_init__(self) -> None:
        if self.size is not None and self.buckets is not None:
            raise ValueError("size and buckets exclude each other: a bucket has a size of its own")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be in [1, 100], got {self.quality}")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout must be in [0, 1), got {self.heldout}")
        if min(self.workers, self.min_side, self.max_pixels, self.shard_samples) < 1 or self.shard_bytes < 20480:
            raise ValueError("workers, min_side, max_pixels and shard_samples must be at least 1, shard_bytes 20480")


@dataclass(frozen=True)
class Report:
    """What became of the pictures, and what a reader of the report may not expect of those that were kept."""

    manifest: Manifest
    found: int
    written: int
    bad: tuple[dict[str, str], ...]
    remarks: tuple[str, ...] = ()

    @property
    def reasons(self) -> Counter[str]:
        """Bad pictures by reason."""
        return Counter(entry["reason"] for entry in self.bad)


@dataclass(frozen=True)
class _Done:
    item: Item
    members: dict[str, bytes] | None
    problem: tuple[str, str] | None = None
    frames: int = 1


def build(source: Path, out: Path, config: BuildConfig, progress: Callable[[int, int], None] | None = None) -> Report:
    """Write shards, manifest.json and quarantine.jsonl into `out`, the same for any number of workers.

    `progress` is called with (done, found). Raises ValueError if `out` holds a data set already, or if no picture can
    be used.
    """
    if (out / "manifest.json").exists():
        raise ValueError(f"out {str(out)!r} holds a data set already; choose another folder or remove it")
    items = find(source, config.captions_from, config.columns)
    out.mkdir(parents=True, exist_ok=True)
    assigned = None if config.buckets is None else assign(_sizes(items, config), config.buckets)
    shapes = {} if assigned is None else assigned.bucket
    writers: dict[tuple[str, Shape | None, int], ShardWriter] = {}
    bad: list[dict[str, str]] = []
    said = remarks(items)
    written: set[str] = set()
    with (out / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine:
        for number, done in enumerate(_prepare_all(_in_chunks(items, shapes), config), 1):
            if done.members is not None:
                split = "heldout" if _fraction(done.item.key) < config.heldout else "train"
                place = (split, shapes.get(done.item.key), done.item.repeats)
                if place not in writers:
                    writers[place] = _writer(out, config, *place)
                writers[place].add(done.item.key, done.members)
                written.add(done.item.key)
                if done.frames > 1:
                    said.append(f"{done.item.name}: the first of {done.frames} frames or pages")
            elif done.problem is not None:
                reason, detail = done.problem
                bad.append({"name": done.item.name, "key": done.item.key, "reason": reason, "error": detail})
                quarantine.write(json.dumps(bad[-1], ensure_ascii=False) + "\n")
            if progress is not None:
                progress(number, len(items))
    shards: list[Shard] = [s for writer in writers.values() for s in writer.close()]
    if not written:
        reasons = dict(Counter(b["reason"] for b in bad))
        raise ValueError(f"source {str(source)!r}: none of {len(items)} pictures can be used: {reasons}")
    notes: dict[str, Any] = {"bad": len(bad)}
    if assigned is not None:
        notes["buckets"] = assigned.report(written)
    manifest = Manifest(name=out.resolve().name, shards=tuple(shards), folder=out, notes=notes)
    manifest.write()
    return Report(manifest, len(items), len(written), tuple(bad), tuple(said))


def _fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / (1 << 56)


def _writer(out: Path, config: BuildConfig, split: str, shape: Shape | None, repeats: int) -> ShardWriter:
    prefix = split + (f"-{name(shape)}" if shape else "") + (f"-r{repeats}" if repeats > 1 else "")
    return ShardWriter(
        out,
        prefix,
        split=split,
        bucket=shape,
        repeats=repeats,
        max_bytes=config.shard_bytes,
        max_samples=config.shard_samples,
    )


_Job = tuple[Item, Shape | None]


def _in_chunks(items: list[Item], shapes: dict[str, Shape]) -> list[list[_Job]]:
    jobs = [(item, shapes.get(item.key)) for item in items]
    return [jobs[i : i + _CHUNK] for i in range(0, len(jobs), _CHUNK)]


def _sizes(items: list[Item], config: BuildConfig) -> dict[str, Shape]:
    """Sizes from the headers, without pictures that will be left out for these or for their text."""
    chunks = [items[i : i + 256] for i in range(0, len(items), 256)]
    measure = partial(_sizes_of, config)
    if config.workers == 1 or len(chunks) == 1:
        return {key: size for chunk in chunks for key, size in measure(chunk)}
    with _pool(config.workers) as pool:
        return {key: size for part in pool.map(measure, chunks) for key, size in part}


def _sizes_of(config: BuildConfig, items: list[Item]) -> list[tuple[str, Shape]]:
    found = []
    for item in items:
        with contextlib.suppress(BadSample):
            _captions(item, config)
            size = decode.upright_size(read(item))
            if min(size) >= config.min_side and size[0] * size[1] <= config.max_pixels:
                found.append((item.key, size))
    return found


def _captions(item: Item, config: BuildConfig) -> list[tuple[str, float]]:
    """The item's captions. Raises BadSample for its own problem, for text that cannot be read and for none."""
    captions = captions_beside(item)
    if not captions and config.require_captions:
        raise BadSample("no_caption", "no text in the metadata or beside the picture")
    return captions


def _prepare_all(chunks: list[list[_Job]], config: BuildConfig) -> Iterator[_Done]:
    """Prepared items in their order, with a bounded number in flight."""
    if config.workers == 1 or len(chunks) == 1:
        for chunk in chunks:
            for job in chunk:
                yield prepare(*job, config)
        return
    pool = _pool(config.workers)
    ahead: deque[tuple[list[_Job], Future[list[_Done]]]] = deque()
    position = 0
    try:
        while position < len(chunks) or ahead:
            while position < len(chunks) and len(ahead) < config.workers * 4:
                ahead.append((chunks[position], pool.submit(_prepare_chunk, chunks[position], config)))
                position += 1
            chunk, future = ahead.popleft()
            try:
                yield from future.result()
            except BrokenProcessPool:  # a decoder took its process down
                pool.shutdown(wait=False, cancel_futures=True)
                yield from (_alone(job, config) for job in chunk)
                pool = _pool(config.workers)
                ahead = deque((c, pool.submit(_prepare_chunk, c, config)) for c, _ in ahead)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_worker)


def _worker() -> None:
    """Begin a worker: Ctrl-C is its parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()


def quiet() -> None:
    """Let PIL be silent in this process: of broken notes, and of large pictures, whose size is checked here anyway."""
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.MAX_IMAGE_PIXELS = None


def _alone(job: _Job, config: BuildConfig) -> _Done:
    """One item in a process of its own."""
    with _pool(1) as pool:
        try:
            return pool.submit(_prepare_chunk, [job], config).result()[0]
        except BrokenProcessPool:
            return _Done(job[0], None, ("crashed", "the process that decoded it died"))


def _prepare_chunk(jobs: list[_Job], config: BuildConfig) -> list[_Done]:
    return [prepare(item, shape, config) for item, shape in jobs]


def prepare(item: Item, shape: Shape | None, config: BuildConfig) -> _Done:
    """One item's members, large enough for a bucket's shape, or what is wrong with it."""
    try:
        captions = _captions(item, config)
        stored = _picture(read(item), shape, config)
        beside = _partners(item, stored, config)
    except BadSample as error:
        return _Done(item, None, (error.reason, error.detail))
    record: dict[str, Any] = {
        **item.extra,
        "captions": [list(c) for c in captions],
        "width": stored.size[0],
        "height": stored.size[1],
        "original_width": stored.original[0],
        "original_height": stored.original[1],
    }
    members = {stored.extension: stored.data, **beside, "json": json.dumps(record, ensure_ascii=False).encode()}
    if captions:
        members["txt"] = captions[0][0].encode()
    return _Done(item, members, frames=stored.frames)


def _partners(item: Item, stored: _Stored, config: BuildConfig) -> dict[str, bytes]:
    """The members of an item's partners: condition.png, mask.png, ..."""
    members: dict[str, bytes] = {}
    clear = config.masks == "transparent"
    for called, place in item.partners.items():
        members |= packed(
            called, read_place(place), stored.original, stored.size, stored.target, clear, max_pixels=config.max_pixels
        )
    for called in [pair for pair, where in config.pairs.items() if where == ALPHA]:
        members |= packed(
            called, _opacity(item, stored, config), stored.original, stored.size, stored.target, False,
            max_pixels=config.max_pixels,
        )  # fmt: skip
    return members


def _opacity(item: Item, stored: _Stored, config: BuildConfig) -> bytes:
    """The picture's opacity as a grey PNG, white where it has no transparency."""
    opacity = decode.layers(read(item), max_pixels=config.max_pixels)[1] or Image.new("L", stored.original, 255)
    buffer = io.BytesIO()
    opacity.save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class _Stored:
    """A picture as it goes into a tar, its (width, height) there and before shrinking, and what it was shrunk for."""

    extension: str
    data: bytes
    size: Shape
    original: Shape
    frames: int
    target: Shape | None = None


def _picture(data: bytes, shape: Shape | None, config: BuildConfig) -> _Stored:
    """Decodes it whole, so that damage is found now."""
    found = decode.decoded(data, max_pixels=config.max_pixels)
    upright = found.image
    original = upright.size
    if min(original) < config.min_side:
        raise BadSample("small", f"{original[0]}x{original[1]}, short side under {config.min_side}")
    target = shape or (None if config.size is None else (config.size, config.size))
    shrink = target is not None and original[0] > target[0] and original[1] > target[1]
    if config.format == "keep" and not shrink and found.plain and found.format in _EXTENSION:
        return _Stored(_EXTENSION[found.format], data, original, original, found.frames)
    if target is not None and shrink:
        upright = images.resize(upright, target, "crop")
    extension = "jpg" if config.format == "keep" else config.format
    buffer = io.BytesIO()
    if extension == "jpg":
        upright.save(buffer, "JPEG", quality=config.quality, subsampling=0)
    elif extension == "webp":
        upright.save(buffer, "WEBP", quality=config.quality, method=4)
    else:
        upright.save(buffer, "PNG")
    return _Stored(extension, buffer.getvalue(), upright.size, original, found.frames, target if shrink else None)
