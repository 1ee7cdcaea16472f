"""Further pictures of a sample, its partners: conditions, masks, the picture before an edit, a small version, a style.

They are stored beside its picture, or made of it. What reaches a loss is one tensor for each, by its name, float32 in
[0, 1], cropped and flipped as the picture is; from a cache of latents the moments instead, as `NAME.moments`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ldm.config.load import decode
from ldm.data import masks
from ldm.data.canny import canny
from ldm.data.images import crop_box, resize

Cache = Literal["pixels", "latents"]
Channels = Literal[1, 3]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A picture stored beside the sample's: member `KEY.member.png`, of any picture's suffix.

    `member` is the pair's own name where it is not told. "nearest" keeps the values of maps of classes as they are.
    """

    kind: Literal["stored"] = "stored"
    member: str | None = None
    filter: Literal["bicubic", "nearest"] = "bicubic"
    """How the picture is resized."""
    channels: Channels = 3
    """Channels of the picture, 1 or 3."""
    cache: Cache = "pixels"
    """As what it enters a cache: its pixels, or its latents."""


@dataclass(frozen=True, kw_only=True)
class StoredMask:
    """A mask stored beside the sample's picture, white (from 128 on) where it is to be painted; resized by nearest."""

    kind: Literal["stored_mask"] = "stored_mask"
    member: str = "mask"
    """The mask's member beside the picture, `KEY.member.png`."""
    cache: Literal["pixels"] = "pixels"
    """Only pixels is taken."""


@dataclass(frozen=True, kw_only=True)
class Canny:
    """Edges of the cropped picture; thresholds as `cv2.Canny` takes them."""

    kind: Literal["canny"] = "canny"
    low: float = 100.0
    """The lower threshold, of edges that continue others."""
    high: float = 200.0
    """The upper threshold, of edges that start."""
    channels: Channels = 3
    """Channels: 1, or the same three times."""
    cache: Cache = "pixels"
    """As what it enters a cache: its pixels, or its latents."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"low {self.low} must be in [0, high], high is {self.high}")
        if self.high > 2040:
            raise ValueError(f"high {self.high} is above 2040, the strongest edge there is")


@dataclass(frozen=True, kw_only=True)
class Grey:
    """The picture's luma (BT.601)."""

    kind: Literal["grey"] = "grey"
    channels: Channels = 3
    """Channels: 1, or the same three times."""
    cache: Cache = "pixels"
    """As what it enters a cache: its pixels, or its latents."""


@dataclass(frozen=True, kw_only=True)
class Blur:
    """The picture after a Gaussian of `sigma` pixels."""

    kind: Literal["blur"] = "blur"
    sigma: float = 4.0
    cache: Cache = "pixels"
    """As what it enters a cache: its pixels, or its latents."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 256:
            raise ValueError(f"sigma must be in (0, 256], got {self.sigma}")


@dataclass(frozen=True, kw_only=True)
class Small:
    """The picture shrunk `factor` times along each side; with `enlarge` brought back to its size. Both bicubic."""

    kind: Literal["small"] = "small"
    factor: int = 4
    enlarge: bool = False
    cache: Cache = "pixels"
    """As what it enters a cache: its pixels, or its latents."""

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"factor must be at least 2, got {self.factor}")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """The picture itself, also where a cache has its latents alone; with `size` the middle square at that size.

    As image towers see it: the short side is resized (bicubic), the long one cut.
    """

    kind: Literal["picture"] = "picture"
    size: int | None = None
    cache: Cache = "pixels"
    """As what it enters a cache: its pixels, or its latents."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")


