"""A ControlNet that trains over a network that does not (arXiv 2302.05543)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ldm.adapters.base import freeze
from ldm.models.network import Around, Network
from ldm.models.text import TextEncoder
from ldm.models.transformers.sd3_control import SD3ControlNet
from ldm.models.unet.controlnet import CONDITION, ControlNet
from ldm.types import Cond

NAME = "control."


class Controlled(Around):
    """The network under its ControlNet; cond "condition" is what the latter is shown."""

    def __init__(self, network: Network, control: ControlNet | SD3ControlNet) -> None:
        super().__init__(network)
        self.control = control

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        added = self.control(x, t, cond)
        return self.network(x, t, {k: v for k, v in cond.items() if k != CONDITION}, residuals=added)


class ControlAdapter:
    """Trains a ControlNet, which is made before the base is stored otherwise."""

    def __init__(self, control: ControlNet | SD3ControlNet) -> None:
        self.control = control

    @property
    def trains_text(self) -> bool:
        return False

    def attach(self, network: Network, text: Sequence[TextEncoder]) -> nn.Module:
        """Freeze everything but the ControlNet."""
        freeze(network, text)
        self.control.requires_grad_(True).train()
        return Controlled(network, self.control)

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ControlNet's own names; with tables that never train (SD3's positions), which files hold too."""
        tables = {k for k, _ in self.control.named_buffers()}
        fixed = {k: v for k, v in self.control.state_dict().items() if k in tables}
        return fixed | {k.removeprefix(NAME): v for k, v in weights.items()}
