"""Any open_clip model as a judge of pictures and prompts, under the interface of our own CLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.models.text import ClipConfig, build_tokenizer

PREFIX = "open_clip:"
_SEEN = ("mean", "std", "interpolation", "resize_mode")
"""What published weights say of the pictures that they were trained on."""

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class OpenClipConfig:
    """What an open_clip model expects: pictures in [0, 1] at `image_size`, less `mean`, by `std`.

    `resize_mode` is open_clip's, for pictures that are not square: "shortest" crops the middle, "longest" pads with
    `fill_color` of 255, "squash" stretches.
    """

    architecture: str
    image_size: int
    mean: Triple
    std: Triple
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0

    def told(self) -> dict[str, Any]:
        """How pictures come to the model, for the protocol of a result."""
        return {k: v for k, v in asdict(self).items() if k in _SEEN}


AnyClip = ClipConfig | OpenClipConfig


class OpenClip(nn.Module):
    """A frozen open_clip model; `encode_image` takes (B, 3, S, S) in [-1, 1], `encode_text` its tokens (B, T)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Triple, std: Triple) -> None:
        super().__init__()
        self.model: Any = model
        # not in the state_dict: its hash is that of the weights
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the temperature's inverse."""
        return self.model.logit_scale

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Features (B, D) of pictures in [-1, 1] at the model's size."""
        return self.model.encode_image(((images + 1) / 2 - self.mean) / self.std, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Features (B, D) of token ids (B, T)."""
        return self.model.encode_text(tokens, normalize=normalize)


def tokenizer_of(config: AnyClip) -> Callable[[Sequence[str]], Tensor]:
    """Prompts -> token ids (B, T) for the text tower of a CLIP, ours or open_clip's."""
    if isinstance(config, ClipConfig):
        return build_tokenizer(config)
    tokenize = _tokenizer(config.architecture)
    return lambda texts: tokenize(list(texts))


def fitted(images: Tensor, config: AnyClip) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] at a CLIP's size, antialiased; the same ones if they have it.

    For ours they are stretched by bilinear interpolation, for open_clip's as its own preprocessing does.
    """
    size = config.image_size
    if images.shape[-2:] == (size, size):
        return images
    if isinstance(config, ClipConfig):
        return _resized(images, (size, size), "bilinear")
    height, width = images.shape[-2:]
    if config.resize_mode == "squash":
        return _resized(images, (size, size), config.interpolation)
    if config.resize_mode == "shortest":
        short = min(height, width)
        images = _resized(images, (size * height // short, size * width // short), config.interpolation)
        top, left = (round((side - size) / 2) for side in images.shape[-2:])
        return images[..., top : top + size, left : left + size]
    long = max(height, width)
    images = _resized(images, (round(size * height / long), round(size * width / long)), config.interpolation)
    down, right = (size - side for side in images.shape[-2:])
    around = (right // 2, right - right // 2, down // 2, down - down // 2)
    return functional.pad(images, around, value=config.fill_color / 127.5 - 1)


def _resized(images: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    out = functional.interpolate(images, size=shape, mode=mode, antialias=True, align_corners=False)
    return out.clamp(-1, 1) if mode == "bicubic" else out  # it overshoots at edges, which 8-bit pictures cannot


def load(name: str) -> tuple[OpenClip, OpenClipConfig]:
    """The model `ARCH:PRETRAINED`, where the latter is an open_clip tag or a file of tensors.

    The tag may be left out where there is only one. Raises ValueError when there is no such architecture or weights,
    or they cannot be downloaded, read, or do not fit.
    """
    import open_clip

    told, _, weights = name.partition(":")
    architecture = told.replace("/", "-")  # open_clip takes ViT-B/32 too
    known = open_clip.list_models()
    if architecture not in known:
        raise ValueError(
            f"open_clip architecture {told!r}: not one of the {len(known)} that "
            'python -c "import open_clip; print(*open_clip.list_models())" lists'
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not weights:
        if len(tags) != 1:
            raise ValueError(f"{PREFIX}{told}: add which weights, as in {PREFIX}{told}:WEIGHTS; {_choice(tags)}")
        weights = tags[0]
    published = open_clip.get_pretrained_cfg(architecture, weights)
    if published:
        path = _downloaded(architecture, weights, published)
    elif Path(weights).is_file():
        published, path = _agreed([open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]), Path(weights)
    else:
        raise ValueError(f"{PREFIX}{told}: weights {weights!r}: no such file or tag; {_choice(tags)}")
    _tokenizer(architecture)  # some are downloaded: fail now rather than after the pictures are drawn
    model = _built(architecture, path, published)
    config = _config(architecture, open_clip.get_model_preprocess_cfg(model))
    return OpenClip(model, config.mean, config.std).requires_grad_(False).eval(), config


def _choice(tags: Sequence[str]) -> str:
    return f"expected a file or one of {list(tags)}" if tags else "it has no published weights: expected a file"


def _agreed(published: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all published weights of an architecture say of their pictures; a file of weights says nothing."""
    first = published[0] if published else {}
    return {k: first[k] for k in _SEEN if k in first and all(p.get(k) == first[k] for p in published)}


def _downloaded(architecture: str, tag: str, published: dict[str, Any]) -> Path:
    from open_clip.pretrained import download_pretrained

    try:
        return Path(download_pretrained(published))
    except Exception as error:  # each client that it may use has errors of its own
        raise ValueError(
            f"{PREFIX}{architecture}:{tag}: the weights could not be downloaded ({_first_line(error)}); without a "
            f"network, give their file: {PREFIX}{architecture}:PATH"
        ) from error


def _built(architecture: str, path: Path, published: Mapping[str, Any]) -> nn.Module:
    import open_clip

    seen = {k: published[k] for k in _SEEN if k in published}
    try:
        return open_clip.create_model(
            architecture,
            pretrained=str(path),
            force_quick_gelu=bool(published.get("quick_gelu")),
            force_preprocess_cfg=seen,
            pretrained_text=False,
            weights_only=True,
        )
    except Exception as error:  # torch's unpickler, strict loading, and Hugging Face's towers have errors of their own
        raise ValueError(
            f"{PREFIX}{architecture}: weights {str(path)!r}: not a file of plain tensors that fits the architecture "
            f"({_first_line(error)})"
        ) from error


def _config(architecture: str, seen: Mapping[str, Any]) -> OpenClipConfig:
    size = seen["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"{PREFIX}{architecture}: sees pictures of {height}x{width}; expected square ones")
    return OpenClipConfig(
        architecture=architecture,
        image_size=height,
        mean=tuple(seen["mean"]),
        std=tuple(seen["std"]),
        interpolation="bilinear" if seen["interpolation"] == "bilinear" else "bicubic",  # as image_transform has it
        resize_mode=seen["resize_mode"],
        fill_color=seen["fill_color"],
    )


@lru_cache(maxsize=4)
def _tokenizer(architecture: str) -> Callable[[list[str]], Tensor]:
    import open_clip

    try:
        return open_clip.get_tokenizer(architecture)
    except Exception as error:  # Hugging Face's tokenizers have errors of their own
        raise ValueError(
            f"{PREFIX}{architecture}: its tokenizer could not be loaded ({_first_line(error)}); it is downloaded once"
        ) from error


def _first_line(error: Exception) -> str:
    lines = " ".join(str(error).split())
    return f"{type(error).__name__}: {lines[:200]}"