@dataclass(frozen=True, kw_only=True)
class RandomMask:
    """A mask drawn anew for each sample and epoch; the shares of its kinds, as `ldm.data.masks` tells them."""

    kind: Literal["random_mask"] = "random_mask"
    rectangles: float = 0.3
    """Share of masks of one to four rectangles."""
    strokes: float = 0.3
    """Share of masks of one to four brush strokes."""
    half: float = 0.15
    """Share of masks of one side of the picture."""
    whole: float = 0.25
    """Share of masks of the whole picture."""
    cache: Literal["pixels"] = "pixels"
    """Only pixels is taken."""

    def __post_init__(self) -> None:
        shares = {kind: vars(self)[kind] for kind in masks.KINDS}
        for kind, share in shares.items():
            if share < 0:
                raise ValueError(f"{kind} must not be negative, got {share}")
        if not sum(shares.values()):
            raise ValueError(f"one of {', '.join(shares)} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Masked:
    """The picture with grey (0.5, the middle of an autoencoder's range) where the mask of another pair is white."""

    kind: Literal["masked"] = "masked"
    mask: str = "inpaint_mask"
    """The pair whose mask is used."""
    cache: Literal["latents"] = "latents"
    """Only latents is taken."""


Pair = Stored | StoredMask | Canny | Grey | Blur | Small | Picture | RandomMask | Masked
Pairs = dict[str, Pair]
Draw = Callable[[int, str], float]
"""(row, purpose) -> a number in [0, 1) that belongs to the row's sample."""

CACHED = "pair."
"""What tensors of pairs in a cache begin with."""
NAME = re.compile(r"[a-z][a-z0-9_]*")
"""What a pair may be called."""
_TAKEN = frozenset(
    ("key", "position", "weight", "source", "caption", "image", "original_size", "crop_top_left", "target_size",
     "tokens", "moments", "features", "text", "pooled", "mask", "kv", "context", "vector", "time_ids", "concat",
     "class", "copies")
)  # fmt: skip


def check_pairs(pairs: Mapping[str, Pair], arrays: Sequence[str] = ()) -> None:
    """ValueError for a name that a batch cannot have, and for a masked picture without its mask."""
    for name, pair in pairs.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"pairs: {name!r} is no name; expected small letters, digits and _, as in condition")
        if name in _TAKEN or name in {a.rpartition(".")[0] for a in arrays}:
            hint = {"source": "; call it original", "mask": "; call it inpaint_mask"}.get(name, "; choose another")
            raise ValueError(f"pairs: {name!r} is something else in a batch{hint}")
        if isinstance(pair, Stored | Canny | Grey) and pair.cache == "latents" and pair.channels == 1:
            raise ValueError(f"pairs.{name}.channels: 1, but an autoencoder takes 3 (cache: latents)")
        if isinstance(pair, Masked) and not isinstance(pairs.get(pair.mask), StoredMask | RandomMask):
            have = sorted(n for n, p in pairs.items() if isinstance(p, StoredMask | RandomMask))
            raise ValueError(f"pairs.{name}.mask: {pair.mask!r} is no mask among the pairs; masks are {have}")


def is_random(pairs: Mapping[str, Pair]) -> bool:
    """Whether one is drawn anew each time."""
    return any(isinstance(pair, RandomMask) for pair in pairs.values())


def enough(pairs: Mapping[str, Pair], variants: int) -> int:
    """How many variants of each picture a cache shall have: where masks are random at least eight."""
    return max(variants, 8) if is_random(pairs) else variants


def make(
    pairs: Mapping[str, Pair], pixels: NDArray[np.uint8], stored: Mapping[str, NDArray[np.uint8]], draw: Draw
) -> dict[str, Tensor]:
    """Each pair's pictures (B, C, H', W') of cropped ones (B, H, W, 3): uint8, of one channel where all are equal.

    `stored` has those of stored pairs, (B, H, W, C). Masked pictures are float32 in [0, 1], as 0.5 is no uint8.
    """
    out: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        if isinstance(pair, Stored | StoredMask):
            out[name] = _planes(stored[name])
        elif not isinstance(pair, Masked):
            out[name] = _planes(np.stack([_made(pair, name, one, i, draw) for i, one in enumerate(pixels)]))
    for name, pair in pairs.items():
        if isinstance(pair, Masked):
            out[name] = torch.where(out[pair.mask] >= 128, 0.5, _planes(pixels).float().div_(255.0))
    return {name: out[name] for name in pairs}


