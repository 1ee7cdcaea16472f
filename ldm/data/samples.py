"""Random access to decoded samples, kept in memory up to a bound: the second epoch of a small set costs a copy."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm.data import decode, images
from ldm.data.cache import MEMBER, CachedReader, check
from ldm.data.captions import Captions, captions_of
from ldm.data.decode import BadSample
from ldm.data.manifest import Manifest
from ldm.data.remote import RemoteConfig
from ldm.data.shards import Shards

_RECORD_BYTES = 2048  # assumed size of a kept caption record
_NOT_TEXT = frozenset({*decode.IMAGES, MEMBER})


class Samples:
    """The samples of one split by id. Threads may share it.

    Pictures are kept as uint8 after resizing and before cropping; `memory` bounds them and the captions in bytes.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        size: int,
        fit: images.Fit = "crop",
        cached: bool = False,
        memory: int = 1 << 30,
        require_captions: bool = True,
        expect: Mapping[str, Any] | None = None,
        remote: RemoteConfig | None = None,
    ) -> None:
        check(manifest, cached=cached, expect=expect)
        self.shards = Shards(manifest, split, remote)
        self._size = size
        self._fit: images.Fit = fit
        self._require_captions = require_captions
        self._cache = CachedReader(self.shards) if cached else None
        self._pictures: dict[int, NDArray[np.uint8]] = {}
        self._records: dict[int, tuple[str, Captions, dict[str, Any]]] = {}
        self._bad: dict[int, BadSample] = {}
        self._room = memory
        self._recent: threading.local = threading.local()

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, sample: int) -> str:
        """The sample's key."""
        return self.shards.key(sample)

    def prefetch(self, samples: Sequence[int]) -> None:
        """Request far samples that are not kept side by side, so that a batch waits once."""
        self.shards.prefetch([s for s in samples if s not in self._pictures and s not in self._bad])

    def captions(self, sample: int) -> Captions:
        """The sample's captions."""
        return self._record(sample)[1]

    def meta(self, sample: int) -> dict[str, Any]:
        """The sample's json member."""
        return self._record(sample)[2]

    def touch(self, sample: int) -> BadSample | None:
        """What is wrong with a sample, or None; decodes it so that what follows finds it ready."""
        if sample in self._bad:
            return self._bad[sample]
        try:
            self._record(sample)
            if self._cache is None:
                self._picture(sample)
        except BadSample as error:
            self._bad[sample] = error
            return error
        return None

    def pixels(
        self,
        ids: Sequence[int],
        crops: Sequence[tuple[float, float]] | None = None,
        flips: Sequence[bool] | None = None,
    ) -> NDArray[np.uint8]:
        """(B, size, size, 3) uint8; `crops` in [0, 1) say where to crop, else the centre. BadSample if one is bad."""
        out = np.empty((len(ids), self._size, self._size, 3), np.uint8)
        for row, sample in enumerate(ids):
            whole = self._picture(sample)
            if whole.shape[:2] != (self._size, self._size):
                where = (0.5, 0.5) if crops is None else crops[row]
                left, top = images.crop_box((whole.shape[1], whole.shape[0]), (self._size, self._size), where)
                whole = whole[top : top + self._size, left : left + self._size]
            out[row] = whole[:, ::-1] if flips is not None and flips[row] else whole
        self._recent.pictures = {}
        return out

    def cached(self, ids: Sequence[int], picks: Sequence[int], variants: Sequence[float]) -> dict[str, Tensor]:
        """The cached tensors of samples: caption number `picks`, and a variant of the picture drawn by [0, 1)."""
        assert self._cache is not None
        return self._cache.gather(ids, picks, variants)

    def _record(self, sample: int) -> tuple[str, Captions, dict[str, Any]]:
        if (known := self._records.get(sample)) is not None:
            return known
        key, members = self.shards.read(sample, without=_NOT_TEXT)
        captions, meta = captions_of(members, required=self._require_captions)
        record = (key, captions, meta)
        if self._room >= _RECORD_BYTES:
            self._room -= _RECORD_BYTES
            self._records[sample] = record
        return record

    def _picture(self, sample: int) -> NDArray[np.uint8]:
        if (known := self._pictures.get(sample)) is not None:
            return known
        recent: dict[int, NDArray[np.uint8]] = self._recent.__dict__.setdefault("pictures", {})
        if sample in recent:
            return recent[sample]
        _, members = self.shards.read(sample, only=decode.IMAGES)
        image = decode.picture(decode.image_member(members), at_least=self._size)
        array = images.pixels(images.resize(image, (self._size, self._size), self._fit))
        if self._room >= array.nbytes:
            self._room -= array.nbytes
            self._pictures[sample] = array
        else:
            recent[sample] = array  # until this thread's batch is assembled
        return array
