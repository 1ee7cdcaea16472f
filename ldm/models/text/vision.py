"""Image encoders of CLIP, which see the pictures that are prompts.

Legend: B batch, S the class token and the patches, W width of their states, F features of a picture as a whole, P its
side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from ldm.models.text.base import own_precision
from ldm.models.text.config import ClipConfig
from ldm.models.text.openclip import AnyClip
from ldm.models.wide import quickened

Triple = tuple[float, float, float]
MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
STD: Triple = (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that OpenAI's and OpenCLIP's models were trained on."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The keys of transformers' `CLIPVisionModelWithProjection`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                             f"{self.num_attention_heads}")  # fmt: skip
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")


@dataclass(frozen=True)
class Sight:
    """How pictures come to an encoder: (P, P), less `mean`, by `std`; the middle of those that are not square is cut
    out, or they are `stretched`. Resized by PIL's "bicubic", or by "bilinear" interpolation of their numbers."""

    size: int
    mean: Triple = MEAN
    std: Triple = STD
    filter: Literal["bicubic", "bilinear"] = "bicubic"
    stretched: bool = False


class ImageEncoder(nn.Module):
    """A frozen image tower of CLIP; computes in the type of its weights, whatever autocast says."""

    title = "image encoder"

    def __init__(self, model: nn.Module, sight: Sight, name: str = "image encoder") -> None:
        """`model`: an open_clip `VisionTransformer`. Raises ValueError, which begins with `name`, for another."""
        super().__init__()
        from open_clip.transformer import VisionTransformer

        if not isinstance(model, VisionTransformer) or model.attn_pool is not None or model.pool_type != "tok":
            raise ValueError(f"{name}: its image tower is no plain vision transformer with a class token")
        self.model = quickened(model)
        self.sight, self.name = sight, name
        self._blank: dict[bool, Tensor] = {}
        self.requires_grad_(False).eval()

    @property
    def features(self) -> int:
        """F."""
        return self._tower.proj.shape[1]

    @property
    def width(self) -> int:
        """W."""
        return self._tower.proj.shape[0]

    def of(self, states: bool) -> int:
        """How many features a place, or a picture as a whole has."""
        return self.width if states else self.features

    def places(self) -> int:
        """S."""
        return len(self._tower.positional_embedding)

    @torch.no_grad()
    def forward(self, pixels: Tensor, *, states: bool = False) -> Tensor:
        """Embeddings (B, F) of what `pixels` or `fitted` gave, or with `states` those before the last layer (B, S, W).

        As transformers' `image_embeds` and `hidden_states[-2]`; float32.
        """
        tower = self._tower
        pixels = pixels.to(tower.conv1.weight)
        with own_precision(pixels.device):
            patches = tower.conv1(pixels).flatten(2).mT
            x = torch.cat([tower.class_embedding.to(patches).expand(len(patches), 1, -1), patches], dim=1)
            x = tower.ln_pre(x + tower.positional_embedding.to(x))
            *blocks, last = tower.transformer.resblocks
            for block in blocks:
                x = block(x)
            return x.float() if states else (tower.ln_post(last(x)[:, 0]) @ tower.proj).float()

    def blank(self, *, states: bool = False) -> Tensor:
        """What stands in the place of no picture, (1, F) or (1, S, W): zeros, or the states of zeros, as diffusers has
        it."""
        if not states:
            return torch.zeros(1, self.features)
        if True not in self._blank:
            side = self.sight.size
            self._blank[True] = self(torch.zeros(1, 3, side, side), states=True).cpu()
        return self._blank[True]

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(B, 3, P, P) of pictures."""
        cut = [p.convert("RGB") if self.sight.stretched else _middle(p.convert("RGB"), self.sight) for p in pictures]
        made = [torch.from_numpy(np.array(p)).permute(2, 0, 1)[None].float() / 255 for p in cut]
        return torch.cat([self.fitted(one) for one in made])

    def fitted(self, images: Tensor) -> Tensor:
        """(B, 3, P, P) of pictures (B, 3, H, W) in [0, 1]."""
        sight, (height, width) = self.sight, images.shape[-2:]
        if (height, width) != (sight.size, sight.size):
            size = (sight.size, sight.size)
            if not sight.stretched:
                short = min(height, width)
                size = (sight.size * height // short, sight.size * width // short)
            images = functional.interpolate(images, size=size, mode=sight.filter, antialias=True, align_corners=False)
            top, left = ((side - sight.size) // 2 for side in images.shape[-2:])
            images = images[..., top : top + sight.size, left : left + sight.size].clamp(0, 1)
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (sight.mean, sight.std))
        return (images - mean) / std

    @property
    def _tower(self) -> Any:
        return cast("Any", self.model)


def _middle(picture: Image.Image, sight: Sight) -> Image.Image:
    """The middle square, as transformers' `CLIPImageProcessor` cuts it."""
    width, height = picture.size
    short = min(width, height)
    if short != sight.size:
        size = (sight.size * width // short, sight.size * height // short)
        filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
        picture = picture.resize(size, filters[sight.filter])
    left, top = ((side - sight.size) // 2 for side in picture.size)
    return picture.crop((left, top, left + sight.size, top + sight.size))


def of_clip(clip: nn.Module, config: AnyClip, name: str) -> ImageEncoder:
    """The image tower of a CLIP of both towers, ours or open_clip's, which sees pictures as it is asked to elsewhere.

    Raises ValueError, which begins with `name`, for one that is no plain vision transformer, or pads its pictures.
    """
    if isinstance(config, ClipConfig):
        half = (0.5, 0.5, 0.5)
        return ImageEncoder(clip.get_submodule("visual"), Sight(config.image_size, half, half, "bilinear", True), name)
    if config.resize_mode == "longest":
        raise ValueError(f"{name}: sees pictures with borders (resize_mode 'longest'); use one that cuts or stretches")
    sight = Sight(config.image_size, config.mean, config.std, config.interpolation, config.resize_mode == "squash")
    return ImageEncoder(clip.get_submodule("model.visual"), sight, name)


def build_vision(config: VisionConfig) -> nn.Module:
    """The vision transformer of settings, with random weights."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    return VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        output_dim=config.projection_dim,
        act_layer=QuickGELU if config.hidden_act == "quick_gelu" else nn.GELU,
    )
