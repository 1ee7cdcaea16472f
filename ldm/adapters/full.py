"""All weights of the network train, and those of the text towers if so configured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ldm.adapters.base import freeze
from ldm.adapters.sites import pooled_of
from ldm.models.network import Around, Network
from ldm.models.text import TextEncoder, TextTower


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Every weight of the network trains; with `text` also those of the text towers that conditioning depends on."""

    kind: Literal["full"] = "full"
    text: bool = False


class Together(Around):
    """The network and the text towers as one trained module; called as the network is."""

    def __init__(self, network: Network, text: Sequence[TextEncoder]) -> None:
        super().__init__(network)
        self.add_module(network.component, network)
        self.text = nn.ModuleList(tower.model for tower in text)


class FullAdapter:
    """Whole weights; the exported names are `unet.NAME` (its component) and `text.I.NAME` with native names."""

    def __init__(self, config: FullConfig) -> None:
        self.config = config
        self._component = ""

    @property
    def trains_text(self) -> bool:
        """Whether the towers train."""
        return self.config.text

    def attach(self, network: Network, text: Sequence[TextEncoder]) -> nn.Module:
        """The network, or `Together`; a tower's weights that nothing depends on stay frozen."""
        freeze(network, text)
        self._component = network.component
        network.requires_grad_(True).train()
        if not self.config.text:
            return network
        for tower, pooled in zip(text, pooled_of(network, text), strict=True):
            for name, p in tower.model.named_parameters():
                p.requires_grad_(not isinstance(tower, TextTower) or _matters(name, tower, pooled=pooled))
        return Together(network, text)

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Native names under the component's (`unet.`) and `text.I.`."""
        if self.config.text:
            return dict(weights)
        return {f"{self._component}.{name}": value for name, value in weights.items()}


def _matters(name: str, tower: TextTower, *, pooled: bool) -> bool:
    """Whether the conditioning depends on this weight: an optimizer cannot take one that never has a gradient."""
    if pooled:
        return True
    if name == "text_projection":
        return False
    if tower.config.output == "last":
        return True
    if tower.config.output == "penultimate" and name.startswith("ln_final."):
        return False
    return not name.startswith(f"transformer.resblocks.{tower.config.layers - 1}.")
