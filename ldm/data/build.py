"""A folder of pictures with captions -> shards, in parallel; what cannot be used is reported, never fatal."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ldm.data import decode, images
from ldm.data.decode import BadSample
from ldm.data.manifest import Manifest, Shard
from ldm.data.sources import CaptionsFrom, Item, captions_beside, find
from ldm.data.write import ShardWriter

_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "MPO": "jpg"}
_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How shards are made. `size` shrinks the short side to it (never enlarges); None keeps the size.

    `format` "keep" stores the original bytes of upright RGB jpg, png and webp pictures that need no shrinking, and
    makes the others jpg. `heldout` is the share of samples, chosen by key, of the split "heldout". `min_side` leaves
    out smaller pictures.
    """

    size: int | None = None
    format: Literal["keep", "jpg", "png", "webp"] = "keep"
    quality: int = 95
    heldout: float = 0.0
    captions_from: CaptionsFrom = "files"
    require_captions: bool = True
    min_side: int = 1
    max_pixels: int = decode.MAX_PIXELS
    shard_bytes: int = 256 << 20
    shard_samples: int = 10_000
    workers: int = 1

    def __post_init__(self) -> None:
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
    """What became of the pictures."""

    manifest: Manifest
    found: int
    written: int
    bad: tuple[dict[str, str], ...]

    @property
    def reasons(self) -> Counter[str]:
        """Bad pictures by reason."""
        return Counter(entry["reason"] for entry in self.bad)


@dataclass(frozen=True)
class _Done:
    item: Item
    members: dict[str, bytes] | None
    problem: tuple[str, str] | None = None


def build(source: Path, out: Path, config: BuildConfig, progress: Callable[[int, int], None] | None = None) -> Report:
    """Write shards, manifest.json and quarantine.jsonl into `out`, the same for any number of workers.

    `progress` is called with (done, found). Raises ValueError if `out` holds a data set already, or if no picture can
    be used.
    """
    if (out / "manifest.json").exists():
        raise ValueError(f"out {str(out)!r} holds a data set already; choose another folder or remove it")
    items = find(source, config.captions_from)
    out.mkdir(parents=True, exist_ok=True)
    writers = {
        s: ShardWriter(out, s, split=s, max_bytes=config.shard_bytes, max_samples=config.shard_samples)
        for s in ("train", "heldout")
    }
    bad: list[dict[str, str]] = []
    written = 0
    with (out / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine:
        for number, done in enumerate(_prepare_all(items, config), 1):
            if done.members is not None:
                held = _fraction(done.item.key) < config.heldout
                writers["heldout" if held else "train"].add(done.item.key, done.members)
                written += 1
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
    manifest = Manifest(name=out.resolve().name, shards=tuple(shards), folder=out, notes={"bad": len(bad)})
    manifest.write()
    return Report(manifest, len(items), written, tuple(bad))


def _fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / (1 << 56)


def _prepare_all(items: list[Item], config: BuildConfig) -> Iterator[_Done]:
    """Prepared items in their order, with a bounded number in flight."""
    if config.workers == 1 or len(items) <= _CHUNK:
        for item in items:
            yield prepare(item, config)
        return
    chunks = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
    pool = _pool(config.workers)
    ahead: deque[tuple[list[Item], Future[list[_Done]]]] = deque()
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
                yield from (_alone(item, config) for item in chunk)
                pool = _pool(config.workers)
                ahead = deque((c, pool.submit(_prepare_chunk, c, config)) for c, _ in ahead)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, mp_context=context)


def _alone(item: Item, config: BuildConfig) -> _Done:
    """One item in a process of its own."""
    with _pool(1) as pool:
        try:
            return pool.submit(_prepare_chunk, [item], config).result()[0]
        except BrokenProcessPool:
            return _Done(item, None, ("crashed", "the process that decoded it died"))


def _prepare_chunk(items: list[Item], config: BuildConfig) -> list[_Done]:
    return [prepare(item, config) for item in items]


def prepare(item: Item, config: BuildConfig) -> _Done:
    """One item's members, or what is wrong with it."""
    try:
        if item.problem is not None:
            raise BadSample(*item.problem)
        captions = captions_beside(item)
        if not captions and config.require_captions:
            raise BadSample("no_caption", "no text in the metadata or beside the picture")
        try:
            data = item.path.read_bytes()
        except OSError as error:
            raise BadSample("unreadable", str(error)) from error
        extension, picture, size, original = _picture(data, config)
    except BadSample as error:
        return _Done(item, None, (error.reason, error.detail))
    record: dict[str, Any] = {
        **item.extra,
        "captions": [list(c) for c in captions],
        "width": size[0],
        "height": size[1],
        "original_width": original[0],
        "original_height": original[1],
    }
    if item.repeats > 1:
        record["repeats"] = item.repeats
    members = {extension: picture, "json": json.dumps(record, ensure_ascii=False).encode()}
    if captions:
        members["txt"] = captions[0][0].encode()
    return _Done(item, members)


def _picture(data: bytes, config: BuildConfig) -> tuple[str, bytes, tuple[int, int], tuple[int, int]]:
    """(extension, bytes, size, size before shrinking); decodes it whole, so that damage is found now."""
    upright = decode.picture(data, max_pixels=config.max_pixels)
    original = upright.size
    if min(original) < config.min_side:
        raise BadSample("small", f"{original[0]}x{original[1]}, short side under {config.min_side}")
    shrink = config.size is not None and min(original) > config.size
    if config.format == "keep" and not shrink:
        with Image.open(io.BytesIO(data)) as header:
            plain = header.mode == "RGB" and "transparency" not in header.info
            still = header.format != "MPO" and not getattr(header, "is_animated", False)
            if plain and still and header.format in _EXTENSION and header.getexif().get(0x0112, 1) == 1:
                return _EXTENSION[header.format], data, original, original
    if shrink:
        assert config.size is not None
        upright = images.resize(upright, (config.size, config.size), "crop")
    extension = "jpg" if config.format == "keep" else config.format
    buffer = io.BytesIO()
    if extension == "jpg":
        upright.save(buffer, "JPEG", quality=config.quality, subsampling=0)
    elif extension == "webp":
        upright.save(buffer, "WEBP", quality=config.quality, method=4)
    else:
        upright.save(buffer, "PNG")
    return extension, buffer.getvalue(), upright.size, original
