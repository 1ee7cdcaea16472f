"""ControlNets of SD3 and SD3.5 medium with diffusers' parameter names and config keys (SD3ControlNetModel).

Legend: B batch, C channels, H, W pixels of the condition, h, w latent pixels, N image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm.config.load import accepts
from ldm.models import others
from ldm.models.layers import check_equal, tokens
from ldm.models.network import Network
from ldm.models.transformers.base import check_counts
from ldm.models.transformers.sd3 import BlockResiduals, SD3Config, SD3Encoder
from ldm.models.wide import Linear
from ldm.types import Cond


@accepts(others.transformer)
@dataclass(frozen=True, kw_only=True)
class SD3ControlConfig:
    """The keys of diffusers' SD3ControlNetModel `config.json`, with its defaults.

    `force_zeros_for_pooled_projection`: it is told no pooled text, and its condition's latents are not shifted.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    extra_conditioning_channels: int = 0
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    pos_embed_type: str = "sincos"
    use_pos_embed: bool = True
    force_zeros_for_pooled_projection: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim")
        check_counts(self, "num_attention_heads", "joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size")
        fixed = {"extra_conditioning_channels": 0, "pos_embed_type": "sincos", "use_pos_embed": True}
        for name, value in fixed.items():  # those of inpainting and of SD3.5 large are otherwise
            check_equal(name, getattr(self, name), value)
        check_equal("caption_projection_dim", self.caption_projection_dim, self.width)

    @property
    def width(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim

    @staticmethod
    def of(base: SD3Config, layers: int | None = None) -> SD3ControlConfig:
        """Of a ControlNet over a transformer; `layers` None: half of the base's, as of the published ones.

        Raises ValueError for as many layers as the base has, whose last one leaves the text behind.
        """
        layers = max(1, base.num_layers // 2) if layers is None else layers
        if not 1 <= layers < base.num_layers:
            raise ValueError(f"layers: {layers} is not between 1 and {base.num_layers - 1}; the base has "
                             f"{base.num_layers}, of which the last does not go on with the text")  # fmt: skip
        own = {f.name for f in fields(SD3ControlConfig)}
        told = {f.name: getattr(base, f.name) for f in fields(base) if f.name in own}
        dual = tuple(layer for layer in base.dual_attention_layers if layer < layers)
        return SD3ControlConfig(**told | {"num_layers": layers, "dual_attention_layers": dual})


class _Patches(nn.Module):
    """Patches of the condition's latents through one convolution that starts at zero."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, D)."""
        return tokens(self.proj(x))


class SD3ControlNet(SD3Encoder):
    """Noisy latents, times, text and a condition's latents -> what is added after an SD3 transformer's blocks."""

    title = "SD3 ControlNet"
    component = "controlnet"
    picture_channels: ClassVar[int] = 3
    pools: ClassVar[bool] = False
    guesses: ClassVar[bool] = False

    def __init__(self, config: SD3ControlConfig) -> None:
        super().__init__(config, last=False)
        self.config: SD3ControlConfig = config
        width = config.width
        self.in_channels, self.out_channels, self.latent_channels = config.in_channels, 0, config.in_channels
        self.multiple = config.patch_size
        self.needs, self.known = frozenset({"text", "pooled"}), "context"
        self.controlnet_blocks = nn.ModuleList(Linear(width, width) for _ in range(config.num_layers))
        self.pos_embed_input = _Patches(config.in_channels, width, config.patch_size)
        self._start(self.controlnet_blocks)
        nn.init.zeros_(self.pos_embed_input.proj.weight)

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, cond: Cond, scale: float = 1.0, *, guess: bool = False
    ) -> BlockResiduals:
        """`cond` has the condition's latents (B, C, h, w) as "condition", and the text as encoders give it."""
        told = self.joined({k: v for k, v in cond.items() if k not in ("condition", "context", "vector", "concat")})
        if self.config.force_zeros_for_pooled_projection:
            told = told | {"pooled": torch.zeros_like(told["pooled"])}
        told = self.prepared(told)
        x = self.pos_embed(self._latents(x, {}, self.config.in_channels))
        x = x + self.pos_embed_input(cond["condition"].to(x.dtype))
        vector, text = self._vector(self.time_text_embed, t, told["vector"]), told["context"]
        found = []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            x, text = self._run(block, x, text, vector)
            found.append(out(x) * scale)
        return BlockResiduals(tuple(found))

    def shown(self, pixels: Tensor, encode: Callable[[Tensor], Tensor], shift: float) -> Tensor:
        """The condition's latents of its pixels (B, 3, H, W) in [0, 1]; `encode` and `shift` are the autoencoder's.

        `shift` is times its scale.
        """
        return self.shifted(encode(2 * pixels - 1), shift)

    def shifted(self, latents: Tensor, shift: float) -> Tensor:
        """Scaled latents as this network takes them."""
        return latents + shift if self.config.force_zeros_for_pooled_projection else latents

    @staticmethod
    def copy_of(base: Network, layers: int | None = None) -> SD3ControlNet:
        """A copy of a transformer's first blocks and embeddings that adds nothing yet, where the transformer is.

        Raises ValueError for a network that is none, and as `SD3ControlConfig.of` does.
        """
        if not isinstance(base.config, SD3Config):
            raise ValueError(f"is a {base.title}, and this ControlNet is a copy of an SD3 transformer")
        made = SD3ControlNet(SD3ControlConfig.of(base.config, layers)).to(next(base.parameters()).device)
        weights, own = base.state_dict(), made.state_dict()
        made.load_state_dict(own | {k: v.float() for k, v in weights.items() if k in own}, strict=True)
        return made
