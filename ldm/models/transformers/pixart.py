"""PixArt's transformer (arXiv 2310.00426, 2403.04692) with diffusers' parameter names and config keys.

Legend: B batch, C channels, H, W latent pixels, N image tokens, T text tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import Embedding, check_equal, sinusoid
from ldm.models.network import Looks
from ldm.models.transformers.base import NOTHING, Transformer, check_counts
from ldm.models.transformers.blocks import TIME, Attention, FeedForward, TextProjection, norm_and_modulate
from ldm.models.transformers.positions import PatchEmbed, from_patches
from ldm.models.transformers.routing import Routed
from ldm.models.wide import Linear
from ldm.types import Cond

_FIXED = {
    "dropout": 0.0,
    "activation_fn": "gelu-approximate",
    "upcast_attention": False,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "attention_type": "default",
}


@dataclass(frozen=True, kw_only=True)
class PixArtConfig:
    """The keys of diffusers' PixArtTransformer2DModel `config.json`, with its defaults.

    `norm_num_groups` and `num_embeds_ada_norm` change nothing, in diffusers neither. Keys that only take one value here
    are checked. `interpolation_scale` None is sample_size / 64, `use_additional_conditions` None is sample_size == 128.
    """

    kind: Literal["pixart"] = "pixart"
    num_attention_heads: int = 16
    """Number of heads; times `attention_head_dim` it is the width."""
    attention_head_dim: int = 72
    """Channels of a head."""
    in_channels: int = 4
    """Channels of the latents."""
    out_channels: int | None = 8
    """Channels of the answer, twice those of the latents with a variance; null is `in_channels`."""
    num_layers: int = 28
    """Number of blocks."""
    dropout: float = 0.0
    """Only 0.0 is taken."""
    norm_num_groups: int = 32
    cross_attention_dim: int = 1152
    """Width of the text in cross-attention: the width, where text is projected."""
    attention_bias: bool = True
    """Whether queries, keys and values have biases."""
    sample_size: int = 128
    """Side in latent pixels at which positions are counted, at least `patch_size`."""
    patch_size: int = 2
    """Latent pixels along a side of a token."""
    activation_fn: str = "gelu-approximate"
    """Only gelu-approximate is taken."""
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False
    """Only false is taken."""
    norm_type: str = "ada_norm_single"
    """Only ada_norm_single is taken."""
    norm_elementwise_affine: bool = False
    """Only false is taken."""
    norm_eps: float = 1e-6
    """Added to the variance in norms."""
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None
    """Width of the text states, which are projected; null: they are used as they are."""
    attention_type: str = "default"
    """Only default is taken."""

    def __post_init__(self) -> None:
        for name, value in _FIXED.items():
            check_equal(name, getattr(self, name), value)
        check_counts(self, "num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size")
        check_counts(self, "cross_attention_dim", "patch_size")
        for name in ("out_channels", "caption_channels"):
            if getattr(self, name) is not None:
                check_counts(self, name)
        if self.width % 4:
            raise ValueError(f"num_attention_heads x attention_head_dim must be a multiple of 4, got {self.width}")
        if self.sample_size < self.patch_size:
            raise ValueError(f"sample_size {self.sample_size} must be at least patch_size {self.patch_size}")
        if not self.interpolation > 0:
            raise ValueError(f"interpolation_scale must be above 0, got {self.interpolation_scale}")
        if self.micro and self.width % 3:
            raise ValueError(f"use_additional_conditions needs a width that is a multiple of 3, got {self.width}")
        if self.caption_channels is not None and self.cross_attention_dim != self.width:
            raise ValueError(f"cross_attention_dim {self.cross_attention_dim} must be the caption's width {self.width}")

    @property
    def width(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def interpolation(self) -> float:
        """By how much positions are squeezed."""
        return max(self.sample_size // 64, 1) if self.interpolation_scale is None else self.interpolation_scale

    @property
    def micro(self) -> bool:
        """Whether it is told resolution and aspect ratio (PixArt-alpha at 1024 pixels)."""
        asked = self.use_additional_conditions
        return self.sample_size == 128 if asked is None else asked


class TimeSizeEmbedding(nn.Module):
    """The time's embedding, and with `micro` those of the picture's resolution and aspect ratio."""

    def __init__(self, width: int, *, micro: bool) -> None:
        super().__init__()
        self.timestep_embedder = Embedding(TIME, width)
        self.resolution_embedder = Embedding(TIME, width // 3) if micro else None
        self.aspect_ratio_embedder = Embedding(TIME, width // 3) if micro else None

    def forward(self, t: Tensor, constant: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Times t (B,) or (1,) in 0 ... 1000 and what `constant` gave -> (B or 1, D)."""
        out = self.timestep_embedder(sinusoid(t.reshape(-1), TIME).to(dtype))
        return out if constant is None else out + constant

    def constant(self, resolution: Tensor, aspect_ratio: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, D) of height and width in pixels (B, 2) and height / width (B,) or (B, 1)."""
        assert self.resolution_embedder is not None
        assert self.aspect_ratio_embedder is not None
        sides = self.resolution_embedder(sinusoid(resolution.flatten(), TIME).to(dtype))
        ratio = self.aspect_ratio_embedder(sinusoid(aspect_ratio.flatten(), TIME).to(dtype))
        return torch.cat([sides.view(len(resolution), -1), ratio.view(len(resolution), -1)], dim=1)


class AdaSingle(nn.Module):
    """The conditioning vector and one modulation of it for all blocks (adaLN-single, arXiv 2310.00426, section 2.3)."""

    def __init__(self, width: int, *, micro: bool) -> None:
        super().__init__()
        self.emb = TimeSizeEmbedding(width, micro=micro)
        self.linear = Linear(width, 6 * width)

    def forward(self, t: Tensor, constant: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The modulation (B or 1, 6, D) and the vector (B or 1, D)."""
        vector = self.emb(t, constant, dtype)
        return self.linear(F.silu(vector)).unflatten(-1, (6, -1)), vector


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention without a norm before it, feed-forward; a table is added to the modulation."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        width, heads, bias = config.width, config.num_attention_heads, config.attention_bias
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn1 = Attention(width, heads, bias=bias)
        self.attn2 = Attention(width, heads, bias=bias, source=config.cross_attention_dim)
        self.ff = FeedForward(width)

    def forward(
        self, x: Tensor, modulation: Tensor, text: Tensor | None, kv: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """x (B, N, D); the text's `keys_values` may be given instead of the text."""
        parts = (self.scale_shift_table + modulation)[:, :, None].unbind(1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = parts
        x = torch.addcmul(x, gate, self.attn1(norm_and_modulate(x, shift, scale, self.eps)))
        x = x + self.attn2(x, text, kv, mask)
        return torch.addcmul(x, ff_gate, self.ff(norm_and_modulate(x, ff_shift, ff_scale, self.eps)))


class PixArtTransformer(Transformer):
    """Noisy latents, times and conditioning -> noise, and with 8 output channels the learned variance after it.

    `cond`: "text" (B, T, D'), or in its place "kv" (B, T, 2DL), the keys and values that `prepared` makes of it; "mask"
    (B, T) bool, True where a token is seen (a row without any sees all); "concat" (B, C'', H, W), after the channels.
    PixArt-alpha at 1024 pixels also needs "resolution" (B, 2), height and width in pixels, and "aspect_ratio" (B,),
    height / width, or in their place "vector" (B, D).
    """

    title = "PixArt transformer"
    groups: ClassVar = {
        "attention": r"\.attn[12]\.",
        "time": r"^adaln_single",
        "feed_forward": r"\.ff\.",
        "projection": r"^(pos_embed|proj_out)",
    }

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.out_channels = config.out_channels or config.in_channels
        self.in_channels, self.latent_channels, self.multiple = config.in_channels, config.in_channels, patch
        self.needs = frozenset({"text"} | ({"resolution", "aspect_ratio"} if config.micro else set()))
        self.known = "kv"
        base = config.sample_size // patch
        self.pos_embed = PatchEmbed(
            config.in_channels, width, patch=patch, base=base, interpolation=config.interpolation
        )
        self.transformer_blocks = nn.ModuleList(PixArtBlock(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = Linear(width, patch * patch * self.out_channels)
        self.adaln_single = AdaSingle(width, micro=config.micro)
        caption = config.caption_channels
        self.caption_projection = None if caption is None else TextProjection(caption, width)
        self._start([self.proj_out])
        self._start_like_pixart()

    def _start_like_pixart(self) -> None:
        """Cross-attention starts as none; the gates do not, they are those of the random tables."""
        small = [self.adaln_single.linear]
        if self.caption_projection is not None:
            small += [self.caption_projection.linear_1, self.caption_projection.linear_2]
        for layer in small:
            nn.init.normal_(layer.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if ".attn2.to_out." in name:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, skip: frozenset[int] = NOTHING) -> Tensor:
        """t is the index of the step in 0 ... 999, as the scheduler gives it."""
        config, size = self.config, (x.shape[2], x.shape[3])
        x = self._latents(x, cond, config.in_channels)
        dtype = x.dtype
        x = self.pos_embed(x, self.averaged)
        text, vector = None, cond.get("vector")
        if self.known not in cond:
            text, vector = self._text(cond)
        each = cond["kv"].chunk(config.num_layers, dim=-1) if text is None else [None] * config.num_layers
        mask = cond.get("mask")
        if mask is not None:
            seen = mask.bool()
            mask = (seen | ~seen.any(-1, keepdim=True))[:, None, None]
        modulation, embedded = self.adaln_single(t, vector, dtype)
        routed = Routed(self.routing, cond.get("route"), x.shape[1])
        for i, (block, kv) in enumerate(zip(self.transformer_blocks, each, strict=True)):
            if i not in skip:
                x = routed.leave(i, self._run(block, routed.enter(i, x), modulation, text, kv, mask))
                self.pass_by(str(i), x)
        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
        return from_patches(self.proj_out(norm_and_modulate(x, shift, scale)), size, config.patch_size)

    def prepared(self, cond: Cond) -> Cond:
        """With "kv" (B, T, 2DL), every cross-attention's keys and values, and "vector" (B, D) of the picture's size."""
        text, vector = self._text(cond)
        kv = []
        for block in self.transformer_blocks:
            self.fetch(block)
            kv.append(block.get_submodule("attn2").keys_values(text))  # type: ignore[operator]
        out = self._rest(cond, "text", "resolution", "aspect_ratio") | {"kv": torch.cat(kv, dim=-1)}
        return out if vector is None else out | {"vector": vector}

    def _text(self, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """The projected caption (B, T, D) and, where it is told the picture's size, its embedding."""
        config = self.config
        told = self._told(cond, text=config.caption_channels or config.cross_attention_dim)
        text, vector = told["text"], None
        if config.micro:
            vector = self.adaln_single.emb.constant(cond["resolution"], cond["aspect_ratio"], text.dtype)
        return text if self.caption_projection is None else self.caption_projection(text), vector

    @property
    def known_width(self) -> int:
        return 2 * self.config.width * self.config.num_layers

    def attention_layers(self) -> Iterator[tuple[str, nn.Module, Looks]]:
        """ "attn1" on the picture and "attn2" on the text."""
        for name, block in self.blocks():
            yield f"{name}.attn1", block.get_submodule("attn1"), "own"
            yield f"{name}.attn2", block.get_submodule("attn2"), "cross"

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """ "transformer_blocks.0" and so on."""
        for i, block in enumerate(self.transformer_blocks):
            yield f"transformer_blocks.{i}", block
