"""Transformer blocks of the U-Net, with diffusers' parameter names.

Legend: B batch, N pixels, T text tokens, C channels, D width of the text, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.models.attention import attention, probabilities
from ldm.models.frugal import geglu
from ldm.models.layers import GroupNorm, hooked, pixels, repeated, tokens
from ldm.models.wide import Linear, geglu_linear

Control = Callable[[Tensor], Tensor]
"""Attention weights (B, H, N, T) -> weights to use instead; for editing and for pictures of the attention."""


class Attention(nn.Module):
    """Multi-head attention of x on itself, or on text where `text` is its width."""

    def __init__(self, channels: int, *, heads: int, text: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(text or channels, channels, bias=False)
        self.to_v = Linear(text or channels, channels, bias=False)
        self.to_out = nn.ModuleList([Linear(channels, channels)])
        self.control: Control | None = None

    def forward(
        self, x: Tensor, text: Tensor | None = None, kv: Tensor | None = None, image: Sequence[Tensor] = ()
    ) -> Tensor:
        """`kv` (B, T, 2C) are the keys and values that `keys_values` gave for the text, instead of the text.

        `image`: others of pictures (B, N, 2C), each looked at by itself; what is found in them is added.
        """
        if kv is None:
            source = x if text is None else text
            k, v = self.to_k(source), self.to_v(source)
        else:
            k, v = kv.chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.to_q(x), k, v))  # (B, N or T, H, C/H)
        if self.control is None:
            out = attention(q, k, v)
        else:
            weights = self.control(probabilities(q.transpose(1, 2), k.transpose(1, 2)))
            out = (weights @ v.transpose(1, 2)).transpose(1, 2)
        for one in image:
            k, v = (y.unflatten(-1, (self.heads, -1)) for y in one.to(q.dtype).chunk(2, dim=-1))
            out = out + attention(q, k, v)
        return self.to_out[0](out.flatten(2))

    def keys_values(self, text: Tensor) -> Tensor:
        """(B, T, 2C)."""
        return torch.cat([self.to_k(text), self.to_v(text)], dim=-1)


class GEGLU(nn.Module):
    """a * gelu(b) of one projection (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        both = self.proj(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return geglu(both)
        value, gate = both.chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU with four times the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """In training what comes out of the gate is not kept but computed again, if that takes a GPU no longer."""
        first, last = self.net[0], self.net[2]
        if not (type(first) is GEGLU and type(last) is Linear) or hooked(first) or hooked(last):
            return last(first(x))
        pays = x.device.type == "cpu" or not last.weight.requires_grad
        if not pays or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return last(first(x))
        return geglu_linear(first.proj(x), last.weight, last.bias)


class LayerNorm(nn.LayerNorm):
    """Its width is the input's, so that what is compiled for one serves others (`Network.compiled_widths`)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, input.shape[-1:], self.weight, self.bias, self.eps)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a norm and with a residual.

    With `only_cross` the first attention is on the text too.
    """

    def __init__(self, channels: int, *, heads: int, text: int, dropout: float = 0.0, only_cross: bool = False) -> None:
        super().__init__()
        self.dropout, self.only_cross = dropout, only_cross
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, heads=heads, text=text if only_cross else None)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, heads=heads, text=text)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: Tensor, kv: Tensor | None = None, image: Sequence[Tensor] = ()) -> Tensor:
        """`kv` (B, T, 2C): the keys and values of the text, if they are known already; `image`: those of pictures.

        Of x the first rows of B will do where the others are copies: they part where they meet the text.
        """
        rows = len(text if kv is None else kv)
        if self.attn1.control is not None or self.only_cross:
            x = repeated(x, rows)
        x = x + self._drop(self.attn1(self.norm1(x), text if self.only_cross else None))
        x = repeated(x, rows)
        x = x + self._drop(self.attn2(self.norm2(x), text, kv, image))
        return x + self._drop(self.ff(self.norm3(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Transformer2D(nn.Module):
    """Pixels (B, C, H, W) as tokens through transformer blocks, with a residual around all of them."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        depth: int,
        text: int,
        groups: int,
        linear: bool,
        dropout: float = 0.0,
        only_cross: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads=heads, text=text, dropout=dropout, only_cross=only_cross)
            for _ in range(depth)
        )
        self.proj_out = Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.channels, self.recompute = channels, False

    def forward(self, x: Tensor, text: Tensor, kv: Tensor | None = None, image: Sequence[Tensor] = ()) -> Tensor:
        """`kv` (B, T, 2C a block): the keys and values of the text for all blocks, if they are known already; `image`:
        those of pictures (B, N, 2C a block)."""
        h = self.norm(x)
        h = self.proj_in(tokens(h)) if self.linear else tokens(self.proj_in(h))
        depth = len(self.transformer_blocks)
        known = [None] * depth if kv is None or not depth else kv.chunk(depth, dim=-1)
        seen = list(zip(*(one.chunk(depth, dim=-1) for one in image))) if image and depth else [()] * depth
        again = self.recompute and self.training and torch.is_grad_enabled()
        for block, own, shown in zip(self.transformer_blocks, known, seen, strict=True):
            more = (text, own, shown) if shown else (text, own)
            h = checkpoint(block, h, *more, use_reentrant=False) if again else block(h, *more)
        size = x.shape[2:]
        h = pixels(self.proj_out(h), size) if self.linear else self.proj_out(pixels(h, size))
        return repeated(x, len(h)) + h

    def keys_values(self, text: Tensor) -> Tensor:
        """Keys and values of the text for every block's cross-attention, (B, T, 2C a block)."""
        blocks = cast("Iterable[TransformerBlock]", self.transformer_blocks)
        if not len(self.transformer_blocks):
            return text.new_zeros(*text.shape[:2], 0)
        return torch.cat([block.attn2.keys_values(text) for block in blocks], dim=-1)
