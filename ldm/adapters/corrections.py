"""What a file can do to one weight beside a low-rank product: Hadamard, Kronecker, rotations, whole differences.

LoHa: (A1 B1) * (A2 B2) (Hyeon-Woo 2021, arXiv 2108.06098); LoKr: a Kronecker product (Yeh 2023, arXiv 2309.14859).
OFT: blocks of rows turned (Qiu 2023, arXiv 2306.07280).
Any of them may be decomposed (DoRA, Liu 2024, arXiv 2402.09353): m V / |V| with V the weight and the change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


class Correction(ABC):
    """The change of one weight (out, in[, kh, kw]), or of a vector (n,) such as a norm's weight or a bias."""

    magnitude: Tensor | None
    axis: int

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes."""

    @abstractmethod
    def change(self) -> Tensor:
        """What is added before magnitudes, float64 of `shape`."""

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to `weight`, in float64.

        With `magnitude`, each output's row (`axis` 0) or each input's column (1) of the sum gets that norm.
        """
        base = weight.double()
        total = base + self.change().view(base.shape)
        if self.magnitude is not None:
            norms = axis_norms(total, self.axis).clamp(min=torch.finfo(torch.float64).tiny)
            shape = [1] * base.ndim
            shape[self.axis] = -1
            total = total * (self.magnitude.double() / norms).view(shape)
        return total - base

    def to(self, device: torch.device) -> Correction:
        """A copy whose tensors are on a device."""
        own: Any = self
        return replace(own, **{k: v.to(device) for k, v in self._tensors().items()})

    def bad(self) -> bool:
        """Whether a number in it is NaN or infinite."""
        return not all(bool(torch.isfinite(v).all()) for v in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}


Corrections = Mapping[str, Correction]
"""By the names of `sites`."""


def axis_norms(weight: Tensor, axis: int = 0) -> Tensor:
    """Norms (out,) of a weight's rows, or with `axis` 1 those (in,) of its columns."""
    return weight.transpose(0, axis).flatten(1).norm(dim=1)


@dataclass(frozen=True)
class Hadamard(Correction):
    """`scale` times the elementwise product of two products a (out, r) b (r, rest)."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    scale: float
    form: tuple[int, ...]
    magnitude: Tensor | None = None
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form

    def change(self) -> Tensor:
        one, two = (a.double().flatten(1) @ b.double().flatten(1) for a, b in ((self.a1, self.b1), (self.a2, self.b2)))
        return (self.scale * one * two).view(self.form)


@dataclass(frozen=True)
class Kronecker(Correction):
    """`scale` times the Kronecker product of `w1` (a, b) and `w2` (c, d[, kh, kw]).

    `low`, `high`: where `w2` is a product (c, r) (r, rest), its factors, which files hold.
    """

    w1: Tensor
    w2: Tensor
    scale: float
    form: tuple[int, ...]
    magnitude: Tensor | None = None
    axis: int = 0
    low: Tensor | None = None
    high: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form

    def change(self) -> Tensor:
        w1 = self.w1.double().view(*self.w1.shape[:2], *[1] * (self.w2.ndim - 2))
        return (self.scale * torch.kron(w1, self.w2.double().contiguous())).reshape(self.form)


@dataclass(frozen=True)
class Difference(Correction):
    """The difference itself."""

    value: Tensor
    magnitude: Tensor | None = None
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def change(self) -> Tensor:
        return self.value.double()


@dataclass(frozen=True)
class Rotation(Correction):
    """Blocks of a weight's outputs turned, or with `inputs` of its inputs: OFT.

    `skew` (k, s, s): skew-symmetric Q of each block, which is turned by the Cayley transform R = (I + Q) / (I - Q) of
    k * s outputs (out, ..), or of inputs with the kernel's places (in * kh * kw); with `terms` by that many terms of
    its series as PEFT counts them. New outputs are y R of the old; with `rescale` (out,) these are multiplied then.
    """

    skew: Tensor
    form: tuple[int, ...]
    rescale: Tensor | None = None
    terms: int = 0
    inputs: bool = False
    magnitude: Tensor | None = None
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form

    def change(self) -> Tensor:
        raise TypeError("what a rotation adds depends on the weight: `delta`")

    def delta(self, weight: Tensor) -> Tensor:
        base, turn = weight.double(), turned(self.skew.double(), self.terms)
        blocks, side = turn.shape[:2]
        if self.inputs:
            old = base.reshape(len(base), blocks, side)
            return torch.einsum("kij,okj->oki", turn, old).reshape(base.shape)
        added = torch.einsum("kij,ki...->kj...", turn, base.reshape(blocks, side, -1)).reshape(base.shape)
        if self.rescale is None:
            return added
        scale = self.rescale.double().view(-1, *[1] * (base.ndim - 1))
        return scale * added + (scale - 1) * base


def turned(skew: Tensor, terms: int = 0) -> Tensor:
    """R - I of skew-symmetric Q (k, s, s): R = (I + Q) / (I - Q), or I + 2 Q + ... + Q^m of its series."""
    if not terms:
        eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(eye - skew, 2 * skew, left=False)
    if terms < 3:
        return 2 * skew if terms == 2 else torch.zeros_like(skew)
    total, power = 2 * skew, skew
    for _ in range(max(terms, 4) - 3):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew


@dataclass(frozen=True)
class Rows(Correction):
    """Rows of another correction, which has no magnitudes: its `spans` [start, stop), one after another."""

    whole: Correction
    spans: tuple[tuple[int, int], ...]
    magnitude: Tensor | None = None
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(stop - start for start, stop in self.spans), *self.whole.shape[1:])

    def change(self) -> Tensor:
        whole = self.whole.change()
        return torch.cat([whole[start:stop] for start, stop in self.spans])

    def to(self, device: torch.device) -> Correction:
        return replace(super().to(device), whole=self.whole.to(device))  # type: ignore[type-var]

    def bad(self) -> bool:
        return super().bad() or self.whole.bad()
