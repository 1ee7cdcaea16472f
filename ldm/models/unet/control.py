"""Hands on a network's attention: read or replace the weights of every attention layer inside a `with` block.

Outside of it nothing is paid: the layers keep their fused attention and never form the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ldm.models.unet.transformer import Attention

Hand = Callable[[str, Tensor], Tensor]
"""(layer name, weights (B, heads, queries, keys)) -> the weights to use instead."""


def attention_layers(network: nn.Module) -> dict[str, Attention]:
    """The attention layers by name: "...attn1" on the picture itself, "...attn2" on the text."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Attention)}


@contextmanager
def controlled(network: nn.Module, hand: Hand, *, cross: bool = True, own: bool = True) -> Iterator[None]:
    """Let `hand` see and edit the weights of cross-attention (`cross`) and self-attention (`own`) layers.

    Raises ValueError if the network has no such layer, or if its layers are in another hand already.
    """
    layers = {
        name: layer for name, layer in attention_layers(network).items() if (cross if name.endswith("attn2") else own)
    }
    if not layers:
        raise ValueError("the network has no attention layer to control")
    taken = [name for name, layer in layers.items() if layer.control is not None]
    if taken:
        raise ValueError(f"attention layer {taken[0]!r} is controlled already")
    for name, layer in layers.items():
        layer.control = _bind(hand, name)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.control = None


def _bind(hand: Hand, name: str) -> Callable[[Tensor], Tensor]:
    return lambda weights: hand(name, weights)
