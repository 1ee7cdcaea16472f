"""Reads cached tensors straight into batches; a damaged member is a BadSample as a damaged picture is."""

from __future__ import annotations

import json
import math
import struct
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.decode import BadSample
from ldm.data.manifest import Manifest
from ldm.data.pairs import CACHED as CACHED_PAIR
from ldm.data.pairs import cached_name, cached_pairs
from ldm.data.scan import CACHED
from ldm.data.shards import ShardReader, Shards

MEMBER = CACHED
PER_VARIANT = ("moments", "features", "original_size", "crop_top_left")
"""Tensors with a row for each variant of the picture; those of pairs have one too."""
TARGET = "features"
"""What a manifest calls the network whose maps are cached, and a member those maps (`ldm.objectives.align`)."""
LATER = ("text_settings",)
"""What caches of versions up to 0.1 do not record."""
_DTYPES = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16, "U8": np.uint8}
_KEPT_BYTES = 128  # of a kept reference to a layout, which samples of one form share
_HEAD = 1024  # most headers are shorter
_LAYOUTS = 4096


def check(manifest: Manifest, *, cached: bool, buckets: bool = False, expect: Mapping[str, Any] | None) -> None:
    """Refuse a cache made by other weights, size or crop: ValueError says which."""
    if not cached:
        return
    if manifest.cached is None:
        raise ValueError(f"data.cached: {manifest.name!r} holds no cache; `ldm data encode` makes one")
    if manifest.cached.get("buckets", False) != buckets:
        allowed = "true" if not buckets else "false"
        raise ValueError(f"data.buckets: the cache {manifest.name!r} needs buckets: {allowed}, as it was made")
    for key, value in (expect or {}).items():
        have = manifest.cached.get(key)
        if key in LATER and key not in manifest.cached:
            raise ValueError(
                f"data {manifest.name!r}: the cache was made by an older version, which did not record {key}: the same "
                "`ldm data encode` again checks it and adds that, or says that it must be encoded anew"
            )
        if key == TARGET and have is None:
            raise ValueError(
                f"data {manifest.name!r}: task.options.align needs cached {TARGET} of {value!r}, which this cache has "
                "not; `ldm data encode --align` makes one with them"
            )
        if have != value:
            raise ValueError(
                f"data {manifest.name!r}: the cache was made with {key}={have!r}, this run has {value!r}; "
                "`ldm data encode` makes it anew"
            )


def per_variant(name: str) -> bool:
    """Whether a tensor has a row for each variant of the picture, not for each caption."""
    return name in PER_VARIANT or name.startswith(CACHED_PAIR)


def partner(name: str) -> str | None:
    """The mask that tells which tokens of a text are no padding: "mask.1" of "text.1"; None for other tensors."""
    head, dot, number = name.partition(".")
    return f"mask{dot}{number}" if head in ("text", "mask") else None


