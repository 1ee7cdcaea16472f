"""FLUX.1's transformer (Black Forest Labs 2024) with diffusers' parameter names and config keys.

Legend: B batch, C channels, H, W latent pixels, N image tokens, T text tokens, D width, P width of the pooled text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import Embedding, check_equal
from ldm.models.network import Looks
from ldm.models.transformers.base import NOTHING, Transformer, check_counts
from ldm.models.transformers.blocks import (
    TIME,
    Attention,
    JointBlock,
    Modulation,
    TimeTextEmbedding,
    Vector,
    bounded,
    norm_and_modulate,
)
from ldm.models.transformers.positions import Rotary, pack, rotary_positions, unpack
from ldm.models.transformers.routing import Routed
from ldm.models.wide import Linear
from ldm.types import Cond

PATCH = 2
"""Latent pixels along a side of a token; the config's channels are those of a token."""


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """The keys of diffusers' FluxTransformer2DModel `config.json`, with its defaults.

    `in_channels` and `out_channels` count the channels of a token, 2 x 2 latent pixels; `patch_size` is always 1.
    """

    kind: Literal["flux"] = "flux"
    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    """Number of double blocks."""
    num_single_layers: int = 38
    """Number of single blocks."""
    attention_head_dim: int = 128
    """Channels of a head."""
    num_attention_heads: int = 24
    """Number of heads; times `attention_head_dim` it is the width."""
    joint_attention_dim: int = 4096
    """Width of the text states."""
    pooled_projection_dim: int = 768
    """Width of the pooled text."""
    guidance_embeds: bool = False
    """Whether the network is told the guidance strength, as FLUX.1 dev is."""
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    """Rotated channels of each axis, three even numbers that add up to `attention_head_dim`."""

    def __post_init__(self) -> None:
        check_equal("patch_size", self.patch_size, 1)
        check_counts(self, "in_channels", "num_layers", "num_single_layers", "attention_head_dim")
        check_counts(self, "num_attention_heads", "joint_attention_dim", "pooled_projection_dim")
        for name, value in (("in_channels", self.in_channels), ("out_channels", self.token_channels)):
            if value < 1 or value % PATCH**2:
                raise ValueError(f"{name} {value} must be a multiple of {PATCH**2}: tokens are 2 x 2 latent pixels")
        axes = self.axes_dims_rope
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(a < 0 or a % 2 for a in axes):
            raise ValueError(
                f"axes_dims_rope {list(axes)}: expected 3 even numbers that add up to {self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def token_channels(self) -> int:
        """Channels of a token that is given."""
        return self.in_channels if self.out_channels is None else self.out_channels


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side over text and image tokens, with one modulation and one gate."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = Modulation(width, 3)
        self.proj_mlp = Linear(width, 4 * width)
        self.proj_out = Linear(5 * width, width)
        self.attn = Attention(width, heads, qk_norm=True, out=False)

    def forward(self, x: Tensor, vector: Vector, rotary: Rotary) -> Tensor:
        """(B, T + N, D) under the activated vector (B, D)."""
        shift, scale, gate = self.norm(vector)
        h = norm_and_modulate(x, shift, scale)
        hidden = F.gelu(self.proj_mlp(h), approximate="tanh")
        both = torch.cat([self.attn(h, rotary=rotary), hidden], dim=-1)
        return bounded(torch.addcmul(x, gate, self.proj_out(both)))


class FluxResiduals(NamedTuple):
    """What is added to the image's tokens (B, N, D) after joint and single blocks: each tensor for equally many."""

    joint: tuple[Tensor, ...]
    single: tuple[Tensor, ...]

    def plus(self, other: FluxResiduals) -> FluxResiduals:
        """Of two control networks together, of which one may have nothing for some blocks."""
        return FluxResiduals(_sums(self.joint, other.joint), _sums(self.single, other.single))


def _sums(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else a or b


def _after(residuals: tuple[Tensor, ...], block: int, count: int) -> Tensor:
    """Of block number `block` of `count`."""
    return residuals[block // math.ceil(count / len(residuals))]


class FluxEncoder(Transformer):
    """Embeddings and blocks, which the transformer and the networks that control it share; abstract."""

    groups: ClassVar = {
        "attention": r"\.attn\.",
        "time": r"^time_text_embed|norm",
        "feed_forward": r"\.ff|\.proj_mlp",
        "projection": r"^(x_embedder|context_embedder|proj_out)",
    }

    def __init__(self, config: Any) -> None:
        """`config` has the sizes under `FluxConfig`'s keys."""
        super().__init__()
        width, heads = config.width, config.num_attention_heads
        self.time_text_embed = TimeTextEmbedding(width, config.pooled_projection_dim, guidance=config.guidance_embeds)
        self.context_embedder = Linear(config.joint_attention_dim, width)
        self.x_embedder = Linear(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(width, heads, qk_norm=True) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, heads) for _ in range(config.num_single_layers)
        )

    def joined(self, cond: Cond) -> Cond:
        """T5's tokens and CLIP's pooled vector."""
        if "text.1" not in cond:
            return cond
        return {**self._rest(cond), "text": cond["text.1"], "pooled": cond["pooled.0"]}

    def prepared(self, cond: Cond) -> Cond:
        """With "context" (B, T, D), the projected text, and "vector" (B, D), the embedded "pooled" and "guidance"."""
        config, cond = self.config, self.joined(cond)
        told = self._told(cond, text=config.joint_attention_dim, pooled=config.pooled_projection_dim)
        context = self.context_embedder(told["text"])
        vector = self.time_text_embed.constant(told["pooled"], cond.get("guidance"))
        return {**self._rest(cond, "text", "pooled", "guidance"), "context": context, "vector": vector}

    @property
    def known_width(self) -> int:
        return self.config.width

    def attention_layers(self) -> Iterator[tuple[str, nn.Module, Looks]]:
        """Joint in all blocks, also in the single ones."""
        for name, block in self.blocks():
            yield f"{name}.attn", block.get_submodule("attn"), "joint"

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """ "transformer_blocks.0" and so on, then "single_transformer_blocks.0" and so on."""
        for name in ("transformer_blocks", "single_transformer_blocks"):
            for i, block in enumerate(self.get_submodule(name).children()):
                yield f"{name}.{i}", block


class FluxTransformer(FluxEncoder):
    """Noisy latents, times and conditioning -> velocity, noise - x_0.

    Latents are (B, C, H, W) with even sides; tokens of 2 x 2 pixels are made and unmade inside. `cond`: "text"
    (B, T, D'), "pooled" (B, P) and, for FLUX.1 dev, "guidance" (B,), the guidance scale; or in their place "context"
    (B, T, D) and "vector" (B, D), which `prepared` makes of them; "concat" (B, C'', H, W), added to the channels
    (FLUX.1 Fill, Depth). A "mask" is not used: padding is attended to, as in training.
    """

    title = "FLUX transformer"
    guidance_is_scale: ClassVar[bool] = True

    def __init__(self, config: FluxConfig) -> None:
        super().__init__(config)
        self.config = config
        width = config.width
        self.in_channels, self.out_channels = config.in_channels // PATCH**2, config.token_channels // PATCH**2
        self.latent_channels, self.multiple = self.out_channels, PATCH
        self.needs = frozenset({"text", "pooled"} | ({"guidance"} if config.guidance_embeds else set()))
        self.known = "context"
        self.norm_out = Modulation(width, 2)
        self.proj_out = Linear(width, config.token_channels)
        self._start([self.proj_out])

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Cond,
        *,
        skip: frozenset[int] = NOTHING,
        residuals: FluxResiduals | None = None,
    ) -> Tensor:
        """t is sigma x 1000. Blocks of `skip` count from the first joint one on to the last single one.

        `residuals` are added to the image's tokens after each block.
        """
        size = (x.shape[2], x.shape[3])
        x = self._latents(x, cond, self.config.in_channels // PATCH**2)
        cond = self._ready(cond)
        vector, text = self._vector(self.time_text_embed, t, cond["vector"]), cond["context"]
        count, (h, w) = text.shape[1], (size[0] // PATCH, size[1] // PATCH)
        rotary = rotary_positions(h, w, count, self.config.axes_dims_rope, x.device, x.dtype, self.averaged)
        x = self.x_embedder(pack(x, PATCH))
        routed = Routed(self.routing, cond.get("route"), h * w)
        for i, block in enumerate(self.transformer_blocks):
            if i not in skip:
                x, text = self._run(block, routed.enter(i, x), text, vector, routed.rotary(i, rotary, count))
                x = routed.leave(i, x)
                if residuals is not None and residuals.joint:
                    x = x + _after(residuals.joint, i, len(self.transformer_blocks))
                self.pass_by(str(i), x)
        x = torch.cat([text, x], dim=1)
        for i, block in enumerate(self.single_transformer_blocks, len(self.transformer_blocks)):
            if i not in skip:
                x = self._run(block, routed.enter(i, x, count), vector, routed.rotary(i, rotary, count))
                x = routed.leave(i, x, count)
                if residuals is not None and residuals.single:
                    place, singles = i - len(self.transformer_blocks), len(self.single_transformer_blocks)
                    own = _after(residuals.single, place, singles)
                    x = torch.cat([x[:, :count], x[:, count:] + own], dim=1)
                self.pass_by(str(i), x[:, count:])
        scale, shift = self.norm_out(vector)
        return unpack(self.proj_out(norm_and_modulate(x[:, count:], shift, scale)), size, PATCH)

    @property
    def guidance_width(self) -> int | None:
        """Of FLUX.1 dev, which is told the guidance scale."""
        return TIME if self.config.guidance_embeds else None

    def told_guidance(self, width: int | None) -> FluxTransformer:
        """FLUX.1 dev's embedding is of one width; schnell's copy gets one that starts without effect."""
        if width not in (None, TIME):
            told = f"the {self.title} has no place for one of width {width}, only of {TIME}"
            raise ValueError(f"guidance_embedding: {told}")
        twin = copy.deepcopy(self).requires_grad_(True)
        if width is None or self.config.guidance_embeds:
            return twin
        like = next(self.parameters())
        embedder = Embedding(TIME, self.config.width).to(like)
        for parameter in embedder.linear_2.parameters():
            nn.init.zeros_(parameter)
        twin.time_text_embed.guidance_embedder = embedder
        twin.config, twin.needs = replace(self.config, guidance_embeds=True), self.needs | {"guidance"}
        return twin

    @property
    def side(self) -> int:
        """Of pictures of 1024 pixels, which the published files do not tell."""
        return 128
