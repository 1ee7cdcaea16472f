"""A model whose weights are not read yet: configs, and tensors by native name."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ldm.checkpoint import weights
from ldm.checkpoint.weights import Source
from ldm.diffusion.augmentation import NoiseAugmentation
from ldm.models import networks
from ldm.models.network import Network
from ldm.models.networks import AnyNetwork
from ldm.models.text import (
    AnyText,
    TextEncoder,
    TextPrecision,
    build_encoder,
    check_text_precision,
    filled_encoder,
    in_int8,
    text_dtype,
)
from ldm.models.text.int8 import stored
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec

log = logging.getLogger(__name__)
AnyConfig = AnyNetwork | AutoencoderConfig | AnyText
"""Settings of a part that has weights."""


@dataclass
class Components:
    """The parts of one model; `scheduler` is the dictionary of diffusers' `scheduler_config.json`.

    `augmentation`: the noise on the small picture that an upscaler is told.
    """

    network: Network
    autoencoder: Autoencoder
    codec: LatentCodec
    text: list[TextEncoder]
    scheduler: dict[str, Any]
    augmentation: NoiseAugmentation | None = None


@dataclass(frozen=True)
class OpenedText:
    """A text encoder."""

    config: AnyText
    source: Source


@dataclass(frozen=True)
class Opened:
    """A whole model; `check` tells whether the tensors are those of the configs."""

    where: str
    network_config: AnyNetwork
    network: Source
    vae_config: AutoencoderConfig
    vae: Source
    text: tuple[OpenedText, ...]
    scheduler: Mapping[str, Any]
    augmentation: NoiseAugmentation | None = None

    @staticmethod
    def of(
        network: Network,
        autoencoder: Autoencoder,
        text: Sequence[TextEncoder],
        scheduler: Mapping[str, Any],
        augmentation: NoiseAugmentation | None = None,
    ) -> Opened:
        """Modules in memory."""
        return Opened(
            "model",
            network.config,
            weights.of_state(network.state_dict()),
            autoencoder.config,
            weights.of_state(autoencoder.state_dict()),
            tuple(OpenedText(t.config, weights.of_state(t.model.state_dict())) for t in text),
            scheduler,
            augmentation,
        )

    def fitted(self, *, lenient: bool = False) -> Opened:
        """The same with each tensor in its config's shape, where ones at its end alone differ.

        With `lenient` tensors that the configs do not know are left out and named.
        """

        def own(what: str, source: Source, config: AnyConfig) -> Source:
            shapes = shapes_of(config)
            if lenient and (extra := sorted(set(source) - set(shapes))):
                log.warning("%s: %s: left out %s", self.where, what, weights.listed(extra))
                source = {k: e for k, e in source.items() if k in shapes}
            return weights.reshaped(source, shapes)

        return replace(
            self,
            network=own(title(self.network_config), self.network, self.network_config),
            vae=own("autoencoder", self.vae, self.vae_config),
            text=tuple(replace(t, source=own("text encoder", t.source, t.config)) for t in self.text),
        )

    def check(self) -> Opened:
        """This, or ValueError listing keys that are missing, unknown or of another shape."""
        what = f"{self.where}: {title(self.network_config)}"
        weights.check_keys(what, shapes_of(self.network_config), weights.shapes(self.network))
        weights.check_keys(f"{self.where}: autoencoder", shapes_of(self.vae_config), weights.shapes(self.vae))
        for tower in self.text:
            weights.check_keys(f"{self.where}: text encoder", shapes_of(tower.config), weights.shapes(tower.source))
        return self

    def load(
        self,
        dtype: torch.dtype = torch.float32,
        vae: torch.dtype | None = None,
        text: TextPrecision | None = None,
    ) -> Components:
        """Read all weights as `dtype`, the autoencoder's as `vae` and text encoders' as `text` where given.

        Raises ValueError for a precision that these text encoders cannot have.
        """
        if text is not None:
            check_text_precision(text, [tower.config for tower in self.text])
        self.check()
        what = f"{self.where}: {title(self.network_config)}"
        network = fill(empty(self.network_config), self.network, dtype, what)
        autoencoder = fill(empty(self.vae_config), self.vae, vae or dtype, f"{self.where}: autoencoder")
        assert isinstance(network, Network)
        assert isinstance(autoencoder, Autoencoder)
        towers = [load_encoder(tower, text or dtype, f"{self.where}: text encoder") for tower in self.text]
        codec = LatentCodec.of(autoencoder)
        return Components(network, autoencoder, codec, towers, dict(self.scheduler), self.augmentation)


def title(config: AnyNetwork) -> str:
    """What messages call the network of these settings."""
    return networks.NETWORKS[type(config)].title


def component(config: AnyNetwork) -> str:
    """Its folder in diffusers' layout."""
    return networks.NETWORKS[type(config)].component


def empty(config: AnyConfig) -> nn.Module:
    """The module without memory for its weights."""
    with torch.device("meta"):
        if isinstance(config, tuple(networks.NETWORKS)):
            return networks.build(cast("AnyNetwork", config))
        if isinstance(config, AutoencoderConfig):
            return Autoencoder(config)
        return build_encoder(cast("AnyText", config)).model


@functools.lru_cache(maxsize=16)
def shapes_of(config: AnyConfig) -> Mapping[str, torch.Size]:
    """Native names and shapes, to be read alone: they are kept."""
    return {k: v.shape for k, v in empty(config).state_dict().items()}


def fill(model: nn.Module, source: Source, dtype: torch.dtype, where: str = "weights") -> nn.Module:
    """Give an empty module its weights, and no more memory than they need."""
    model.load_state_dict(weights.read_all(source, dtype, where), strict=True, assign=True)
    return model.eval()


def load_encoder(opened: OpenedText, kind: torch.dtype | TextPrecision, where: str = "weights") -> TextEncoder:
    """A frozen text encoder with its tokenizer; weights that would overflow in float16 stay in float32.

    Weights of 8 bits are made as each is read: the whole encoder is never in memory.
    """
    dtype = kind if isinstance(kind, torch.dtype) else text_dtype(kind)
    int8 = not isinstance(kind, torch.dtype) and in_int8(kind, opened.config)
    with torch.device("meta"):
        bare = build_encoder(opened.config)
    if int8:
        bare.quantize_8bit()
    state: dict[str, torch.Tensor] = {}
    for key, entry in opened.source.items():
        for name, value in weights.read_all({key: entry}, bare.kept(key, dtype), where).items():
            state |= stored(bare.model, name, value) if int8 else {name: value}
    return filled_encoder(opened.config, state, dtype, int8=int8)
