"""Small first: in the first steps latents are averaged over squares, at a fraction of the cost of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ldm.models.network import Network
from ldm.types import Cond


@dataclass(frozen=True, kw_only=True)
class SmallOptions:
    """Latents are means of `factor` x `factor` pixels, times `scale`, in the first `until` optimizer steps.

    Means have a smaller variance than what they are of: by 1 / factor for white noise in their standard deviation, by
    next to nothing for smooth pictures. `scale` undoes what is known of it; a small picture of `scale` 1 is what the
    autoencoder would decode.
    """

    until: int
    factor: int = 2
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.until < 1:
            raise ValueError(f"until must be at least 1 step, got {self.until}")
        if self.factor < 2:
            raise ValueError(f"factor must be at least 2, got {self.factor}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be above 0, got {self.scale}")


def side_at(options: SmallOptions | None, step: int) -> int:
    """Side of the squares that the step after `step` optimizer steps averages; 1 where it takes latents as they are."""
    return options.factor if options is not None and step < options.until else 1


def shrunk(options: SmallOptions, latents: Tensor, cond: Cond) -> tuple[Tensor, Cond]:
    """Latents (B, C, H, W) averaged, and the conditioning with the sizes that are told of them (SDXL).

    Raises ValueError for sides that `factor` does not divide.
    """
    check_small(options, (latents.shape[2], latents.shape[3]), 1)
    latents = options.scale * functional.avg_pool2d(latents, options.factor)
    if "time_ids" in cond:  # height and width before resizing, then corner and size of the crop, in pixels
        original, crop = cond["time_ids"].split([2, 4], dim=1)
        cond = {**cond, "time_ids": torch.cat([original, crop / options.factor], dim=1)}
    return latents, cond


def check_small(options: SmallOptions, size: tuple[int, int], multiple: int, what: str = "latents") -> None:
    """Raise ValueError unless latents of a size (H, W) can be averaged for a network of patches of `multiple`."""
    for side in size:
        if side % (options.factor * multiple):
            patches = f" in patches of {multiple}" if multiple > 1 else ""
            raise ValueError(
                f"options.small.factor: {options.factor}: {what} of {size[0]} x {size[1]} cannot be averaged over "
                f"{options.factor} x {options.factor} pixels{patches}; sides must be multiples of "
                f"{options.factor * multiple}"
            )


def can_be_small(network: Network) -> None:
    """Raise ValueError for a network that is told the pictures' size otherwise than by SDXL's numbers."""
    if "resolution" in network.needs:
        raise ValueError(
            f"options.small: this {network.title} is told the pictures' resolution, which small ones have not; write "
            "null"
        )
