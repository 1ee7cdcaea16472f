"""Optimizer and learning-rate schedule; the schedule counts optimizer steps and the trainer is its only owner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.models.frozen import bitsandbytes
from ldm.models.network import NO_HIDDEN
from ldm.train import packages
from ldm.train.muon import Muon, MuonConfig
from ldm.train.packages import AdafactorConfig, CameConfig, ProdigyConfig, ScheduleFreeConfig
from ldm.train.rates import Rates
from ldm.train.schedules import Course, Decay

BLOCK = 256
"""Values that share a scale in 8-bit state."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, or another, with linear warm-up and a decay to `final` times the peak rate (`course` has what some take).

    `adamw8bit` keeps its moments in 8 bits (Dettmers et al. 2021) and needs bitsandbytes; it resumes to within their
    rounding. `lion` (Chen et al. 2023) keeps one moment; `sgd` takes its momentum from the first of `betas`. `muon`
    (`ldm.train.muon`) is for the matrices of a network's hidden layers, and AdamW for the rest. `fused` is AdamW's in
    one kernel. `adafactor`, `came`, `prodigy` and `adamw_schedule_free` are of other packages (`ldm.train.packages`).
    `rates` are those of parts.
    """

    algorithm: Literal[
        "adamw", "adamw8bit", "lion", "muon", "sgd", "adafactor", "came", "prodigy", "adamw_schedule_free"
    ] = "adamw"
    """The optimizer."""
    lr: float = 1e-4
    """The peak rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    """Added to the denominator of Adam-like updates."""
    weight_decay: float = 0.01
    """Weight decay."""
    warmup: int = 0
    """Optimizer steps of linear warm-up; 0 is none."""
    decay: Decay = "constant"
    """The form of the decay after the warm-up."""
    final: float = 0.0
    fused: bool = True
    course: Course = field(default_factory=Course)
    rates: Rates = field(default_factory=Rates)
    muon: MuonConfig = field(default_factory=MuonConfig)
    adafactor: AdafactorConfig = field(default_factory=AdafactorConfig)
    came: CameConfig = field(default_factory=CameConfig)
    prodigy: ProdigyConfig = field(default_factory=ProdigyConfig)
    schedule_free: ScheduleFreeConfig = field(default_factory=ScheduleFreeConfig)

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0 steps, got {self.warmup}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must be in [0, 1] (a fraction of lr), got {self.final}")
        self.course.check(self.decay)
        self._check_algorithm()

    def _check_algorithm(self) -> None:
        """Raise ValueError for rates and schedules that an algorithm does not have."""
        algorithm = self.algorithm
        if algorithm == "prodigy" and self.lr < 0.01:
            raise ValueError(
                f"lr: {self.lr} with algorithm 'prodigy', which multiplies it by its own estimate; write 1"
            )
        if algorithm in ("prodigy", "muon") and not self.rates.alike:
            raise ValueError(f"rates: algorithm {algorithm!r} has one rate for all that it trains; leave them out")
        if algorithm == packages.SCHEDULE_FREE and self.decay != "constant":
            raise ValueError(f"decay: {self.decay!r} with algorithm {algorithm!r}, whose average takes its place; "
                             "write constant (a warm-up is fine)")  # fmt: skip
        if algorithm == packages.SCHEDULE_FREE and not self.betas[0] > 0:
            raise ValueError(f"betas: the first must be above 0 with algorithm {algorithm!r}, got {self.betas}")
        if algorithm == "adafactor" and self.adafactor.relative_step and (self.decay != "constant" or self.warmup):
            raise ValueError("adafactor.relative_step: true makes the rate itself; write decay: constant and warmup: 0")

    def build(
        self,
        parameters: Iterable[nn.Parameter],
        hidden: Iterable[Tensor] = (),
        names: Mapping[Tensor, str] | None = None,
    ) -> torch.optim.Optimizer:
        """The optimizer; biases and norms (one-dimensional parameters) are not decayed.

        `hidden`: those that are matrices of hidden layers; `names`: of parameters, for rates by part. Raises ValueError
        where `muon` has no matrices to train, a package is missing, or rates are of parts that do not train.
        """
        trained = [p for p in parameters if p.requires_grad]
        own = set(hidden) if self.algorithm == "muon" else set[Tensor]()
        matrices, trained = [p for p in trained if p in own], [p for p in trained if p not in own]
        if self.algorithm == "muon" and not matrices:
            raise ValueError(NO_HIDDEN)
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [part for g in groups if g["params"] for part in self._parts(g, names or {})]
        if not self.rates.alike:
            self.rates.check([(names or {})[p] for p in trained])
        if self.algorithm == "adamw8bit":
            return _bitsandbytes().optim.AdamW8bit(groups, lr=self.lr, betas=self.betas, eps=self.eps)
        if self.algorithm == "muon":
            return Muon(
                matrices, groups, self.muon, weight_decay=self.weight_decay,
                lr=self.lr, betas=self.betas, eps=self.eps, fused=self.fused,
            )  # fmt: skip
        if self.algorithm == "lion":
            return Lion(groups, lr=self.lr, betas=self.betas)
        if self.algorithm == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.betas[0])
        if self.algorithm == "adafactor":
            return packages.build_adafactor(groups, self.lr, self.adafactor)
        if self.algorithm == "came":
            return packages.build_came(groups, self.lr, self.betas, self.came)
        if self.algorithm == "prodigy":
            return packages.build_prodigy(groups, self.lr, self.betas, self.eps, self.prodigy)
        if self.algorithm == packages.SCHEDULE_FREE:
            return packages.build_schedule_free(groups, self.lr, self.betas, self.eps, self.schedule_free)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=self.fused)

    def lr_at(self, step: int, steps: int) -> float:
        """The rate of optimizer step `step` (from 0) of a run of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * self.course.share(self.decay, step, steps, self.warmup, self.final)

    def _parts(self, group: dict[str, Any], names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
        """A group as one for each rate, which is its `share` of the run's."""
        if self.rates.alike:
            return [group]
        found: dict[float, list[Tensor]] = {}
        for p in group["params"]:
            found.setdefault(self.rates.share(names[p], self.lr), []).append(p)
        return [{**group, "params": those, "share": share} for share, those in found.items()]


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated gradient, with decoupled weight decay (Chen et al. 2023, algorithm 2)."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                direction = torch.lerp(p.grad, moment, first).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                moment.lerp_(p.grad, 1 - second)


