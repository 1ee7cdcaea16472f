"""Reads cached tensors from memory-mapped shards."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.manifest import Manifest
from ldm.data.shards import Shards

MEMBER = "cache.safetensors"
PER_VARIANT = ("moments", "original_size", "crop_top_left")
_DTYPES = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16}
_VIEW_BYTES = 1024  # assumed size of a kept view


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
        if have != value:
            raise ValueError(
                f"data {manifest.name!r}: the cache was made with {key}={have!r}, this run has {value!r}; "
                "`ldm data encode` makes it anew"
            )


class CachedReader:
    """Gathers cached tensors by sample id."""

    def __init__(self, shards: Shards, memory: int = 100 << 20) -> None:
        self._shards = shards
        self._limit = memory // _VIEW_BYTES
        self._views: dict[int, dict[str, NDArray[Any]]] = {}

    @property
    def kept_bytes(self) -> int:
        """Bytes of kept views."""
        return len(self._views) * _VIEW_BYTES

    def views(self, sample: int) -> dict[str, NDArray[Any]]:
        """The tensors of a sample without a copy; bfloat16 as its uint16 bits."""
        known = self._views.get(sample)
        if known is None:
            shard, index = self._shards.locate(sample)
            known = parse(self._shards.reader(shard).view(index, MEMBER))
            if len(self._views) < self._limit:
                self._views[sample] = known
        return known

    def gather(self, ids: Sequence[int], picks: Sequence[int], variants: Sequence[float]) -> dict[str, Tensor]:
        """`moments` (B, 2Z, h, w) of a variant drawn by [0, 1) and the text tensors (B, ...) of a pick, in float32.

        With the moments come `original_size` and `crop_top_left`, (B, 2) each, as in `samples.Crops`.
        """
        rows = [self.views(i) for i in ids]
        out: dict[str, Tensor] = {}
        for name in rows[0]:
            if name in PER_VARIANT:
                parts = [r[name][int(v * len(r[name]))] for r, v in zip(rows, variants, strict=True)]
            else:
                parts = [r[name][p] for r, p in zip(rows, picks, strict=True)]
            stacked = np.stack(parts)
            if stacked.dtype == np.uint16:
                out[name] = torch.from_numpy(stacked.view(np.int16)).view(torch.bfloat16).float()
            else:
                out[name] = torch.from_numpy(stacked).float()
        return out


def parse(data: memoryview) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors member as views into it; ValueError if it is damaged."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(bytes(data[8 : 8 + length]))
        out = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                raw = data[8 + length + start : 8 + length + end]
                out[name] = np.frombuffer(raw, _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return out
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cached member is damaged: {error}") from error
