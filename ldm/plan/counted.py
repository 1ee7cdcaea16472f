"""What is counted of a job's steps: once, and when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ldm.plan.memory import Activations, Sizes
from ldm.plan.trace import trace


class Counted:
    """Numbers of weights, and activations without and with recomputation, of a network that `build` makes.

    `one`: a micro-batch of one sample is counted for itself; `alone`: nothing else is, and all is proportional to it.
    """

    def __init__(
        self,
        build: Callable[[bool], nn.Module],
        inputs: Callable[[int], tuple[Any, ...]],
        precision: torch.dtype,
        *,
        gpu: bool,
        recomputing: Sequence[bool] = (False, True),
        one: bool = False,
        alone: bool = False,
    ) -> None:
        self._build, self._inputs, self._precision = build, inputs, precision
        self._gpu, self._recomputing, self._one, self._alone = gpu, tuple(recomputing), one, alone

    @cached_property
    def _modules(self) -> dict[bool, nn.Module]:
        return {recompute: self._build(recompute) for recompute in self._recomputing}

    @cached_property
    def sizes(self) -> Sizes:
        """Numbers of weights."""
        return Sizes.of(next(iter(self._modules.values())))

    @cached_property
    def activations(self) -> dict[bool, Activations]:
        """By whether blocks are computed again."""
        if self._alone:
            return {again: self._single(module) for again, module in self._modules.items()}
        how = {"precision": self._precision, "gpu": self._gpu, "one": self._one}
        return {again: Activations.count(module, self._inputs, **how) for again, module in self._modules.items()}

    def _single(self, module: nn.Module) -> Activations:
        found = trace(module, self._inputs, 1, precision=self._precision, gpu=self._gpu)
        return Activations(found, found, found)
