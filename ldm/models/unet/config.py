"""The settings of a U-Net: diffusers' keys, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ldm.config.load import accepts
from ldm.models import others
from ldm.models.layers import check_equal, check_groups

DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")
UP = ("CrossAttnUpBlock2D", "UpBlock2D")
CLASS_EMBEDS = (None, "timestep", "identity", "projection", "simple_projection")
_FIXED = {
    "center_input_sample": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1.0,
    "act_fn": "silu",
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
    "reverse_transformer_layers_per_block": None,
}


@accepts(others.unet)
@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The keys of diffusers' UNet2DConditionModel `config.json`; one value, or one a level from the finest.

    `attention_head_dim` is the NUMBER of heads, as it is in every published config (diffusers' naming mistake, kept in
    its files); `num_attention_heads`, if given, is used instead. Keys that only take one value here are checked.
    """

    kind: Literal["unet"] = "unet"
    sample_size: int | None = None
    """Side of the latents it was trained on; null says nothing."""
    in_channels: int = 4
    """Channels of the latents and of what is concatenated to them."""
    out_channels: int = 4
    """Channels of the answer."""
    flip_sin_to_cos: bool = True
    """Whether cosines come first in the embedding of times."""
    freq_shift: float = 0
    """Shift of the frequencies in the embedding of times."""
    down_block_types: tuple[str, ...] = (DOWN[0], DOWN[0], DOWN[0], DOWN[1])
    """CrossAttnDownBlock2D or DownBlock2D for each level."""
    mid_block_type: str = MID[0]
    """UNetMidBlock2DCrossAttn or UNetMidBlock2D."""
    up_block_types: tuple[str, ...] = (UP[1], UP[0], UP[0], UP[0])
    """CrossAttnUpBlock2D or UpBlock2D for each level."""
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of each level, from the finest."""
    layers_per_block: int | tuple[int, ...] = 2
    """Residual blocks of each level, one more on the way up."""
    dropout: float = 0.0
    """Share of dropped activations in residual blocks, 0 to 1."""
    norm_num_groups: int = 32
    """Groups of the group norms; divides every width."""
    norm_eps: float = 1e-5
    """Added to the variance in norms."""
    cross_attention_dim: int | tuple[int, ...] = 1280
    """Width of the text states."""
    transformer_layers_per_block: int | tuple[int, ...] = 1
    """Transformer blocks of each attention."""
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    """Whether transformers project by linear layers instead of 1x1 convolutions."""
    upcast_attention: bool = False
    """Whether attention scores are computed in float32."""
    resnet_time_scale_shift: str = "default"
    """default or scale_shift."""
    time_embedding_dim: int | None = None
    """Width of the embedding of times; null is four times the first level's."""
    time_cond_proj_dim: int | None = None
    """Width of a told guidance strength, of few-step students; null is none."""
    class_embed_type: str | None = None
    """timestep, identity, projection or simple_projection; null is none."""
    num_class_embeds: int | None = None
    """Number of classes, such as an upscaler's noise levels; null is none."""
    addition_embed_type: str | None = None
    """text_time, as of SDXL; null is none."""
    addition_time_embed_dim: int | None = None
    """Needed by `addition_embed_type`."""
    projection_class_embeddings_input_dim: int | None = None
    """Needed by the projections of `class_embed_type` and by `addition_embed_type`."""
    center_input_sample: bool = False
    """Only false is taken."""
    downsample_padding: int = 1
    """Only 1 is taken."""
    mid_block_scale_factor: float = 1.0
    """Only 1.0 is taken."""
    act_fn: str = "silu"
    """Only silu is taken."""
    encoder_hid_dim: int | None = None
    """Only null is taken."""
    encoder_hid_dim_type: str | None = None
    """Only null is taken."""
    only_cross_attention: bool | tuple[bool, ...] = False
    """Whether transformers attend to the text twice, and never to the picture itself."""
    dual_cross_attention: bool = False
    """Only false is taken."""
    resnet_skip_time_act: bool = False
    """Only false is taken."""
    resnet_out_scale_factor: float = 1.0
    """Only 1.0 is taken."""
    time_embedding_type: str = "positional"
    """Only positional is taken."""
    time_embedding_act_fn: str | None = None
    """Only null is taken."""
    timestep_post_act: str | None = None
    """Only null is taken."""
    conv_in_kernel: int = 3
    """Only 3 is taken."""
    conv_out_kernel: int = 3
    """Only 3 is taken."""
    attention_type: str = "default"
    """Only default is taken."""
    class_embeddings_concat: bool = False
    """Only false is taken."""
    mid_block_only_cross_attention: bool | None = None
    """Only null is taken."""
    cross_attention_norm: str | None = None
    """Only null is taken."""
    addition_embed_type_num_heads: int = 64
    """Only 64 is taken."""
    reverse_transformer_layers_per_block: tuple[int, ...] | None = None
    """Only null is taken."""

    def __post_init__(self) -> None:
        for name, value in _FIXED.items():
            check_equal(name, getattr(self, name), value)
        levels = self.levels
        for name, allowed in (("down_block_types", DOWN), ("up_block_types", UP)):
            types = getattr(self, name)
            if len(types) != levels or any(t not in allowed for t in types):
                raise ValueError(f"{name} {list(types)}: expected one of {list(allowed)} for each of {levels} levels")
        _check_member("mid_block_type", self.mid_block_type, MID)
        _check_member("class_embed_type", self.class_embed_type, CLASS_EMBEDS)
        _check_member("addition_embed_type", self.addition_embed_type, (None, "text_time"))
        _check_member("resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))
        check_groups(self.norm_num_groups, self.block_out_channels)
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if heads < 1 or width % heads:
                raise ValueError(f"attention_head_dim (number of heads) {heads} must divide block_out_channels {width}")
        if len(self.only_cross) != levels:
            raise ValueError(f"only_cross_attention {list(self.only_cross)}: expected one for each of {levels} levels")
        for name in ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim"):
            self.per_level(name)
        needs_input = self.class_embed_type in ("projection", "simple_projection") or self.addition_embed_type
        if needs_input and self.projection_class_embeddings_input_dim is None:
            raise ValueError("projection_class_embeddings_input_dim is needed by this class or addition embedding")
        if self.addition_embed_type and self.addition_time_embed_dim is None:
            raise ValueError(f"addition_time_embed_dim is needed by addition_embed_type {self.addition_embed_type!r}")

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.block_out_channels)

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads of each level."""
        return self.per_level("attention_head_dim" if self.num_attention_heads is None else "num_attention_heads")

    @property
    def only_cross(self) -> tuple[bool, ...]:
        """Of each level: whether its transformers attend to the text twice, and never to the picture itself."""
        value = self.only_cross_attention
        return value if isinstance(value, tuple) else (value,) * self.levels

    @property
    def time_width(self) -> int:
        """E."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def per_level(self, name: str) -> tuple[int, ...]:
        """A setting as one value a level, finest first; raises ValueError for another number of values."""
        value = getattr(self, name)
        values = value if isinstance(value, tuple) else (value,) * self.levels
        least = 0 if name == "transformer_layers_per_block" else 1  # SDXL's small ControlNets have projections alone
        if len(values) != self.levels or min(values) < least:
            raise ValueError(f"{name} {value!r}: expected a positive number, or one for each of {self.levels} levels")
        return values


def _check_member(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not one of {list(allowed)}")
