"""Optimizers of other packages, imported when they are asked for: Adafactor, CAME, Prodigy, schedule-free AdamW.

What each keeps decides where it may be divided. Schedule-free AdamW has values for each weight and numbers for each
group, so that ZeRO 1 and 2 may cut it anywhere. Adafactor and CAME keep means over the rows and columns of a matrix,
and Prodigy one estimate from all weights: for them parameters must be whole on every rank, which is stage 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.train.engine_config import EngineConfig

WHOLE = ("adafactor", "came", "prodigy")
"""Algorithms that need whole parameters."""
SCHEDULE_FREE = "adamw_schedule_free"
PACKAGED = (*WHOLE, SCHEDULE_FREE)
_WHY = {
    "adafactor": "keeps means over rows and columns of whole matrices",
    "came": "keeps means over rows and columns of whole matrices",
    "prodigy": "finds one step size from all weights together",
    SCHEDULE_FREE: "counts steps and weights of its average for each group",
}
_GROUP = ("step", "k", "d", "d_max", "d_numerator", "weight_sum", "lr_max")
"""Numbers that the packages keep for a group of parameters, beside its settings."""


@dataclass(frozen=True, kw_only=True)
class AdafactorConfig:
    """Adafactor (Shazeer & Stern 2018), as transformers has it.

    `scale_parameter`: the rate is times the root mean square of each matrix. `relative_step`: the rate is
    min(0.01, 1 / sqrt(step)) instead of `lr` and its schedule, with `warmup_init` 1e-6 step at first. `beta1`: null is
    no first moment. `betas` of the others have no meaning here: the second moment's is 1 - step^`decay_rate`.
    """

    scale_parameter: bool = False
    relative_step: bool = False
    warmup_init: bool = False
    beta1: float | None = None
    clip_threshold: float = 1.0
    """Root mean square of an update above which it is scaled down to it."""
    decay_rate: float = -0.8

    def __post_init__(self) -> None:
        if self.warmup_init and not self.relative_step:
            raise ValueError("warmup_init: true needs relative_step: true")
        if self.beta1 is not None and not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1 must be in [0, 1) or null, got {self.beta1}")
        if not self.clip_threshold > 0:
            raise ValueError(f"clip_threshold must be above 0, got {self.clip_threshold}")
        if not self.decay_rate < 0:
            raise ValueError(f"decay_rate must be below 0, got {self.decay_rate}")


@dataclass(frozen=True, kw_only=True)
class CameConfig:
    """CAME (Luo et al. 2023, arXiv 2307.02047): `beta3` is of its confidence; the first two are `betas`."""

    beta3: float = 0.9999
    clip_threshold: float = 1.0
    """Root mean square of an update above which it is scaled down to it."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta3 < 1:
            raise ValueError(f"beta3 must be in [0, 1), got {self.beta3}")
        if not self.clip_threshold > 0:
            raise ValueError(f"clip_threshold must be above 0, got {self.clip_threshold}")


