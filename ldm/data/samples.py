"""Random access to decoded samples, kept in memory up to a bound: the second epoch of a small set costs a copy."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm.data import decode, images, partners
from ldm.data.arrays import decode_arrays
from ldm.data.cache import CachedReader, check
from ldm.data.captions import TEXTS, Captions, captions_of
from ldm.data.decode import BadSample
from ldm.data.manifest import Manifest
from ldm.data.pairs import Pair
from ldm.data.remote import RemoteConfig
from ldm.data.shards import Shards

_RECORD_BYTES = 2048  # assumed size of a kept caption record
_TEXT = ("json", *TEXTS)
_NO_TEXT: tuple[Captions, dict[str, Any]] = (Captions(("",), (1.0,)), {})


@dataclass(frozen=True)
class Picture:
    """A resized picture, not yet cropped: (H', W', 3) uint8; (height, width) before resizing; partners (H', W', C)."""

    pixels: NDArray[np.uint8]
    original: tuple[int, int]
    partners: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return self.pixels.nbytes + sum(p.nbytes for p in self.partners.values())


@dataclass(frozen=True)
class Crops:
    """Cropped pictures (B, H, W, 3) uint8 with SDXL's micro-conditioning, each (B, 2) float32.

    `original_size` is (height, width) before resizing, `crop_top_left` (top, left) in the resized picture. `partners`
    are the stored ones, (B, H, W, C) uint8, cut and flipped alike.
    """

    pixels: NDArray[np.uint8]
    original_size: NDArray[np.float32]
    crop_top_left: NDArray[np.float32]
    partners: dict[str, NDArray[np.uint8]] = field(default_factory=dict)


class _Recent(threading.local):
    """What one thread's current batch has decoded and memory has no room to keep."""

    def __init__(self) -> None:
        self.pictures: dict[int, Picture] = {}
        self.records: dict[int, tuple[Captions, dict[str, Any]]] = {}
        self.arrays: dict[int, dict[str, Tensor]] = {}


