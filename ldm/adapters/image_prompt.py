"""An IP-Adapter that trains beside a U-Net that does not (arXiv 2308.06721)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ldm.adapters.base import freeze
from ldm.models.network import Around, Network
from ldm.models.text import TextEncoder
from ldm.models.unet.encoder import IMAGE_KV
from ldm.models.unet.image_prompt import STATES, IPAdapter, places
from ldm.types import Cond

NAME = "adapter."


class Prompted(Around):
    """The U-Net with its IP-Adapter; cond "image_states" is what the image encoder has of the picture."""

    def __init__(self, network: Network, adapter: IPAdapter) -> None:
        super().__init__(network)
        self.adapter = adapter
        self._order = [number for number, _ in places(network.config)]

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told = {k: v for k, v in cond.items() if k != STATES}
        return self.network(x, t, told | {f"{IMAGE_KV}.0": self.adapter(cond[STATES], self._order)})


class ImagePromptAdapter:
    """Trains an IP-Adapter, which is made before the U-Net is stored otherwise; `encoder` names what sees pictures."""

    def __init__(self, adapter: IPAdapter, encoder: str) -> None:
        self.adapter, self.encoder = adapter, encoder

    @property
    def trains_text(self) -> bool:
        return False

    def attach(self, network: Network, text: Sequence[TextEncoder]) -> nn.Module:
        """Freeze everything but the IP-Adapter."""
        freeze(network, text)
        self.adapter.requires_grad_(True).train()
        return Prompted(network, self.adapter)

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published names."""
        return {k.removeprefix(NAME): v for k, v in weights.items()}
