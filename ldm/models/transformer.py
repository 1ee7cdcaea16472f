"""Transformer blocks of the U-Net, with diffusers' parameter names.

Legend: B batch, N pixels, T text tokens, C channels, D width of the text, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import attention, probabilities
from ldm.models.layers import GroupNorm, pixels, tokens

Control = Callable[[Tensor], Tensor]
"""Attention weights (B, H, N, T) -> weights to use instead; for editing and for pictures of the attention."""


class Attention(nn.Module):
    """Multi-head attention of x on itself, or on text where `text` is its width."""

    def __init__(self, channels: int, *, heads: int, text: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(text or channels, channels, bias=False)
        self.to_v = nn.Linear(text or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.control: Control | None = None

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        source = x if text is None else text
        q = self.to_q(x).unflatten(-1, (self.heads, -1))  # (B, N, H, C/H)
        k = self.to_k(source).unflatten(-1, (self.heads, -1))
        v = self.to_v(source).unflatten(-1, (self.heads, -1))
        if self.control is None:
            out = attention(q, k, v)
        else:
            weights = self.control(probabilities(q.transpose(1, 2), k.transpose(1, 2)))
            out = (weights @ v.transpose(1, 2)).transpose(1, 2)
        return self.to_out[0](out.flatten(2))


class GEGLU(nn.Module):
    """a * gelu(b) of one projection (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU with four times the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a norm and with a residual."""

    def __init__(self, channels: int, *, heads: int, text: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads=heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads=heads, text=text)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self._drop(self.attn1(self.norm1(x)))
        x = x + self._drop(self.attn2(self.norm2(x), text))
        return x + self._drop(self.ff(self.norm3(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Transformer2D(nn.Module):
    """Pixels (B, C, H, W) as tokens through transformer blocks, with a residual around all of them."""

    def __init__(
        self, channels: int, *, heads: int, depth: int, text: int, groups: int, linear: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads=heads, text=text, dropout=dropout) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.proj_in(tokens(h)) if self.linear else tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, text)
        size = x.shape[2:]
        h = pixels(self.proj_out(h), size) if self.linear else self.proj_out(pixels(h, size))
        return x + h
