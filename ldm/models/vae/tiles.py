"""Decoding in bands: on a GPU the memory of a band instead of the picture's, and exactly the picture.

A tile decoded by itself has norms of its own, and so colours of its own. Here all bands go through one layer before any
goes through the next: a norm then has the statistics of the whole picture, and a convolution sees the rows next to its
band, so that the bands meet without overlap, blending or seam. Between layers the features wait in the CPU's memory.
What works at latent resolution (attention over the whole picture) is small and is not cut.

Legend: B batch, C channels, H, W rows and columns at some resolution, h, w latent pixels, Z latent channels, K groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import GroupNorm, ResnetBlock, Upsample
from ldm.models.vae.autoencoder import Autoencoder, Level


@torch.no_grad()
def decode_tiled(model: Autoencoder, z: Tensor, tile: int) -> Tensor:
    """Unscaled latents (B, Z, h, w) -> images as `Autoencoder.decode`, in bands of `tile` x `tile` pixels' area.

    The images are in the CPU's memory. Raises ValueError for a tile under 1.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1 pixel, got {tile}")
    decoder, area = model.decoder, tile * tile
    x = decoder.mid_block(decoder.conv_in(z if model.post_quant_conv is None else model.post_quant_conv(z))).cpu()
    for block in cast("list[Level]", decoder.up_blocks):
        for resnet in cast("list[ResnetBlock]", block.resnets):
            x = _resnet(resnet, x, area)
        if block.upsamplers is not None:
            x = _upsample(cast("Upsample", block.upsamplers[0]).conv, x, area)
    return _norm_conv(decoder.conv_norm_out, decoder.conv_out, x, area)


def bands(height: int, width: int, area: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, end, first row seen, end of those seen) of bands of at most `area` pixels, and at least a row."""
    rows = max(1, area // width)
    for a in range(0, height, rows):
        b = min(a + rows, height)
        yield a, b, max(0, a - 1), min(height, b + 1)


def _resnet(block: ResnetBlock, x: Tensor, area: int) -> Tensor:
    h = _norm_conv(block.norm2, block.conv2, _norm_conv(block.norm1, block.conv1, x, area), area)
    device = block.conv1.weight.device
    for a, b, _, _ in bands(x.shape[2], x.shape[3], area):
        part = x[:, :, a:b]
        h[:, :, a:b] += part if block.conv_shortcut is None else block.conv_shortcut(part.to(device)).to(h.device)
    return h


def _norm_conv(norm: GroupNorm, conv: nn.Conv2d, x: Tensor, area: int) -> Tensor:
    """conv(silu(norm(x)))."""
    mean, variance = _statistics(norm, x, area)
    out = x.new_empty(x.shape[0], conv.out_channels, *x.shape[2:])
    for a, b, low, high in bands(x.shape[2], x.shape[3], area):
        part = norm.of_part(x[:, :, low:high].to(conv.weight.device), mean, variance)
        out[:, :, a:b] = _conv(conv, F.silu(part, inplace=True), top=low == a, bottom=high == b)
    return out


def _upsample(conv: nn.Conv2d, x: Tensor, area: int) -> Tensor:
    """conv of nearest neighbours at twice the size."""
    height, width = x.shape[2:]
    out = x.new_empty(x.shape[0], conv.out_channels, 2 * height, 2 * width)
    for first, end, low, high in bands(height, width, max(area // 4, 1)):
        part = F.interpolate(x[:, :, low:high].to(conv.weight.device), scale_factor=2.0)
        part = part[:, :, first - low : part.shape[2] - (high - end)]  # one row beyond the band on each side, not two
        out[:, :, 2 * first : 2 * end] = _conv(conv, part, top=low == first, bottom=high == end)
    return out


def _conv(conv: nn.Conv2d, x: Tensor, *, top: bool, bottom: bool) -> Tensor:
    """A 3x3 convolution with zeros beyond the picture's own edges only."""
    return F.conv2d(F.pad(x, (1, 1, int(top), int(bottom))), conv.weight, conv.bias)


def _statistics(norm: GroupNorm, x: Tensor, area: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, K) of x (B, C, H, W), summed in float64."""
    device = norm.weight.device
    total, squares = torch.zeros(2, x.shape[0], norm.num_groups, dtype=torch.float64, device=device)
    for a, b, _, _ in bands(x.shape[2], x.shape[3], area):
        part = x[:, :, a:b].to(device).unflatten(1, (norm.num_groups, -1)).flatten(2).double()
        total, squares = total + part.sum(2), squares + part.square().sum(2)
    count = x[0].numel() // norm.num_groups
    mean = total / count
    return mean.to(norm.weight.dtype), (squares / count - mean.square()).clamp(min=0).to(norm.weight.dtype)