class Samples:
    """The samples of one split by id. Threads may share it.

    Pictures are kept as uint8 after resizing and before cropping; `memory` bounds them and the captions in bytes.
    With `buckets` a picture has its shard's shape, otherwise it is a square of `size`. Without `texts` neither captions
    nor json are read: every sample has the empty caption.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        size: int,
        fit: images.Fit = "crop",
        cached: bool = False,
        buckets: bool = False,
        memory: int = 1 << 30,
        require_captions: bool = True,
        texts: bool = True,
        arrays: Sequence[str] = (),
        pairs: Mapping[str, Pair] | None = None,
        expect: Mapping[str, Any] | None = None,
        remote: RemoteConfig | None = None,
    ) -> None:
        check(manifest, cached=cached, buckets=buckets, expect=expect)
        self.shards = Shards(manifest, split, remote)
        if buckets and any(s.bucket is None for s in self.shards.shards):
            raise ValueError(f"data.buckets: {manifest.name!r} has none; `ldm data build --buckets SIZE` makes them")
        self._size = size if manifest.cached is None else manifest.cached.get("size") or size
        self._buckets = buckets
        self._fit: images.Fit = fit
        self._require_captions = require_captions
        self._texts = texts
        self._arrays = tuple(arrays)
        self._pairs = {} if cached else partners.stored(pairs or {})
        self._members = partners.extensions(self._pairs)
        self._cache = CachedReader(self.shards, memory) if cached else None
        self._pictures: dict[int, Picture] = {}
        self._records: dict[int, tuple[Captions, dict[str, Any]]] = {}
        self._bad: dict[int, BadSample] = {}
        self._memory = self._room = memory
        self._lock = threading.Lock()
        self._recent = _Recent()

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def kept_bytes(self) -> int:
        """Bytes of kept pictures and captions, at most `memory`, and of views of cached tensors, at most as much."""
        return self._memory - self._room + (self._cache.kept_bytes if self._cache else 0)

    def key(self, sample: int) -> str:
        """The sample's key."""
        return self.shards.key(sample)

    def begin(self, samples: Sequence[int]) -> None:
        """Start a batch on this thread: forget the one before, request far samples side by side."""
        self._recent.pictures.clear()
        self._recent.records.clear()
        self._recent.arrays.clear()
        if self._cache is not None:
            self._cache.begin()
        self.shards.prefetch([s for s in samples if s not in self._pictures and s not in self._bad])

    def captions(self, sample: int) -> Captions:
        """The sample's captions."""
        return self._record(sample)[0]

    def meta(self, sample: int) -> dict[str, Any]:
        """The sample's json member."""
        return self._record(sample)[1]

    def shape(self, sample: int) -> tuple[int, int]:
        """(width, height) of the sample's crop, also of a cached one."""
        bucket = self.shards.shards[self.shards.locate(sample)[0]].bucket if self._buckets else None
        return bucket or (self._size, self._size)

    def touch(self, sample: int) -> BadSample | None:
        """What is wrong with a sample, or None; decodes it so that what follows finds it ready."""
        if sample in self._bad:
            return self._bad[sample]
        try:
            captions, _ = self._record(sample)
            if self._cache is None:
                self._picture(sample)
            else:
                self._cache.check(sample, len(captions.texts))
            if self._arrays:
                self.arrays(sample)
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
        """`crop(...)`'s pictures alone, (B, H, W, 3) uint8."""
        return self.crop(ids, crops, flips).pixels

    def crop(
        self,
        ids: Sequence[int],
        crops: Sequence[tuple[float, float]] | None = None,
        flips: Sequence[bool] | None = None,
    ) -> Crops:
        """Pictures of samples that have one shape; `crops` (x, y) in [0, 1) say where, else the centre.

        A flipped picture's left edge is the one it has in the flipped resized picture. Raises BadSample if one is bad.
        """
        width, height = self.shape(ids[0]) if ids else (self._size, self._size)
        # Planes, as resizing leaves them and as tensors want them: nothing is transposed on the way.
        out = np.empty((len(ids), 3, height, width), np.uint8).transpose(0, 2, 3, 1)
        original = np.empty((len(ids), 2), np.float32)
        corner = np.empty((len(ids), 2), np.float32)
        beside: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in self._pairs}
        for row, sample in enumerate(ids):
            picture = self._picture(sample)
            whole = picture.pixels
            where = (0.5, 0.5) if crops is None else crops[row]
            left, top = images.crop_box((whole.shape[1], whole.shape[0]), (width, height), where)
            part = whole[top : top + height, left : left + width]
            flip = flips is not None and flips[row]
            out[row] = part[:, ::-1] if flip else part
            for name, values in picture.partners.items():
                own = values[top : top + height, left : left + width]
                beside[name].append(own[:, ::-1] if flip else own)
            original[row] = picture.original
            corner[row] = (top, whole.shape[1] - width - left if flip else left)
        return Crops(out, original, corner, {name: np.stack(rows) for name, rows in beside.items() if rows})

    def arrays(self, sample: int) -> dict[str, Tensor]:
        """The sample's arrays by name. Raises BadSample."""
        known = self._recent.arrays.get(sample)
        if known is None:
            known = decode_arrays(self.shards.read(sample, only=self._arrays)[1], self._arrays)
            self._recent.arrays[sample] = known
        return known

    def cached(
        self, ids: Sequence[int], picks: Sequence[int], variants: Sequence[float]
    ) -> tuple[dict[str, Tensor], dict[int, BadSample]]:
        """The cached tensors of samples: caption number `picks`, and a variant of the picture drawn by [0, 1).

        The second value has the rows whose values are damaged.
        """
        assert self._cache is not None
        return self._cache.gather(ids, picks, variants)

    def _keep(self, size: int) -> bool:
        """Whether there is room for so many bytes more; takes it."""
        with self._lock:
            if self._room < size:
                return False
            self._room -= size
            return True

    def _record(self, sample: int) -> tuple[Captions, dict[str, Any]]:
        known = self._records.get(sample) or self._recent.records.get(sample)
        if known is not None:
            return known
        if not self._texts:
            return _NO_TEXT
        _, members = self.shards.read(sample, only=_TEXT)
        try:
            record = captions_of(members, required=self._require_captions)
        except BadSample:
            raise
        except (ValueError, TypeError, OverflowError, RecursionError) as error:  # whatever strangers' json may hold
            raise BadSample("bad_json", f"{type(error).__name__}: {error}") from error
        (self._records if self._keep(_RECORD_BYTES) else self._recent.records)[sample] = record
        return record

    def _picture(self, sample: int) -> Picture:
        known = self._pictures.get(sample) or self._recent.pictures.get(sample)
        if known is not None:
            return known
        shape = self.shape(sample)
        members = self.shards.read(sample, only=(*decode.IMAGES, *self._members))[1]
        if members.keys() <= set(self._members):  # what else there is tells why there is no picture
            members = self.shards.read(sample)[1]
        data = decode.image_member(members)
        values, (whole_width, whole_height) = decode.upright(data, at_least=shape)
        array = images.fit_pixels(values, shape, self._fit)
        whole, now = (whole_width, whole_height), (values.shape[1], values.shape[0])
        beside = partners.fitted(self._pairs, members, whole, now, shape, self._fit) if self._pairs else {}
        meta = self.meta(sample)
        width, height = meta.get("original_width"), meta.get("original_height")
        if not isinstance(width, int) or not isinstance(height, int):
            width, height = whole_width, whole_height
        picture = Picture(array, (height, width), beside)
        (self._pictures if self._keep(picture.nbytes) else self._recent.pictures)[sample] = picture
        return picture
