"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum made orthogonal, for the matrices of hidden
layers; everything else, as first and last layers, embeddings, biases and norms, is AdamW's.

Orthogonality is of a whole matrix. Where ZeRO divides a flat buffer, most matrices are whole on one rank, which updates
them alone; the pieces of one that is cut go to one rank and come back, so that every stage gives stage 0's update.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ldm import dist
from ldm.train.fragments import Cut, Fragment, cuts, gather, places, scatter

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic: as steep at 0 as it can be where it still ends near 1."""
_TINY = 1e-7
"""The least norm to divide by, as `torch.optim.Muon` has it: what is nearly no gradient stays nearly no update."""
_TOGETHER = 1 << 24
"""Values of matrices of one shape that are iterated at once."""
_RESTART = 5
"""Steps after which a Gram matrix is computed anew: rounding makes its zeros negative, which grow twelvefold a step."""


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """How `algorithm: muon` updates its matrices; `ns_steps` are those of the Newton-Schulz iteration.

    `scale` "rms" is 0.2 sqrt(max(rows, columns)): updates are as large as AdamW's, and one rate is for both (Liu et al.
    2025, arXiv 2502.16982, equation 4). "original" is sqrt(max(1, rows / columns)), with a rate of its own. `lr` is
    that rate, and follows the schedule of the other; null is the same for both.
    """

    momentum: float = 0.95
    """Decay of the running mean of gradients."""
    nesterov: bool = True
    """Whether updates look ahead: the gradient mixed once more with its running mean."""
    ns_steps: int = 5
    scale: Literal["rms", "original"] = "rms"
    lr: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not 1 <= self.ns_steps <= 20:
            raise ValueError(f"ns_steps must be in [1, 20], got {self.ns_steps}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be above 0 (null: the same as of all others), got {self.lr}")
        if self.scale == "original" and self.lr is None:
            raise ValueError("lr: scale 'original' needs a rate of its own, such as 0.02, got null")

    def scale_of(self, rows: int, columns: int) -> float:
        """What the orthogonal update of such a matrix is multiplied by."""
        return 0.2 * max(rows, columns) ** 0.5 if self.scale == "rms" else max(1.0, rows / columns) ** 0.5


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """(B, M, N) of singular values S -> the same singular vectors with values near 1 (about 0.7 to 1.2).

    The quintic Newton-Schulz iteration, in the dtype of x. Singular values far below the norm's 1/500 stay below.
    """
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_TINY)  # then no singular value is above 1
    if x.size(2) >= 2 * x.size(1) and x.dtype != torch.bfloat16:
        x = _by_gram(x, steps)
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


def _by_gram(x: Tensor, steps: int) -> Tensor:
    """The same iteration in products of (M, M) matrices: a step multiplies x by a polynomial of its Gram matrix."""
    for first in range(0, steps, _RESTART):
        gram = x @ x.mT
        product = factor = _factor(gram)
        for _ in range(first + 1, min(first + _RESTART, steps)):
            gram = factor @ gram @ factor
            factor = _factor(gram)
            product = factor @ product
        x = product @ x
    return x


def _factor(gram: Tensor) -> Tensor:
    """a I + b G + c G^2."""
    factor = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
    factor.diagonal(dim1=1, dim2=2).add_(_A)
    return factor


@dataclass(frozen=True)
class _Matrix:
    """A matrix, or this rank's piece of one: weights, gradient and momentum, and the whole's rows and columns."""

    weights: Tensor
    grad: Tensor
    moment: Tensor
    shape: tuple[int, int]


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, flattened after their first dimension, and AdamW with options `adamw` for groups `rest`."""

    def __init__(
        self,
        matrices: Sequence[Tensor],
        rest: list[dict[str, Any]],
        config: MuonConfig,
        *,
        weight_decay: float,
        lr: float,
        **adamw: Any,
    ) -> None:
        self.config = config
        self._share = 1.0 if config.lr is None else config.lr / lr  # of a group's rate
        self._adamw = torch.optim.AdamW(rest, lr=lr, **adamw)
        own = {"params": list(matrices), "weight_decay": weight_decay, "matrices": True}
        super().__init__([own, *self._adamw.param_groups], {"lr": lr, "matrices": False})
        self._whole: dict[Tensor, list[Fragment] | None] = dict.fromkeys(matrices)  # None: one matrix, undivided
        self._cuts: list[tuple[Tensor, Cut]] = []

    def has(self, p: Tensor) -> bool:
        """Whether a parameter, or a flat master, holds matrices."""
        return p in self._whole

    def divide(
        self, masters: Sequence[Tensor], fragments: Sequence[Fragment], shapes: Mapping[str, Sequence[int]]
    ) -> None:
        """From now on weights are flat `masters`, with `fragments` on this rank; `shapes` of all matrices. Collective.

        To be told when masters have taken the parameters' place in the groups.
        """
        where = places(fragments, list(shapes))
        self._cuts = [(masters[cut.flat], cut) for cut in cuts(fragments, shapes, where)]
        held: dict[Tensor, list[Fragment]] = {masters[max(flat for flat, _, _ in ranks)]: [] for ranks in where}
        for f in fragments:
            if f.name in shapes and f.length == math.prod(f.shape):
                held[masters[f.flat]].append(f)
        self._whole = {**held}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; collective where matrices are cut."""
        for group in self.param_groups:
            if group["matrices"]:
                self._step(group)
        rest = [group for group in self.param_groups if not group["matrices"] and group["params"]]
        if rest:  # DeepSpeed steps with one group at a time, and with flat masters in it
            self._adamw.param_groups, self._adamw.state = rest, self.state
            self._adamw.step()

    def _step(self, group: dict[str, Any]) -> None:
        lr = group["lr"] * self._share
        whole, pieces, divided = list[_Matrix](), list[_Matrix](), list[Cut]()
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            moment = state["momentum_buffer"].lerp_(p.grad, 1 - self.config.momentum)
            p.mul_(1 - lr * group["weight_decay"])
            whole += self._matrices(p, moment)
            for master, cut in self._cuts:
                if master is p:
                    pieces.append(_Matrix(p[cut.here], p.grad[cut.here], moment[cut.here], _flat(cut.shape)))
                    divided.append(cut)
        for some in _alike([m.shape for m in whole]):
            updates = self._orthogonal([self._direction(whole[i]) for i in some])
            for i, update in zip(some, updates, strict=True):
                self._add(whole[i], update, lr)
        if divided:
            self._step_divided(pieces, divided, lr)

    def _step_divided(self, pieces: Sequence[_Matrix], divided: Sequence[Cut], lr: float) -> None:
        sent = [self._direction(piece).flatten() for piece in pieces]
        wholes = gather(divided, sent)
        shapes = [_flat(cut.shape) for cut in divided if cut.owner == dist.rank()]
        for some in _alike(shapes):
            updates = self._orthogonal([wholes[i].view(shapes[i]) for i in some])
            for i, update in zip(some, updates, strict=True):
                wholes[i] = update.flatten()
        for piece, update in zip(pieces, scatter(divided, wholes, sent[0]), strict=True):
            self._add(piece, update, lr)

    def _matrices(self, p: Tensor, moment: Tensor) -> Iterator[_Matrix]:
        """Those of a parameter or flat master that are whole here."""
        assert p.grad is not None
        fragments = self._whole[p]
        if fragments is None:
            yield _Matrix(p, p.grad, moment, _flat(p.shape))
            return
        for f in fragments:
            here = slice(f.offset, f.offset + f.length)
            yield _Matrix(p[here], p.grad[here], moment[here], _flat(f.shape))

    def _direction(self, m: _Matrix) -> Tensor:
        """What is made orthogonal, where and in what it is: on GPUs in half precision, also of weights elsewhere."""
        direction = m.grad.lerp(m.moment, self.config.momentum) if self.config.nesterov else m.moment
        device = dist.device()
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        direction = direction.to(device, torch.bfloat16 if half else direction.dtype)
        return direction.reshape(m.shape) if m.weights.numel() == math.prod(m.shape) else direction

    def _orthogonal(self, matrices: Sequence[Tensor]) -> Tensor:
        return orthogonalize(torch.stack(list(matrices)), self.config.ns_steps)

    def _add(self, m: _Matrix, update: Tensor, lr: float) -> None:
        m.weights.add_(update.reshape(m.weights.shape).to(m.weights), alpha=-lr * self.config.scale_of(*m.shape))


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight: of (O, I, h, w) they are O and I h w."""
    return shape[0], math.prod(shape[1:])


def _alike(shapes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Which matrices are iterated together."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, shape in enumerate(shapes):
        found[shape].append(i)
    for shape, those in found.items():
        most = max(1, _TOGETHER // math.prod(shape))
        yield from (those[i : i + most] for i in range(0, len(those), most))
