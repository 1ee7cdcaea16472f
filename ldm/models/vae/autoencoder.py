"""KL autoencoder (Rombach et al. 2022, arXiv 2112.10752, section 3.1) with diffusers' parameter names.

Legend: B batch, C channels, H, W pixels, h, w latent pixels, Z latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.config.load import accepts
from ldm.models import others
from ldm.models.layers import (
    Downsample,
    NormSiLU,
    ResnetBlock,
    SpatialAttention,
    Upsample,
    check_equal,
    check_groups,
)

EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


@accepts(others.autoencoder)
@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The keys of diffusers' AutoencoderKL `config.json`."""

    in_channels: int = 3
    """Channels of the pictures."""
    out_channels: int = 3
    """Channels of decoded pictures."""
    down_block_types: tuple[str, ...] | None = None
    """DownEncoderBlock2D for each level, which null is, too."""
    up_block_types: tuple[str, ...] | None = None
    """UpDecoderBlock2D for each level, which null is, too."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level, from the finest."""
    layers_per_block: int = 2
    """Residual blocks of each level, one more in the decoder."""
    act_fn: str = "silu"
    """Only silu is taken."""
    latent_channels: int = 4
    """Channels of the latents, at least 1."""
    norm_num_groups: int = 32
    """Groups of the group norms; divides every width."""
    sample_size: int = 512
    """Side of its training pictures in pixels; changes nothing here."""
    scaling_factor: float = 0.18215
    """What latents are multiplied by, above 0."""
    shift_factor: float | None = None
    """What is taken from latents before they are multiplied; null is 0."""
    latents_mean: tuple[float, ...] | None = None
    """Only null is taken."""
    latents_std: tuple[float, ...] | None = None
    """Only null is taken."""
    force_upcast: bool = True
    """Kept for diffusers; changes nothing here."""
    use_quant_conv: bool = True
    """Whether a 1x1 convolution follows the encoder."""
    use_post_quant_conv: bool = True
    """Whether a 1x1 convolution precedes the decoder."""
    mid_block_add_attention: bool = True
    """Whether the middle blocks have attention."""

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if levels < 1 or self.layers_per_block < 1 or self.latent_channels < 1:
            raise ValueError("block_out_channels, layers_per_block and latent_channels must be at least 1")
        check_equal("act_fn", self.act_fn, "silu")
        check_equal("latents_mean", self.latents_mean, None)
        check_equal("latents_std", self.latents_std, None)
        for name, types, kind in (
            ("down_block_types", self.down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", self.up_block_types, "UpDecoderBlock2D"),
        ):
            if types is None:
                object.__setattr__(self, name, (kind,) * levels)
            elif types != (kind,) * levels:
                raise ValueError(f"{name} {list(types)}: expected {kind!r} for each of the {levels} levels")
        check_groups(self.norm_num_groups, self.block_out_channels)
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor must be positive, got {self.scaling_factor}")


class Level(nn.Module):
    """The resnets of one resolution, then the change to the next."""

    def __init__(
        self,
        cin: int,
        cout: int,
        *,
        layers: int,
        groups: int,
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(cin if i == 0 else cout, cout, groups=groups, eps=EPS) for i in range(layers)
        )
        self.downsamplers = nn.ModuleList([Downsample(cout, symmetric=False)]) if down else None
        self.upsamplers = nn.ModuleList([Upsample(cout)]) if up else None

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for change in (self.downsamplers, self.upsamplers):
            x = x if change is None else change[0](x)
        return x


class Middle(nn.Module):
    """resnet, attention over pixels, resnet."""

    def __init__(self, channels: int, *, groups: int, attend: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups=groups, eps=EPS)] if attend else [])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups, eps=EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attend in self.attentions:
            x = attend(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, 2Z, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], c, layers=config.layers_per_block, groups=groups, down=i < len(widths) - 1)
            for i, c in enumerate(widths)
        )
        self.mid_block = Middle(widths[-1], groups=groups, attend=config.mid_block_add_attention)
        self.conv_norm_out = NormSiLU(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in [*self.down_blocks, self.mid_block]:
            x = _run(block, x, self.recompute and self.training)
        return self.conv_norm_out.before(self.conv_out, x)


class Decoder(nn.Module):
    """(B, Z, h, w) -> images (B, 3, H, W)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups=groups, attend=config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], c, layers=config.layers_per_block + 1, groups=groups, up=i < len(widths) - 1)
            for i, c in enumerate(widths)
        )
        self.conv_norm_out = NormSiLU(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in [self.mid_block, *self.up_blocks]:
            x = _run(block, x, self.recompute and self.training)
        return self.conv_norm_out.before(self.conv_out, x)


class Autoencoder(nn.Module):
    """Images to moments of a diagonal Gaussian over latents, and latents to images; knows no scaling factor."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.use_post_quant_conv else None

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, where adversarial and reconstruction gradients are balanced."""
        return self.decoder.conv_out.weight

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> mean and logvar (B, 2Z, h, w) in float32; logvar clamped to [-30, 20].

        Raises ValueError if a side is not a multiple of `factor`.
        """
        if images.shape[-1] % self.factor or images.shape[-2] % self.factor:
            raise ValueError(f"image size {tuple(images.shape[-2:])}: each side must be a multiple of {self.factor}")
        h = self.encoder(images)
        if self.quant_conv is not None:
            h = self.quant_conv(h)
        h = h if h.dtype == torch.float64 else h.float()
        mean, logvar = h.chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, Z, h, w) -> images (B, 3, H, W), about in [-1, 1], not clipped."""
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and noise (B, Z, h, w) -> (reconstruction, moments); without noise the mean is decoded."""
        moments = self.encode(images)
        mean, logvar = moments.chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return self.decode(z), moments

    def enable_gradient_checkpointing(self, on: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.encoder.recompute = self.decoder.recompute = on


def _run(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    return checkpoint(block, x, use_reentrant=False) if recompute else block(x)  # type: ignore[return-value]
