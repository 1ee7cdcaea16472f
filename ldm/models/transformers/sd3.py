"""SD3 and SD3.5's transformer (Esser et al. 2024, arXiv 2403.03206) with diffusers' parameter names and config keys.

Legend: B batch, C channels, H, W latent pixels, N image tokens, T text tokens, D width, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.network import Looks
from ldm.models.transformers.base import NOTHING, Transformer, check_counts
from ldm.models.transformers.blocks import JointBlock, Modulation, TimeTextEmbedding, norm_and_modulate
from ldm.models.transformers.positions import PatchEmbed, from_patches
from ldm.models.transformers.routing import Routed
from ldm.models.wide import Linear
from ldm.types import Cond


@dataclass(frozen=True, kw_only=True)
class SD3Config:
    """The keys of diffusers' SD3Transformer2DModel `config.json`, with its defaults."""

    kind: Literal["sd3"] = "sd3"
    sample_size: int = 128
    """Side in latent pixels at which positions are counted, at least `patch_size`."""
    patch_size: int = 2
    """Latent pixels along a side of a token."""
    in_channels: int = 16
    """Channels of the latents."""
    num_layers: int = 18
    """Number of blocks."""
    attention_head_dim: int = 64
    """Channels of a head."""
    num_attention_heads: int = 18
    """Number of heads; times `attention_head_dim` it is the width."""
    joint_attention_dim: int = 4096
    """Width of the text states."""
    caption_projection_dim: int = 1152
    """The width that text is brought to: heads times `attention_head_dim`."""
    pooled_projection_dim: int = 2048
    """Width of the pooled text."""
    out_channels: int | None = 16
    """Channels of the answer; null is `in_channels`."""
    pos_embed_max_size: int = 96
    """Tokens along a side of the table of positions."""
    dual_attention_layers: tuple[int, ...] = ()
    """The blocks with a second attention, of image tokens alone, from 0."""
    qk_norm: str | None = None
    """Whether queries and keys are normalised ("rms_norm"); null is not."""

    def __post_init__(self) -> None:
        check_counts(self, "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim")
        check_counts(self, "num_attention_heads", "joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size")
        if self.out_channels is not None:
            check_counts(self, "out_channels")
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm {self.qk_norm!r} is not one of [None, 'rms_norm']")
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim {self.caption_projection_dim} must be heads x head = {self.width}"
            )
        if self.width % 4:
            raise ValueError(f"num_attention_heads x attention_head_dim must be a multiple of 4, got {self.width}")
        if self.sample_size < self.patch_size:
            raise ValueError(f"sample_size {self.sample_size} must be at least patch_size {self.patch_size}")
        for layer in self.dual_attention_layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"dual_attention_layers {layer}: there are layers 0 to {self.num_layers - 1}")

    @property
    def width(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim


class BlockResiduals(NamedTuple):
    """What is added to the image's tokens (B, N, D) after blocks: each tensor for as many blocks in turn."""

    blocks: tuple[Tensor, ...]

    def after(self, block: int, count: int) -> Tensor:
        """Of block number `block` of `count`."""
        return self.blocks[int(block / (count / len(self.blocks)))]

    def plus(self, other: BlockResiduals) -> BlockResiduals:
        """Of two control networks together."""
        return BlockResiduals(tuple(a + b for a, b in zip(self.blocks, other.blocks, strict=True)))


class SD3Encoder(Transformer):
    """Embeddings and joint blocks, which the transformer and the networks that control it share; abstract."""

    groups: ClassVar = {
        "attention": r"\.attn2?\.",
        "time": r"^time_text_embed|norm",
        "feed_forward": r"\.ff",
        "projection": r"^(pos_embed|context_embedder|proj_out)",
    }

    def __init__(self, config: Any, *, last: bool) -> None:
        """`config` has the sizes under `SD3Config`'s keys; whether the last block leaves the text behind."""
        super().__init__()
        width, patch = config.width, config.patch_size
        self.pos_embed = PatchEmbed(
            config.in_channels,
            width,
            patch=patch,
            base=config.sample_size // patch,
            max_size=config.pos_embed_max_size,
        )
        self.time_text_embed = TimeTextEmbedding(width, config.pooled_projection_dim)
        self.context_embedder = Linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(
                width,
                config.num_attention_heads,
                qk_norm=config.qk_norm is not None,
                dual=i in config.dual_attention_layers,
                last=last and i == config.num_layers - 1,
            )
            for i in range(config.num_layers)
        )

    def joined(self, cond: Cond) -> Cond:
        """CLIP's states side by side, filled up with zeros to D', then T5's tokens; the pooled vectors side by side.

        CLIP's towers are those that give a pooled vector.
        """
        if "text.0" not in cond:
            return cond
        clip = [cond[f"text.{key[7:]}"] for key in sorted(cond) if key.startswith("pooled.")]
        other = [cond[key] for key in sorted(cond) if key.startswith("text.") and f"pooled.{key[5:]}" not in cond]
        states = torch.cat(clip, dim=-1)
        states = F.pad(states, (0, self.config.joint_attention_dim - states.shape[-1]))
        text, pooled = torch.cat([states, *(o.to(states) for o in other)], dim=1), self._outputs(cond, "pooled")
        return {**self._rest(cond), "text": text, "pooled": torch.cat(pooled, dim=-1)}

    def prepared(self, cond: Cond) -> Cond:
        """With "context" (B, T, D), the projected text, and "vector" (B, D), the embedded "pooled"."""
        config, cond = self.config, self.joined(cond)
        told = self._told(cond, text=config.joint_attention_dim, pooled=config.pooled_projection_dim)
        context, vector = self.context_embedder(told["text"]), self.time_text_embed.constant(told["pooled"])
        return {**self._rest(cond, "text", "pooled"), "context": context, "vector": vector}

    def check_size(self, height: int, width: int) -> None:
        self.pos_embed.check_patches(height // self.multiple, width // self.multiple)

    @property
    def known_width(self) -> int:
        return self.config.width

    def attention_layers(self) -> Iterator[tuple[str, nn.Module, Looks]]:
        """Joint attention, and the picture's own in SD3.5 medium's first blocks."""
        for name, block in self.blocks():
            yield f"{name}.attn", block.get_submodule("attn"), "joint"
            if block.attn2 is not None:
                yield f"{name}.attn2", block.get_submodule("attn2"), "own"

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """ "transformer_blocks.0" and so on."""
        for i, block in enumerate(self.transformer_blocks):
            yield f"transformer_blocks.{i}", block


class SD3Transformer(SD3Encoder):
    """Noisy latents, times and conditioning -> velocity, noise - x_0.

    `cond`: "text" (B, T, D') and "pooled" (B, P), or what several encoders gave (see `joined`); or in their place
    "context" (B, T, D) and "vector" (B, D), which `prepared` makes of them; "concat" (B, C'', H, W), added to the
    channels. A "mask" is not used: padding is attended to, as in training. Sides are multiples of `patch_size`, up to
    `pos_embed_max_size` patches.
    """

    title = "SD3 transformer"

    def __init__(self, config: SD3Config) -> None:
        super().__init__(config, last=True)
        self.config = config
        width, patch = config.width, config.patch_size
        self.out_channels = config.out_channels or config.in_channels
        self.in_channels, self.latent_channels, self.multiple = config.in_channels, self.out_channels, patch
        self.needs, self.known = frozenset({"text", "pooled"}), "context"
        self.norm_out = Modulation(width, 2)
        self.proj_out = Linear(width, patch * patch * self.out_channels)
        self._start([self.proj_out])

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Cond,
        *,
        skip: frozenset[int] = NOTHING,
        residuals: BlockResiduals | None = None,
    ) -> Tensor:
        """t is sigma x 1000, as the scheduler gives it; `residuals` are added after the blocks, all but the last."""
        size = (x.shape[2], x.shape[3])
        x = self.pos_embed(self._latents(x, cond, self.config.in_channels), self.averaged)
        cond = self._ready(cond)
        vector, text = self._vector(self.time_text_embed, t, cond["vector"]), cond["context"]
        routed = Routed(self.routing, cond.get("route"), x.shape[1])
        for i, block in enumerate(self.transformer_blocks):
            if i not in skip:
                x, text = self._run(block, routed.enter(i, x), text, vector)
                x = routed.leave(i, x)
                if residuals is not None and i < len(self.transformer_blocks) - 1:
                    x = x + residuals.after(i, len(self.transformer_blocks))
                self.pass_by(str(i), x)
        scale, shift = self.norm_out(vector)
        return from_patches(self.proj_out(norm_and_modulate(x, shift, scale)), size, self.config.patch_size)
