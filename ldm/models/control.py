"""Hands on a network's attention: read or replace the weights of every attention layer inside a `with` block.

Outside of it nothing is paid: the layers keep their fused attention and never form the weights.

Legend: B batch, H heads, N image tokens, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.attention import Control
from ldm.models.network import Looks, Network

Hand = Callable[[str, Tensor], Tensor]
"""(name, weights (B, H, queries, keys)) -> the weights to use instead.

`looks` says of a name whether its keys are the text ("cross") or the picture ("own"); queries are the picture's.
"""


def attention_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The attention layers by name. Raises ValueError for a network that has none that can be controlled."""
    return {name: layer for name, (layer, _) in _layers(network).items()}


def _layers(network: nn.Module) -> dict[str, tuple[nn.Module, Looks]]:
    if not isinstance(network, Network):
        return {}
    return {name: (layer, looks) for name, layer, looks in network.attention_layers()}


def looks_at_text(name: str) -> bool:
    """Whether a name that a hand is given is of cross-attention: "...attn2", or "...cross" of joint attention."""
    return name.rpartition(".")[2] in ("attn2", "cross")


@contextmanager
def controlled(network: nn.Module, hand: Hand, *, cross: bool = True, own: bool = True) -> Iterator[None]:
    """Let `hand` see and edit the weights of cross-attention (`cross`) and self-attention (`own`) layers.

    A layer of joint attention comes as two: "NAME.cross", from the picture to the text, and "NAME.own", from the
    picture to itself; rows of both together sum to 1. Where the hand changes either, the row keeps its cross weights
    as they are now, and its own weights are scaled to the rest of 1 (below 0, which reversed words can make it, too);
    cross weights above 1 are scaled to 1. The text's own queries are not shown. Raises ValueError if the network has
    no such layer, or if its layers are in another hand already.
    """
    wanted = {"cross": cross, "own": own, "joint": cross or own}
    layers = {name: (layer, looks) for name, (layer, looks) in _layers(network).items() if wanted[looks]}
    if not layers:
        raise ValueError("the network has no attention layer to control")
    taken = [name for name, (layer, _) in layers.items() if getattr(layer, "control", None) is not None]
    if taken:
        raise ValueError(f"attention layer {taken[0]!r} is controlled already")
    tokens = _Tokens()
    with ExitStack() as stack:
        if any(looks == "joint" for _, looks in layers.values()):
            stack.callback(network.register_forward_pre_hook(tokens.count).remove)
        for name, (layer, looks) in layers.items():
            layer.control = _bound(hand, name, looks, tokens, cross, own)  # type: ignore[assignment]
        try:
            yield
        finally:
            for layer, _ in layers.values():
                layer.control = None  # type: ignore[assignment]


class _Tokens:
    """How many image tokens the call in progress has; in joint attention they are the last ones."""

    image = 0

    def count(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(network, Network)
        *_, h, w = inputs[0].shape
        self.image = (h // network.multiple) * (w // network.multiple)


def _bound(hand: Hand, name: str, looks: Looks, tokens: _Tokens, cross: bool, own: bool) -> Control:
    if looks == "joint":
        return lambda weights: _joint(hand, name, weights, tokens.image, cross, own)
    plain = name.rpartition(".")[2] in ("attn1", "attn2")
    named = name if plain and looks_at_text(name) == (looks == "cross") else f"{name}.{looks}"
    return lambda weights: hand(named, weights)


def _joint(hand: Hand, name: str, weights: Tensor, image: int, cross: bool, own: bool) -> Tensor:
    """Weights (B, H, T + N, T + N), text first, with the picture's rows through the hand."""
    text = weights.shape[-1] - image
    words, pixels = weights[:, :, text:, :text], weights[:, :, text:, text:]
    now = hand(f"{name}.cross", words) if cross else words
    rest = hand(f"{name}.own", pixels) if own else pixels
    if now is words and rest is pixels:
        return weights
    wide = weights.dtype if weights.dtype == torch.float64 else torch.float32
    total, others = (part.sum(-1, keepdim=True, dtype=wide) for part in (now, rest))
    now = now / total.clamp(min=1).to(now)
    rest = rest * ((1 - total).clamp(min=0) / others.clamp(min=1e-12)).to(rest)
    return torch.cat([weights[:, :, :text], torch.cat([now, rest], dim=-1)], dim=2)
