"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a copy of the U-Net's encoder that sees a condition picture, and
whose features are added to the U-Net's through 1x1 convolutions that start at zero. Names and keys are diffusers'.

Legend: B batch, C channels, H, W pixels of the condition, h, w latent pixels, K channels of the condition.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.load import accepts
from ldm.models import others
from ldm.models.network import Network
from ldm.models.unet.config import DOWN, UP, UNetConfig
from ldm.models.unet.encoder import Encoder, Residuals, is_image
from ldm.models.unet.unet import needs
from ldm.types import Cond

CONDITION = "condition"
"""The key of `cond` under which the picture (B, K, H, W) in [0, 1] is; in batches, too."""
ORDERS = ("rgb", "bgr")
WIDTHS = (16, 32, 96, 256)
"""Of the embedding of a condition of 8 times the latents' size."""
_ONLY = ("conditioning_channels", "controlnet_conditioning_channel_order", "conditioning_embedding_out_channels",
         "global_pool_conditions")  # fmt: skip


def _forms(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Published files carry keys of the U-Net that a ControlNet has no use for."""
    unused = ("sample_size", "dropout", "center_input_sample", "out_channels")
    return {k: v for k, v in others.unet(data, where).items() if k not in unused}


@accepts(_forms)
@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """The keys of diffusers' ControlNetModel `config.json`: those of its U-Net's encoder, and its own.

    `conditioning_channels` K; `conditioning_embedding_out_channels`: widths of the condition's embedding, each but the
    first halves its size; `controlnet_conditioning_channel_order`: rgb, or bgr, in which the channels are turned;
    `global_pool_conditions`: what is added is the mean over all places (shuffle).
    """

    in_channels: int = 4
    conditioning_channels: int = 3
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (DOWN[0], DOWN[0], DOWN[0], DOWN[1])
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    only_cross_attention: bool = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    projection_class_embeddings_input_dim: int | None = None
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = WIDTHS
    global_pool_conditions: bool = False
    addition_embed_type_num_heads: int = 64

    def __post_init__(self) -> None:
        if self.controlnet_conditioning_channel_order not in ORDERS:
            order = self.controlnet_conditioning_channel_order
            raise ValueError(f"controlnet_conditioning_channel_order {order!r} is not one of {list(ORDERS)}")
        if self.conditioning_channels < 1:
            raise ValueError(f"conditioning_channels must be at least 1, got {self.conditioning_channels}")
        widths = self.conditioning_embedding_out_channels
        if not widths or min(widths) < 1:
            raise ValueError(f"conditioning_embedding_out_channels {list(widths)}: expected positive numbers")
        _ = self.unet  # checks the keys that it shares

    @functools.cached_property
    def unet(self) -> UNetConfig:
        """The settings of the U-Net whose encoder it is; what they say of the way up means nothing."""
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _ONLY}
        up = tuple(UP[0] if kind == DOWN[0] else UP[1] for kind in reversed(self.down_block_types))
        return UNetConfig(**shared, up_block_types=up)

    @property
    def factor(self) -> int:
        """How many pixels of the condition are one latent pixel, a side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @staticmethod
    def of(unet: Any, factor: int = 8, channels: int = 3) -> ControlNetConfig:
        """Of a copy of a U-Net's encoder, for latents of 1/`factor` of the pictures' side.

        Raises ValueError for settings of another network, for a U-Net that diffusers' ControlNet cannot copy, and for a
        factor that is no power of 2.
        """
        if not isinstance(unet, UNetConfig):
            raise ValueError(f"a ControlNet is trained over a U-Net here, not over a network of kind {unet.kind!r}")
        halvings = factor.bit_length() - 1
        if factor != 1 << halvings:
            raise ValueError(f"a ControlNet needs latents of 1/2, 1/4, 1/8, ... of the pictures' side, got 1/{factor}")
        shared = {f.name: getattr(unet, f.name) for f in fields(ControlNetConfig) if f.name not in _ONLY}
        for name in ("layers_per_block", "cross_attention_dim"):
            levels = unet.per_level(name)
            if len(set(levels)) > 1:
                raise ValueError(f"{name} {list(levels)}: a ControlNet has one value for all levels")
            shared[name] = levels[0]
        if unet.time_embedding_dim not in (None, 4 * unet.block_out_channels[0]):
            raise ValueError(f"time_embedding_dim {unet.time_embedding_dim}: a ControlNet has 4 times the first width")
        widths = (WIDTHS + WIDTHS[-1:] * halvings)[: halvings + 1]
        return ControlNetConfig(**shared, conditioning_channels=channels, conditioning_embedding_out_channels=widths)


class ConditionEmbedding(nn.Module):
    """The condition (B, K, H, W) -> features (B, C, h, w), which start at zero."""

    def __init__(self, channels: int, widths: tuple[int, ...], out: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for before, after in itertools.pairwise(widths):
            self.blocks.append(nn.Conv2d(before, before, 3, padding=1))
            self.blocks.append(nn.Conv2d(before, after, 3, padding=1, stride=2))
        self.conv_out = _zero(nn.Conv2d(widths[-1], out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    """Noisy latents, times, conditioning and a condition picture -> what is added to a U-Net's skips and middle."""

    title = "ControlNet"
    component = "controlnet"
    guesses: ClassVar[bool] = True

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        self.config: ControlNetConfig = config
        self.out_channels, self.needs = 0, needs(config.unet) | {CONDITION}
        self._kv_widths = self._widths()
        widths = config.block_out_channels
        embedding = config.conditioning_embedding_out_channels
        self.controlnet_cond_embedding = ConditionEmbedding(config.conditioning_channels, embedding, widths[0])
        outs = [widths[0]]
        for level, width in enumerate(widths):
            outs += [width] * (config.layers_per_block + (level < len(widths) - 1))
        self.controlnet_down_blocks = nn.ModuleList(_zero(nn.Conv2d(width, width, 1)) for width in outs)
        self.controlnet_mid_block = _zero(nn.Conv2d(widths[-1], widths[-1], 1))

    @property
    def of_unet(self) -> UNetConfig:
        return self.config.unet

    @property
    def picture_channels(self) -> int:
        """K."""
        return self.config.conditioning_channels

    @property
    def pools(self) -> bool:
        """Whether what is added is the mean over all places."""
        return self.config.global_pool_conditions

    def shown(self, pixels: Tensor, encode: Callable[[Tensor], Tensor], shift: float) -> Tensor:
        """What it takes of a condition's pixels (B, K, H, W) in [0, 1]: themselves."""
        return pixels

    @staticmethod
    def copy_of(unet: Network, factor: int = 8, channels: int = 3) -> ControlNet:
        """A copy of a U-Net's encoder and middle that adds nothing yet, where the U-Net is.

        `factor`: pixels of the pictures' side for one of the latents'; `channels` K of the condition. Raises ValueError
        for a network that is none, and as `ControlNetConfig.of` does.
        """
        made = ControlNet(ControlNetConfig.of(unet.config, factor, channels))
        made = made.to(next(unet.parameters()).device)
        weights, own = unet.state_dict(), made.state_dict()
        made.load_state_dict(own | {k: v.float() for k, v in weights.items() if k in own}, strict=True)
        return made

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, cond: Cond, scale: float = 1.0, *, guess: bool = False
    ) -> Residuals:
        """What a U-Net of the same family is given for the same x, t and cond, times `scale`.

        `cond` has the picture, (B, K, H, W) in [0, 1], as "condition". `guess`: from a tenth of the scale at the finest
        skip to all of it in the middle, evenly on a logarithmic grid. Raises ValueError for a picture of other channels
        or of another size.
        """
        self.check(cond, x)
        dropped = {"kv", "guidance", *(["concat"] if x.shape[1] == self.in_channels else [])}
        told = {k: v for k, v in cond.items() if k not in dropped and not is_image(k)}
        mid, skips, *_ = self._halfway(x, t, told)
        down = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        found = [*down, self.controlnet_mid_block(mid)]
        if self.config.global_pool_conditions:
            found = [part.mean((2, 3), keepdim=True) * scale for part in found]
        elif guess:
            found = [part * (scale * share) for part, share in zip(found, _shares(len(found)))]
        elif scale != 1:
            found = [part * scale for part in found]
        return Residuals(tuple(found[:-1]), found[-1])

    def check(self, cond: Cond, x: Tensor) -> None:
        """Raise ValueError unless `cond` has a picture of this network's channels, and of the size of x."""
        if CONDITION not in cond:
            raise ValueError(f"this ControlNet needs a picture as cond {CONDITION!r}; got {sorted(cond)}")
        _, channels, *size = cond[CONDITION].shape
        if channels != self.config.conditioning_channels:
            takes = self.config.conditioning_channels
            raise ValueError(f"{CONDITION}: a picture of {channels} channels, but this ControlNet takes {takes}")
        want = [self.config.factor * side for side in x.shape[2:]]
        if size != want:
            raise ValueError(f"{CONDITION}: a picture of {size[0]} x {size[1]} pixels, expected {want[0]} x {want[1]}")

    def _entered(self, x: Tensor, cond: Cond) -> Tensor:
        picture = cond[CONDITION].to(x.dtype)
        if self.config.controlnet_conditioning_channel_order == "bgr":
            picture = picture.flip(1)
        return x + self.controlnet_cond_embedding(picture)


def _shares(count: int) -> list[float]:
    """From 0.1 to 1."""
    return [10 ** (i / (count - 1) - 1) for i in range(count)]


def _zero(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
