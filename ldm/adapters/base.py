"""The seam between what trains and everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from ldm.models.text import TextTower
from ldm.models.unet import UNet


class Adapter(Protocol):
    """Decides what trains. A configured adapter is made once for a run."""

    @property
    def trains_text(self) -> bool:
        """Whether text states need gradients, so that they can be neither cached nor computed without them."""
        ...

    def attach(self, unet: UNet, text: Sequence[TextTower]) -> nn.Module:
        """Freeze everything and return what trains: a module that is called as the U-Net is, (x, t, cond).

        Only what it registers belongs in the engine; the frozen parts stay outside.
        """
        ...

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors, from the whole trained weights by their names in the attached module."""
        ...


def freeze(unet: UNet, text: Sequence[TextTower]) -> None:
    """No gradients for the weights of all parts."""
    for module in (unet, *text):
        module.requires_grad_(False)


COMPONENTS = ("text_encoder", "text_encoder_2")
"""Names of the text towers in files, as in diffusers' folders."""
