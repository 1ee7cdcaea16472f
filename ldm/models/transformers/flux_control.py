"""ControlNets of FLUX.1 with diffusers' parameter names and config keys (FluxControlNetModel).

Legend: B batch, C channels, H, W pixels of the condition, h, w latent pixels, N image tokens, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm.config.load import accepts
from ldm.models import others
from ldm.models.layers import check_equal
from ldm.models.transformers.base import check_counts
from ldm.models.transformers.flux import PATCH, FluxEncoder, FluxResiduals
from ldm.models.transformers.positions import pack, rotary_positions
from ldm.models.wide import Linear
from ldm.types import Cond


@accepts(others.transformer)
@dataclass(frozen=True, kw_only=True)
class FluxControlConfig:
    """The keys of diffusers' FluxControlNetModel `config.json`, with its defaults."""

    patch_size: int = 1
    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    num_mode: int | None = None
    conditioning_embedding_channels: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
        for name, value in {"patch_size": 1, "num_mode": None, "conditioning_embedding_channels": None}.items():
            check_equal(name, getattr(self, name), value)  # unions and XLabs' are otherwise
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(f"axes_dims_rope {list(self.axes_dims_rope)} must add up to {self.attention_head_dim}")

    @property
    def width(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim


class FluxControlNet(FluxEncoder):
    """Noisy latents, times, text and a condition's latents -> what is added after a FLUX.1 transformer's blocks."""

    title = "FLUX.1 ControlNet"
    component = "controlnet"
    picture_channels: ClassVar[int] = 3
    pools: ClassVar[bool] = False
    guesses: ClassVar[bool] = False

    def __init__(self, config: FluxControlConfig) -> None:
        super().__init__(config)
        self.config: FluxControlConfig = config
        width = config.width
        self.in_channels, self.out_channels = config.in_channels // PATCH**2, 0
        self.latent_channels, self.multiple = self.in_channels, PATCH
        self.needs = frozenset({"text", "pooled"} | ({"guidance"} if config.guidance_embeds else set()))
        self.known = "context"
        self.controlnet_blocks = nn.ModuleList(Linear(width, width) for _ in range(config.num_layers))
        self.controlnet_single_blocks = nn.ModuleList(Linear(width, width) for _ in range(config.num_single_layers))
        self.controlnet_x_embedder = Linear(config.in_channels, width)
        self._start([*self.controlnet_blocks, *self.controlnet_single_blocks, self.controlnet_x_embedder])

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, cond: Cond, scale: float = 1.0, *, guess: bool = False
    ) -> FluxResiduals:
        """`cond` has the condition's latents (B, C, h, w) as "condition", and the text as encoders give it."""
        unused = {"condition", "context", "vector", "concat"} | (set() if self.config.guidance_embeds else {"guidance"})
        told = self.prepared({k: v for k, v in cond.items() if k not in unused})
        vector, text = self._vector(self.time_text_embed, t, told["vector"]), told["context"]
        x = self._latents(x, {}, self.in_channels)
        count, (h, w) = text.shape[1], (x.shape[2] // PATCH, x.shape[3] // PATCH)
        rotary = rotary_positions(h, w, count, self.config.axes_dims_rope, x.device, x.dtype, self.averaged)
        shown = pack(cond["condition"].to(x.dtype), PATCH)
        x = self.x_embedder(pack(x, PATCH)) + self.controlnet_x_embedder(shown)
        joint, single = [], []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            x, text = self._run(block, x, text, vector, rotary)
            joint.append(out(x) * scale)
        x = torch.cat([text, x], dim=1)
        for block, out in zip(self.single_transformer_blocks, self.controlnet_single_blocks, strict=True):
            x = self._run(block, x, vector, rotary)
            single.append(out(x[:, count:]) * scale)
        return FluxResiduals(tuple(joint), tuple(single))

    def shown(self, pixels: Tensor, encode: Callable[[Tensor], Tensor], shift: float) -> Tensor:
        """The condition's latents of its pixels (B, 3, H, W) in [0, 1]."""
        return encode(2 * pixels - 1)
