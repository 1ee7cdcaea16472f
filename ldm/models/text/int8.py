"""Linear layers with weights of 8 bits: a quarter of float32's memory, for encoders that are only used.

Legend: I channels in, O channels out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.frozen import rounded


class Int8Linear(nn.Module):
    """A linear layer whose weight (O, I) is int8 times a scale for each row, its largest absolute value over 127.

    The weight becomes one of the input's type at every use; `wide` computes inputs of float16 in float32.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, *, wide: bool = False) -> None:
        super().__init__()
        weight, scale = rounded(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.wide = wide

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        before = self.scale
        super()._apply(fn, recurse)
        self.scale = before.to(self.scale.device)  # in float32: 8 bits times a rounded scale would lose more
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        x = x.float() if self.wide and x.dtype == torch.float16 else x
        weight = (self.weight * self.scale).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def stored(model: nn.Module, key: str, value: Tensor) -> Mapping[str, Tensor]:
    """A weight of a file as `model`, which `quantize` went over, keeps it: two tensors where it has 8 bits."""
    name, _, last = key.rpartition(".")
    if last != "weight" or not isinstance(model.get_submodule(name), Int8Linear):
        return {key: value}
    weight, scale = rounded(value)
    return {key: weight, f"{name}.scale": scale}


@torch.no_grad()
def quantize(model: nn.Module, wide: Collection[str] = ()) -> None:
    """Put `Int8Linear` in the place of all linear layers, one by one; `wide` are last words of names."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child, wide=name in wide))