def trimmed(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A sample's texts (captions, T, D) and masks (captions, T) without what all captions share at the end and is told.

    That is padding that masks leave out, and states that are zeros: `CachedReader.gather` fills them up again, to the
    batch's longest. Other states of padding are the text's own: T5's tell them apart by their places.
    """
    out = {}
    for name, value in stored.items():
        mask = stored.get(partner(name) or "")
        if mask is not None or (partner(name) is not None and value.ndim == 3):
            told = value.any(-1) if mask is None else mask != 0
            used = told.any(0).nonzero()
            out[name] = value[:, : int(used.max()) + 1 if len(used) else 1].clone()
    return out


def any_length(name: str, stored: Collection[str], dimensions: int) -> bool:
    """Whether rows of a tensor may be of different lengths: texts (..., T, D), and masks beside them."""
    return partner(name) is not None and (dimensions == 3 or partner(name) in stored)


def as_long(values: Sequence[Tensor]) -> list[Tensor]:
    """Texts or masks (B, T, ...) filled up with zeros to the longest."""
    length = max(value.shape[1] for value in values)
    return [F.pad(v, (0, 0) * (v.ndim - 2) + (0, length - v.shape[1])) for v in values]


@dataclass(frozen=True)
class Entry:
    """A tensor of a member: its first byte there, type as numpy's, and shape (rows, ...)."""

    start: int
    dtype: Any
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    def like(self, other: Entry, *, any_length: bool = False) -> bool:
        """Whether rows are of one form; with `any_length`, but for their own length."""
        skip = 2 if any_length else 1
        return self.shape[skip:] == other.shape[skip:] and self.dtype == other.dtype


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a member are; `texts` is for how many captions it has states, None without any."""

    entries: dict[str, Entry]
    texts: int | None


class _Recent(threading.local):
    """Layouts of one thread's current batch that there was no room to keep."""

    def __init__(self) -> None:
        self.layouts: dict[int, Layout] = {}


class CachedReader:
    """Gathers cached tensors by sample id. Keeps what it knows of where they are, up to `memory` bytes."""

    def __init__(self, shards: Shards, memory: int = 100 << 20) -> None:
        self._shards = shards
        self._limit = memory // _KEPT_BYTES
        self._kept: dict[int, Layout] = {}
        self._recent = _Recent()
        self._layouts: dict[tuple[bytes, int], Layout] = {}
        made = shards.manifest.cached or {}
        self._variants: int | None = made.get("variants")
        self._needed = ["moments"] * bool(made.get("moments")) + ["text"] * bool(made.get("text_states"))
        self._needed += [TARGET] * bool(made.get(TARGET))
        self._needed_pairs = [cached_name(name, pair) for name, pair in cached_pairs(made).items()]

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept."""
        return len(self._kept) * _KEPT_BYTES

    def begin(self) -> None:
        """Start a batch on this thread: forget what the one before read beyond the bound."""
        self._recent.layouts.clear()

    def check(self, sample: int, captions: int) -> None:
        """BadSample if the sample's member is absent or damaged, or lacks states of so many captions."""
        if sample in self._kept:
            return
        layout = self._read(*self._place(sample))
        if layout.texts is not None and layout.texts < captions:
            raise BadSample("damaged", f"{MEMBER}: text states of {layout.texts} captions, there are {captions}")
        (self._kept if len(self._kept) < self._limit else self._recent.layouts)[sample] = layout

    def gather(
        self, ids: Sequence[int], picks: Sequence[int], variants: Sequence[float]
    ) -> tuple[dict[str, Tensor], dict[int, BadSample]]:
        """`moments` (B, 2Z, h, w) of a variant drawn by [0, 1) and the text tensors (B, ...) of a pick, in float32.
        Of pairs `pair.NAME` (B, C, H, W) uint8, or `pair.NAME.moments`, of the same variant.

        Of checked samples. Texts and their masks are filled up with zeros to the longest. With the moments come
        `original_size` and `crop_top_left`, (B, 2) each, as in `samples.Crops`. The second value has the rows that are
        not finite, which no encoder stored. Raises ValueError for samples that differ in shape.
        """
        places = [self._place(i) for i in ids]
        recent = self._recent.layouts
        layouts = [self._kept.get(i) or recent[i] for i in ids]
        first = layouts[0].entries
        out: dict[str, Tensor] = {}
        bad: dict[int, BadSample] = {}
        for name, entry in first.items():
            free = any_length(name, first, len(entry.shape))
            rows: list[Entry] = []
            for row, layout in enumerate(layouts):
                here = layout.entries.get(name)
                if here is None or (here is not entry and not here.like(entry, any_length=free)):
                    raise ValueError(self._differ(ids[0], ids[row], name, entry, here))
                rows.append(here)
            longest = max(rows, key=lambda here: here.row_bytes)
            values = (np.zeros if free else np.empty)((len(ids), *longest.shape[1:]), entry.dtype)
            target, whole = values.reshape(-1).view(np.uint8).data, longest.row_bytes
            for row, ((reader, index, number), here) in enumerate(zip(places, rows, strict=True)):
                size = here.row_bytes
                which = int(variants[row] * here.shape[0]) if per_variant(name) else picks[row]
                reader.fill(index, number, here.start + which * size, target[row * whole : row * whole + size])
            out[name] = _float(values)
            for row in _not_finite(out[name]):
                bad[row] = BadSample("damaged", f"{MEMBER}: {name} is not finite")
        return out, bad

    def _place(self, sample: int) -> tuple[ShardReader, int, int]:
        """The shard, the sample's number in it, and the member's number."""
        shard, index = self._shards.locate(sample)
        reader = self._shards.reader(shard)
        number = reader.find(index, MEMBER)
        if number is None:
            raise BadSample("no_cache", f"no member {MEMBER}")
        return reader, index, number

    def _read(self, reader: ShardReader, index: int, number: int) -> Layout:
        size = reader.size(number)
        head = bytearray(min(size, _HEAD))
        reader.fill(index, number, 0, memoryview(head))
        if len(head) < 8:
            raise BadSample("damaged", f"{MEMBER}: {size} bytes")
        (length,) = struct.unpack_from("<Q", head)
        if length > size - 8:
            raise BadSample("damaged", f"{MEMBER}: a header of {length} in {size} bytes")
        if length > len(head) - 8:
            head = bytearray(8 + length)
            reader.fill(index, number, 0, memoryview(head))
        header = bytes(head[8 : 8 + length])
        known = self._layouts.get((header, size))
        if known is None:
            known = self._checked(parse(header, size))
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
            self._layouts[header, size] = known
        return known

    def _checked(self, layout: Layout) -> Layout:
        """BadSample if what the manifest says is cached is not there."""
        for name in self._needed:
            if not any(key.partition(".")[0] == name for key in layout.entries):  # "text.1" of several encoders
                raise BadSample("damaged", f"{MEMBER}: no {name}; has {sorted(layout.entries)}")
        for name in self._needed_pairs:
            if name not in layout.entries:
                raise BadSample("damaged", f"{MEMBER}: no {name}; has {sorted(layout.entries)}")
        for name in layout.entries:
            have = layout.entries[name].shape[0]
            if self._variants and per_variant(name) and have != self._variants:
                raise BadSample("damaged", f"{MEMBER}: {have} variants of {name}, the manifest says {self._variants}")
        return layout

    def _differ(self, a: int, b: int, name: str, entry: Entry, other: Entry | None) -> str:
        shapes = [None if e is None else (e.shape[1:], np.dtype(e.dtype).name) for e in (entry, other)]
        keys = [self._shards.key(i) for i in (a, b)]
        return f"data: cached {name} of sample {keys[0]!r} is {shapes[0]}, of {keys[1]!r} {shapes[1]}; they must agree"


def parse(header: bytes, size: int) -> Layout:
    """The layout that the json header of a safetensors member of `size` bytes tells; BadSample if it cannot be."""
    try:
        tree = json.loads(header)
        first = 8 + len(header)
        entries = {}
        for name, told in tree.items():
            if name == "__metadata__":
                continue
            start, end = told["data_offsets"]
            if not all(type(n) is int for n in (start, end, *told["shape"])):
                raise ValueError(f"{name} of shape {told['shape']} at {start} to {end}")
            entry = Entry(first + start, _DTYPES[told["dtype"]], tuple(told["shape"]))
            if not (entry.shape and min(entry.shape) > 0 and start >= 0 and first + end <= size):
                raise ValueError(f"{name} of shape {entry.shape} at {start} to {end} of {size} bytes")
            if entry.shape[0] * entry.row_bytes != end - start:
                raise ValueError(f"{name} of shape {entry.shape} in {end - start} bytes")
            entries[name] = entry
        if not entries:
            raise ValueError("no tensors")
        texts = [e.shape[0] for name, e in entries.items() if not per_variant(name)]
        return Layout(entries, min(texts) if texts else None)
    except (AttributeError, ValueError, KeyError, TypeError, RecursionError) as error:  # whatever spoiled json may hold
        raise BadSample("damaged", f"{MEMBER}: {type(error).__name__}: {error}") from error


def _float(values: Any) -> Tensor:
    """float32, and uint8 as they are; uint16 are the bits of bfloat16."""
    if values.dtype == np.uint8:
        return torch.from_numpy(values)
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(values).float()


def _not_finite(values: Tensor) -> list[int]:
    """Rows that hold something not finite; a sum tells first whether to look closer."""
    flat = values.reshape(len(values), -1)
    if bool(flat.sum().isfinite()):
        return []
    return (~flat.isfinite().all(1)).nonzero().flatten().tolist()
