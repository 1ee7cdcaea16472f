"""Blocks that the U-Net and the autoencoder share, with diffusers' parameter names.

Legend: B batch, C channels, H height, W width, E width of the time embedding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import onednn, winograd
from ldm.models.attention import attention
from ldm.models.frugal import norm_silu, norm_silu_conv
from ldm.models.wide import Linear, widens
from ldm.models.winograd import Transforms

LAST = 8
"""From so many channels in a group on torch's group norm is as quick on channels_last on CPUs (docs/log.md)."""
CALLS = 4
"""For fewer calls weights are not transformed, which takes about as long as a convolution."""


class GroupNorm(nn.GroupNorm):
    """Group norm that takes contiguous memory on the CPU where torch's is up to 20 times slower on channels_last.

    That is with few channels in a group, and backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self._as_it_is(x) else x.contiguous())

    def _as_it_is(self, x: Tensor) -> bool:
        if x.device.type != "cpu":
            return True
        return self.num_channels >= LAST * self.num_groups and not torch.is_grad_enabled()

    def of_part(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """The norm of a part (B, C, H, W) of a picture whose whole has this mean and variance (B, groups)."""
        each = self.num_channels // self.num_groups
        scale = (variance + self.eps).rsqrt().repeat_interleave(each, dim=1) * self.weight
        shift = self.bias - mean.repeat_interleave(each, dim=1) * scale
        return torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])


class NormSiLU(GroupNorm):
    """SiLU(GroupNorm(x)): in place where no gradient is wanted; in training only x is kept for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if self._kept_small(x):
            assert self.weight is not None
            x = x.contiguous() if x.device.type == "cpu" else x
            return norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)
        return F.silu(super().forward(x), inplace=not torch.is_grad_enabled())

    def before(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """conv(SiLU(GroupNorm(x))); in training only x is kept for the backward pass, where nothing else is asked."""
        if not self._kept_small(x) or hooked(self) or not _read_alone(conv, x):
            return conv(self(x))
        assert conv.bias is not None
        x = x.contiguous() if x.device.type == "cpu" else x
        return norm_silu_conv(x, (self.weight, self.bias), self.num_groups, self.eps, conv.weight, conv.bias)

    def _kept_small(self, x: Tensor) -> bool:
        """Not when compiled: the compiler chooses what to keep."""
        return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Conv3x3(nn.Conv2d):
    """3x3 convolution with padding 1, on the CPU as one matrix product where the weights outweigh the pixels.

    A convolution reorders its weights at every call, which at the coarse levels of wide networks takes as long as
    the products themselves (docs/log.md). Where weights stay the same for many calls (`unchanging`), wide ones are
    transformed once and take 16 products instead of 36.
    """

    transforms: Transforms | None = None

    @staticmethod
    def of(cin: int, cout: int) -> Conv3x3:
        """One from `cin` to `cout` channels. The constructor is Conv2d's, as PEFT expects of a layer's class."""
        return Conv3x3(cin, cout, 3, padding=1)

    def forward(self, x: Tensor, halved: Tensor | None = None) -> Tensor:
        """`halved` is what x doubles, by nearest neighbours, where that is to be used instead."""
        if halved is not None:
            return doubled_convolution(halved, self.weight, self.bias)
        if x.dtype == torch.float32 and plain_cpu(x):
            if self.transforms is not None and not torch.is_grad_enabled() and winograd.pays(x, self.out_channels):
                weights = self.transforms.of(self.weight)
                if weights is not None:
                    return winograd.convolve(x, weights, self.bias)
            if self.few_pixels(x):
                return self._product(x)
        if widens(x) and self.weight.dtype == x.dtype:
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)
        return super().forward(x)

    def few_pixels(self, x: Tensor) -> bool:
        """Whether the weights outweigh the pixels so far that one product is quicker on CPUs."""
        return _usual(self) and self.in_channels >= 256 and 4 * x[:, 0].numel() <= self.in_channels

    def _product(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        windows = F.pad(x, (1, 1, 1, 1)).transpose(0, 1).unfold(2, 3, 1).unfold(3, 3, 1)  # (C, B, H, W, 3, 3)
        columns = windows.permute(0, 4, 5, 1, 2, 3).reshape(9 * c, b * h * w)
        assert self.bias is not None
        weight, bias = self.weight.flatten(1), self.bias[:, None]
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            out = torch.addmm(bias, weight, columns)
        else:
            out = onednn.product(weight, columns).add_(bias)
        return out.view(-1, b, h, w).transpose(0, 1)


def _read_alone(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a 3x3 convolution of x is torch's and nobody listens to the layer, so that its weights say all.

    Where its weights train on a GPU its input is kept: to compute it again would take 4 % of a step (`ldm plan`).
    """
    if type(conv) not in (Conv3x3, nn.Conv2d) or hooked(conv) or not _usual(conv):
        return False
    if x.device.type != "cpu" and conv.weight.requires_grad:
        return False
    return not (isinstance(conv, Conv3x3) and plain_cpu(x) and conv.few_pixels(x))


def _usual(conv: nn.Conv2d) -> bool:
    """3x3, padded by 1 with zeros, with a bias."""
    sizes = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.stride == conv.dilation == (1, 1)
    return sizes and conv.groups == 1 and conv.padding_mode == "zeros" and conv.bias is not None


@contextlib.contextmanager
def unchanging(network: nn.Module, calls: int) -> Iterator[None]:
    """Inside, the network is called so many times and its weights do not change: what helps there is made once."""
    found = [m for m in network.modules() if isinstance(m, Conv3x3)] if calls >= CALLS else []
    layers = [m for m in found if "weight" in m._parameters]  # others are made whole anew at every call
    kept = Transforms()
    for layer in layers:
        layer.transforms = kept
    try:
        yield
    finally:
        for layer in layers:
            layer.transforms = None


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))); a 1x1 convolution on x where the channels change.

    With `scale_shift` the time embedding scales and shifts the second norm instead (Dhariwal & Nichol 2021).
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        *,
        groups: int,
        eps: float,
        time: int | None = None,
        scale_shift: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale_shift, self.dropout = scale_shift, dropout
        self.norm1 = NormSiLU(groups, cin, eps=eps)
        self.conv1 = Conv3x3.of(cin, cout)
        if time is not None:
            self.time_emb_proj = Linear(time, 2 * cout if scale_shift else cout)
        self.norm2 = GroupNorm(groups, cout, eps=eps) if scale_shift else NormSiLU(groups, cout, eps=eps)
        self.conv2 = Conv3x3.of(cout, cout)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """`time` (B, E) is already activated: SiLU is applied once for all blocks."""
        h = self.norm1.before(self.conv1, x)
        if time is not None and not self.scale_shift:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        if isinstance(self.norm2, NormSiLU) and not self.dropout:
            h = self.norm2.before(self.conv2, h)
        else:
            h = self.norm2(h)
            if time is not None and self.scale_shift:
                scale, shift = self.time_emb_proj(time)[:, :, None, None].chunk(2, dim=1)
                h = F.silu(h * (1 + scale) + shift)
            h = self.conv2(F.dropout(h, self.dropout, self.training) if self.dropout else h)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Convolution with stride 2; the autoencoder pads right and below only."""

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution; `size` is given where a skip connection has an odd side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3.of(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is not None or not self._transposes(x):
            return self.conv(F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=size))
        if hooked(self.conv):  # a correction of the layer wants its own input, ZeRO 3 its weights gathered
            return self.conv(F.interpolate(x, scale_factor=2.0), x)
        return doubled_convolution(x, self.conv.weight, self.conv.bias)

    def _transposes(self, x: Tensor) -> bool:
        """Where that is quicker: on the CPU, not in half precision, and not with few pixels under many weights."""
        if type(self.conv) is not Conv3x3 or not plain_cpu(x):
            return False
        return 2 * x[:, 0].numel() >= self.conv.in_channels


_SPREAD = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def doubled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 3x3 convolution, padded by 1, of (B, C, H, W) doubled by nearest neighbours, as one transposed convolution.

    Taps that fall on copies of one pixel are added beforehand: 4/9 of the products, and no doubled copy is kept.
    """
    spread = torch.einsum("ai,bj->ijab", _SPREAD, _SPREAD).reshape(9, 16).to(weight)
    folded = (weight.flatten(2) @ spread).unflatten(-1, (4, 4)).transpose(0, 1)
    return F.conv_transpose2d(x, folded, bias, stride=2, padding=1)


def plain_cpu(x: Tensor) -> bool:
    """Whether the CPU computes with x in float32 or float64, not compiled and not in a cast of its own."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    return not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")


def hooked(module: nn.Module) -> bool:
    """Whether something runs before or after the module: it has to be called then, not read."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def repeated(x: Tensor, rows: int) -> Tensor:
    """x (B, ...) in turn until there are `rows`, a multiple of B; x itself if they are there."""
    return x if x.shape[0] == rows else x.repeat(rows // x.shape[0], *[1] * (x.dim() - 1))


class SpatialAttention(nn.Module):
    """Self-attention over pixels with one norm and a residual (the autoencoder's, and the U-Net's plain blocks)."""

    def __init__(self, channels: int, *, groups: int, eps: float, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = GroupNorm(groups, channels, eps=eps)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = tokens(self.group_norm(x))
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](attention(q, k, v).flatten(2))
        return x + pixels(h, x.shape[2:])


class Embedding(nn.Module):
    """Two linear layers with SiLU between them; `extra` widens the input by a projection of a second vector."""

    def __init__(self, width: int, out: int, *, extra: int | None = None) -> None:
        super().__init__()
        self.linear_1 = Linear(width, out)
        self.cond_proj = Linear(extra, width, bias=False) if extra is not None else None
        self.linear_2 = Linear(out, out)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        if extra is not None:
            assert self.cond_proj is not None
            x = x + self.cond_proj(extra)
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoid(t: Tensor, width: int, *, cos_first: bool = True, shift: float = 0.0) -> Tensor:
    """Sines and cosines of t (N,) at geometric frequencies 1 ... 1/10000, (N, width), always in float32.

    `shift` 1 makes the last frequency 1/10000 exactly, 0 leaves it one step short. An odd width ends with a zero.
    """
    half = width // 2
    power = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angle = t.float()[:, None] * power.exp()
    parts = [angle.cos(), angle.sin()] if cos_first else [angle.sin(), angle.cos()]
    return F.pad(torch.cat(parts, dim=-1), (0, width % 2))


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C): a view of a channels_last tensor."""
    return x.flatten(2).transpose(1, 2)


def pixels(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W), contiguous on the CPU for the norms there, else a channels_last view."""
    x = x.transpose(1, 2).unflatten(2, size)
    return x.contiguous() if x.device.type == "cpu" else x


def check_groups(groups: int, channels: tuple[int, ...]) -> None:
    """Raise ValueError unless `groups` divides every width."""
    if groups < 1 or any(c % groups for c in channels):
        raise ValueError(f"norm_num_groups {groups} must divide every one of block_out_channels {list(channels)}")


def check_equal(name: str, value: object, allowed: object) -> None:
    """Raise ValueError for a setting that only has one supported value."""
    if value != allowed:
        raise ValueError(f"{name} {value!r} is not supported; only {allowed!r} is")