def delivered(pair: Pair, values: Tensor) -> Tensor:
    """What a batch holds of `make`'s pictures, also of cached ones: float32 in [0, 1] of the pair's channels."""
    values = values.float().div_(255.0) if values.dtype == torch.uint8 else values
    channels = pair.channels if isinstance(pair, Stored | Canny | Grey) else values.shape[1]
    return values.expand(-1, channels, -1, -1).contiguous()


def told(data: Mapping[str, Any], where: str) -> Pair:
    """A pair by what a config says; `where` is what messages call it."""
    return decode(Pair, data, where)  # type: ignore[arg-type]


def cached_pairs(cached: Mapping[str, Any] | None) -> Pairs:
    """The pairs that a cache was made with, by what its manifest says."""
    return decode(dict[str, Pair], (cached or {}).get("pairs", {}), "cached.pairs")  # type: ignore[arg-type]


def cached_name(name: str, pair: Pair) -> str:
    """What a cache calls the tensor of a pair."""
    return CACHED + name + (".moments" if pair.cache == "latents" else "")


def delivered_cached(pairs: Mapping[str, Pair], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch's cached tensors with those of pairs by their names, and moments as `NAME.moments`."""
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(CACHED)
        out[name] = delivered(pairs[name], value) if key.startswith(CACHED) and name in pairs else value
    return out


def _planes(rows: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(rows.transpose(0, 3, 1, 2)))


def _made(pair: Pair, name: str, pixels: NDArray[np.uint8], row: int, draw: Draw) -> NDArray[np.uint8]:
    """(H', W', C) of a picture (H, W, 3)."""
    height, width = pixels.shape[:2]
    if isinstance(pair, Canny):
        return canny(pixels, pair.low, pair.high)[:, :, None]
    if isinstance(pair, Grey):
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[:, :, None]
    if isinstance(pair, RandomMask):
        own = {kind: vars(pair)[kind] for kind in masks.KINDS}
        kind = _chosen(own, draw(row, f"pair {name} kind"))
        return masks.random_mask(kind, (width, height), lambda purpose: draw(row, f"pair {name} {purpose}"))[:, :, None]
    if isinstance(pair, Picture):
        if pair.size is None:
            return pixels
        image = resize(Image.fromarray(np.ascontiguousarray(pixels)), (pair.size, pair.size), "crop")
        left, top = crop_box(image.size, (pair.size, pair.size), (0.5, 0.5))
        return np.asarray(image)[top : top + pair.size, left : left + pair.size]
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].float()
    if isinstance(pair, Blur):
        planes = _blurred(planes, pair.sigma)
    else:
        assert isinstance(pair, Small)
        if height % pair.factor or width % pair.factor:
            raise ValueError(f"pairs.{name}.factor: {pair.factor} does not divide pictures of {width}x{height} pixels")
        planes = _resized(planes, (height // pair.factor, width // pair.factor))
        planes = _resized(planes, (height, width)) if pair.enlarge else planes
    return planes[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


def _chosen(shares: Mapping[str, float], u: float) -> str:
    """A kind by its share, for u in [0, 1)."""
    left = u * sum(shares.values())
    for kind, share in shares.items():
        left -= share
        if left < 0:
            return kind
    return max(shares, key=lambda kind: shares[kind])


def _resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Rounded to levels, as a stored picture would be."""
    return functional.interpolate(planes, size=size, mode="bicubic", antialias=True).clamp_(0, 255).round_()


def _blurred(planes: Tensor, sigma: float) -> Tensor:
    """By a kernel to four deviations, or as far as a picture goes, down and then across; borders are mirrored."""
    reach = min(int(4 * sigma + 0.5), *(n - 1 for n in planes.shape[-2:]))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(planes.shape[1], 1, 1, 1)
    planes = functional.pad(planes, (reach,) * 4, mode="reflect")
    planes = functional.conv2d(planes, kernel.transpose(2, 3), groups=len(kernel))
    return functional.conv2d(planes, kernel, groups=len(kernel))
