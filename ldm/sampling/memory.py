"""Sizes that this machine's memory cannot hold: refused where that is sure, and explained where a request fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from ldm.models.vae.latents import LatentCodec
from ldm.sampling.settings import Settings

SMALLER = "take a smaller size or batch, or tile, slices and queries (--size, --batch, --vae-tile, --attention-slice)"


def check_memory(codec: LatentCodec, size: tuple[int, int], settings: Settings, device: torch.device) -> None:
    """Raise ValueError for a size (H, W) of which not even two layers of the decoder's finest level fit.

    A size that passes may still be too much.
    """
    width = codec.autoencoder.config.block_out_channels[0]
    least = size[0] * size[1] * 4 * (3 if settings.tile is not None else 2 * width)
    cuda = device.type == "cuda"
    have = torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total
    if least > have:
        raise ValueError(
            f"size {size[0]} x {size[1]}: one picture takes at least {least / 2**30:,.0f} GiB of memory, there are "
            f"{have / 2**30:,.0f}; {SMALLER}"
        )


@contextmanager
def enough_memory(size: tuple[int, int], rows: int) -> Iterator[None]:
    """Inside, a request for memory that fails is a ValueError that says what to make smaller."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise ValueError(f"size {size[0]} x {size[1]}, {rows} at a time: not enough memory; {SMALLER}") from error