@dataclass(frozen=True, kw_only=True)
class ProdigyConfig:
    """Prodigy (Mishchenko & Defazio 2023, arXiv 2306.06101), whose estimate d multiplies `lr`, which is 1 then.

    `d_coef` multiplies the estimate, the usual thing to tune. `beta3`: null is sqrt of the second of `betas`.
    """

    d0: float = 1e-6
    """The estimate d at first."""
    d_coef: float = 1.0
    beta3: float | None = None
    growth_rate: float | None = None
    """By how much d may grow in a step; null is no bound."""
    bias_correction: bool = False
    """Whether Adam's bias correction is made."""
    safeguard_warmup: bool = False
    """Whether the rate's warm-up is left out of d's estimate."""

    def __post_init__(self) -> None:
        for name in ("d0", "d_coef"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.beta3 is not None and not 0 <= self.beta3 < 1:
            raise ValueError(f"beta3 must be in [0, 1) or null, got {self.beta3}")
        if self.growth_rate is not None and not self.growth_rate > 1:
            raise ValueError(f"growth_rate must be above 1 or null (no bound), got {self.growth_rate}")


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeConfig:
    """Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682): the weight of a step in its average is
    step^`r` times its highest rate so far to the power `weight_lr_power`; the interpolation is the first of `betas`.
    """

    r: float = 0.0
    weight_lr_power: float = 2.0

    def __post_init__(self) -> None:
        for name in ("r", "weight_lr_power"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


def check_divided(algorithm: str, config: EngineConfig, world: int) -> None:
    """Raise ValueError where the state of an algorithm cannot be divided as configured."""
    stage = config.effective(world).zero_stage
    if algorithm not in PACKAGED or stage == 0 or (algorithm == SCHEDULE_FREE and stage < 3):
        return
    allowed = "0, 1 or 2" if algorithm == SCHEDULE_FREE else "0"
    # One process computes as stage 0 unless one of these asks for more.
    keys = [k for k in ("offload_optimizer", "offload_parameters") if getattr(config, k)]
    keys += ["precision fp16"] if config.precision == "fp16" else []
    more = f" without {' and '.join(keys)}" if keys else ""
    raise ValueError(
        f"train.optim.algorithm: {algorithm!r} {_WHY[algorithm]}: it needs train.engine.zero_stage {allowed}{more}, "
        f"got {config.zero_stage}"
    )


def package(algorithm: str) -> Any:
    """The module that has an algorithm. Raises ValueError naming the extra where it is missing."""
    name, extra = ("transformers", "transformers") if algorithm == "adafactor" else ("pytorch_optimizer", "optimizers")
    try:
        if algorithm == "adafactor":
            import transformers.optimization as found
        else:
            import pytorch_optimizer as found  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError:
        raise ValueError(
            f"train.optim.algorithm: {algorithm!r} needs the package {name}: pip install 'ldm[{extra}]'"
        ) from None
    return found


def build_adafactor(groups: list[dict[str, Any]], lr: float, config: AdafactorConfig) -> torch.optim.Optimizer:
    """Of groups with their weight decay."""
    return package("adafactor").Adafactor(
        groups, lr=None if config.relative_step else lr, scale_parameter=config.scale_parameter,
        relative_step=config.relative_step, warmup_init=config.warmup_init, beta1=config.beta1,
        clip_threshold=config.clip_threshold, decay_rate=config.decay_rate,
    )  # fmt: skip


def build_came(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], config: CameConfig
) -> torch.optim.Optimizer:
    """Of groups with their weight decay, which is decoupled."""
    found = package("came")
    return found.CAME(groups, lr=lr, betas=(*betas, config.beta3), clip_threshold=config.clip_threshold)


def build_prodigy(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, config: ProdigyConfig
) -> torch.optim.Optimizer:
    """Of groups with their weight decay, which is decoupled."""
    found = package("prodigy")
    return found.Prodigy(
        groups, lr=lr, betas=betas, beta3=config.beta3, d0=config.d0, d_coef=config.d_coef, eps=eps,
        growth_rate=math.inf if config.growth_rate is None else config.growth_rate,
        bias_correction=config.bias_correction, safeguard_warmup=config.safeguard_warmup,
    )  # fmt: skip


def build_schedule_free(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, config: ScheduleFreeConfig
) -> torch.optim.Optimizer:
    """Of groups with their weight decay; weights are those that gradients are taken at, y, from the first step on."""
    found = package(SCHEDULE_FREE)
    return found.ScheduleFreeAdamW(
        groups, lr=lr, betas=betas, eps=eps, r=config.r, weight_lr_power=config.weight_lr_power
    )


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its weights in training are not the ones to use."""
    return type(optimizer).__name__ == "ScheduleFreeAdamW"


def is_whole(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of those that need whole parameters."""
    return type(optimizer).__name__ in ("Adafactor", "CAME", "Prodigy")


@torch.no_grad()
def averaged(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor]) -> list[Tensor]:
    """The averages x of schedule-free training, laid out like the masters y: y = (1 - beta) z + beta x."""
    beta = {p: group["betas"][0] for group in optimizer.param_groups for p in group["params"]}
    found = []
    for master in masters:
        z = optimizer.state.get(master, {}).get("z")
        plain = master.detach()
        found.append(plain.clone() if z is None else plain.lerp(z, 1 - 1 / beta[master]))
    return found


def group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """What a checkpoint keeps of each group; of torch's own optimizers nothing."""
    if not (is_schedule_free(optimizer) or is_whole(optimizer)):
        return []
    return [{k: float(group[k]) for k in _GROUP if k in group} for group in optimizer.param_groups]


def set_group_numbers(optimizer: torch.optim.Optimizer, numbers: Sequence[dict[str, float]]) -> None:
    """Undo `group_numbers`."""
    for group, kept in zip(optimizer.param_groups, numbers):
        for name, value in kept.items():
            before = group.get(name)
            if name == "d_numerator":
                device = group["params"][0].device
                group[name] = torch.tensor([value], dtype=torch.float32, device=device)
            else:
                group[name] = int(value) if isinstance(before, int) or name in ("step", "k") else value


def shape_of(kind: str, shape: torch.Size) -> torch.Size:
    """Of a state of this name beside a parameter of this shape."""
    if kind.endswith("_row"):
        return shape[:-1]
    return shape[:-2] + shape[-1:] if kind.endswith("_col") else shape


def kinds_of(p: Tensor, kinds: Sequence[str]) -> list[str]:
    """Of all kinds of state those of a whole parameter: matrices have means of rows and columns, others all values."""
    factored = any(kind.endswith(("_row", "_col")) for kind in kinds)
    if not factored or p.ndim > 1:
        return [kind for kind in kinds if not (factored and kind == "exp_avg_sq")]
    return [kind for kind in kinds if not kind.endswith(("_row", "_col"))]


def whole_state(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """The tensors kept for a whole parameter, also those that have another shape."""
    held = optimizer.state.get(p, {})
    return {k: v for k, v in held.items() if isinstance(v, Tensor) and v.shape == shape_of(k, p.shape) and v.ndim}


def set_whole_state(optimizer: torch.optim.Optimizer, p: Tensor, values: dict[str, Tensor], step: float | None) -> None:
    """Undo `whole_state`; `step` is Adafactor's number of updates."""
    optimizer.state[p] = dict(values)
    if not values:
        return
    if type(optimizer).__name__ == "Adafactor":
        optimizer.state[p] |= {"step": int(step or 0), "RMS": 0}
    elif type(optimizer).__name__ == "CAME":
        optimizer.state[p]["RMS"] = 0.0
