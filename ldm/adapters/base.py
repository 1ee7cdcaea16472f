"""The seam between what trains and everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from ldm.models.network import Network
from ldm.models.text import TextEncoder


class Adapter(Protocol):
    """Decides what trains. A configured adapter is made once for a run."""

    @property
    def trains_text(self) -> bool:
        """Whether text states need gradients, so that they can be neither cached nor computed without them."""
        ...

    def attach(self, network: Network, text: Sequence[TextEncoder]) -> nn.Module:
        """Freeze everything and return what trains: a module that is called as the network is, (x, t, cond).

        Only what it registers belongs in the engine; the frozen parts stay outside.
        """
        ...

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors, from the whole trained weights by their names in the attached module."""
        ...


def freeze(network: Network, text: Sequence[TextEncoder]) -> None:
    """No gradients for the weights of all parts."""
    for module in (network, *text):
        module.requires_grad_(False)


COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Names of the text encoders in files, as in diffusers' folders."""