def _bitsandbytes() -> Any:
    return bitsandbytes("train.optim.algorithm: 'adamw8bit'")


def kinds_of(optimizer: torch.optim.Optimizer, p: Tensor, kinds: Sequence[str]) -> list[str]:
    """Of all kinds of state in a checkpoint those of a parameter: Muon's matrices have another than the rest."""
    if packages.is_whole(optimizer):
        return packages.kinds_of(p, kinds)
    if not isinstance(optimizer, Muon):
        return list(kinds)
    return [kind for kind in kinds if (kind == "momentum_buffer") == optimizer.has(p)]


def read_state(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """The state of a parameter that has one value a weight, in float32 where it is kept in 8 bits.

    Of optimizers that need whole parameters also means of rows and columns.
    """
    if packages.is_whole(optimizer):
        return packages.whole_state(optimizer, p)
    found, held = {}, optimizer.state.get(p, {})
    for name, value in held.items():
        if not (isinstance(value, Tensor) and value.ndim and value.shape == p.shape):
            continue
        if value.dtype == torch.uint8:
            number = name.removeprefix("state")
            scale, code = held[f"absmax{number}"], held[f"qmap{number}"]
            value = _bitsandbytes().functional.dequantize_blockwise(value, absmax=scale, code=code, blocksize=BLOCK)
        found[name] = value
    return found


def write_state(optimizer: torch.optim.Optimizer, p: Tensor, values: dict[str, Tensor], step: float | None) -> None:
    """Undo `read_state`: values shaped like the parameter, and the number of updates."""
    if packages.is_whole(optimizer):
        packages.set_whole_state(optimizer, p, values, step)
        return
    optimizer.state[p] = {}
    if not values or "state1" not in values:
        optimizer.state[p] = dict(values)
        if step is not None and not (isinstance(optimizer, Muon) and optimizer.has(p)):
            optimizer.state[p]["step"] = torch.tensor(step, dtype=torch.float32)
        return
    eight: Any = optimizer
    at = [(g, i) for g, group in enumerate(eight.param_groups) for i, q in enumerate(group["params"]) if q is p]
    eight.init_state(eight.param_groups[at[0][0]], p, *at[0])
    held = eight.state[p]
    held["step"] = int(step or 0)
    for name, value in values.items():
        if held[name].dtype == torch.uint8:
            number = name.removeprefix("state")
            packed, how = _bitsandbytes().functional.quantize_blockwise(
                value, code=held[f"qmap{number}"], blocksize=BLOCK
            )
            held[name].copy_(packed)
            held[f"absmax{number}"].copy_(how.absmax)
        else:
            held[name].copy_(value)
