"""Where a token is: patches of pixels and back, the table of sines and cosines, rotary positions.

Legend: B batch, C channels, H, W latent pixels, P side of a patch, h, w patches, N = hw image tokens, T text tokens,
D width, R width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.models.layers import tokens

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines (S, 1, R/2) of the angles by which each of S tokens turns the pairs of a head's channels."""


class PatchEmbed(nn.Module):
    """Patches of P x P pixels through one Linear (a convolution with stride P) plus the table of their positions.

    With `max_size` the table of max_size x max_size patches is kept with the weights and its centre is used (Esser et
    al. 2024, arXiv 2403.03206, appendix); without, it is computed for every size. `base` is the number of patches along
    a side at which coordinates are `base` numbers from 0, divided by `interpolation`, whatever the size.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        patch: int,
        base: int,
        interpolation: float = 1.0,
        max_size: int | None = None,
    ) -> None:
        super().__init__()
        self.base, self.interpolation, self.max_size = base, interpolation, max_size
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        if max_size is not None:
            self.register_buffer("pos_embed", position_table(max_size, max_size, width, base=base)[None])

    def forward(self, x: Tensor, averaged: int = 1) -> Tensor:
        """(B, C, H, W) -> (B, N, D); of means of `averaged` x `averaged` pixels, with the means of the positions.

        Raises ValueError for a picture larger than the table.
        """
        x = self.proj(x)
        h, w = x.shape[2:]
        if averaged == 1:
            return (tokens(x) + self._table(h, w, x.device)).to(x.dtype)
        whole = self._table(h * averaged, w * averaged, x.device).float().view(h, averaged, w, averaged, -1)
        return (tokens(x) + whole.mean((1, 3)).flatten(0, 1)).to(x.dtype)

    def check_patches(self, h: int, w: int) -> None:
        """Raise ValueError for more patches along a side than the table has."""
        if self.max_size is not None and max(h, w) > self.max_size:
            raise ValueError(f"{h}x{w} patches are more than pos_embed_max_size {self.max_size} along a side")

    def _table(self, h: int, w: int, device: torch.device) -> Tensor:
        """(N, D) or (1, N, D), in float32 where it is not kept with the weights."""
        size = self.max_size
        if size is None:
            width = self.proj.out_channels
            return position_table(h, w, width, base=self.base, interpolation=self.interpolation, device=device)
        self.check_patches(h, w)
        top, left = (size - h) // 2, (size - w) // 2
        table = self.get_buffer("pos_embed").unflatten(1, (size, size))
        return table[:, top : top + h, left : left + w].flatten(1, 2)


def position_table(
    h: int, w: int, width: int, *, base: int, interpolation: float = 1.0, device: torch.device | None = None
) -> Tensor:
    """Sines, then cosines of column and row, each D/2 channels, (N, D) in float32.

    Coordinates run from 0 towards `base` / `interpolation` whatever h and w are; they are rounded to float32 first, as
    they were when the published weights were trained, angles are float64.
    """
    power = torch.arange(width // 4, dtype=torch.float64, device=device) / (width / 4)
    omega = 1.0 / 10000**power

    def axis(count: int) -> Tensor:
        place = torch.arange(count, dtype=torch.float32, device=device) / (count / base) / interpolation
        angle = torch.outer(place.double(), omega)
        return torch.cat([angle.sin(), angle.cos()], dim=-1).float()

    columns, rows = axis(w)[None].expand(h, w, -1), axis(h)[:, None].expand(h, w, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def from_patches(x: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """(B, N, P*P*C), channels last within a patch, -> (B, C, H, W) for `size` = (H, W)."""
    b, h, w = x.shape[0], size[0] // patch, size[1] // patch
    return x.view(b, h, w, patch, patch, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, *size)


def pack(x: Tensor, patch: int = 2) -> Tensor:
    """(B, C, H, W) -> (B, N, C*P*P), channels first within a patch (FLUX's order)."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def unpack(x: Tensor, size: tuple[int, int], patch: int = 2) -> Tensor:
    """The reverse of `pack`, for `size` = (H, W)."""
    b, h, w = x.shape[0], size[0] // patch, size[1] // patch
    return x.view(b, h, w, -1, patch, patch).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, *size)


def rotary_positions(
    h: int,
    w: int,
    text: int,
    axes: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    averaged: int = 1,
) -> Rotary:
    """Of `text` tokens at (0, 0, 0) and of patches at (0, row, column) after them (Su et al. 2021, arXiv 2104.09864).

    `axes` are the channels of a head that each coordinate turns; `averaged` as in `middles`. Angles are float64; the
    result is float32, or float64 for that `dtype`.
    """
    where = torch.device("cpu") if device.type == "mps" else device  # which has no float64

    def turns(count: int, width: int) -> Tensor:
        theta = 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64, device=where) / width)
        return middles(torch.arange(count, dtype=torch.float64, device=where), averaged)[:, None] / theta

    rows, columns = turns(h, axes[1]), turns(w, axes[2])
    still = rows.new_zeros(1, axes[0] // 2)
    parts = [
        still[:, None].expand(h, w, -1),
        rows[:, None].expand(h, w, -1),
        columns[None].expand(h, w, -1),
    ]
    angles = torch.cat(parts, dim=-1).flatten(0, 1)
    angles = torch.cat([angles.new_zeros(text, angles.shape[1]), angles])[:, None]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(device, wide), angles.sin().to(device, wide)


def middles(places: Tensor, averaged: int) -> Tensor:
    """Rows or columns of the middles of squares of `averaged` patches, counted in patches of the whole picture."""
    return places if averaged == 1 else places * averaged + (averaged - 1) / 2


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """Neighbouring channels of (B, S, heads, R) turned in pairs, in float32 at least; given in the type of x."""
    cos, sin = rotary
    first, second = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)
