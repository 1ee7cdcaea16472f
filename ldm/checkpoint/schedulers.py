"""diffusers' `scheduler_config.json` <-> our schedule and prediction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ldm.checkpoint.scheduler_classes import (
    DEFAULTS,
    FLOW_CLASSES,
    FlowGrid,
    OwnSampler,
    given,
    own_sampler,
    resolved,
)
from ldm.diffusion.prediction import PREDICTIONS, Epsilon, Sample, V, Velocity
from ldm.diffusion.schedule import Betas, Discrete, DynamicShift, Flow

_BETAS: dict[str, Betas] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
FLOW = "FlowMatchEulerDiscreteScheduler"
FLOWS = FLOW_CLASSES
DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
STUDENTS = ("LCMScheduler", "TCDScheduler")
LEARNED = "DDPMScheduler"


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """What a scheduler config says: the process, and how its authors sample from it.

    `last_alpha_one`: the step after the last time ends at alpha_bar = 1, not at alpha_bar[0] (`set_alpha_to_one`).
    `own`: the sampler that the config's class is; None where none here is, for a reason that `unlike` tells.
    """

    schedule: Discrete | Flow
    prediction: Epsilon | V | Sample | Velocity
    spacing: str = "leading"
    offset: int = 0
    last_alpha_one: bool = True
    variance: Literal["fixed", "learned"] = "fixed"
    own: OwnSampler | None = None
    unlike: str = ""


def scheduler_to_diffusers(
    schedule: Discrete | Flow,
    prediction: Epsilon | V | Sample | Velocity,
    cls: str = "DDIMScheduler",
    *,
    variance: Literal["fixed", "learned"] = "fixed",
) -> dict[str, Any]:
    """The config of a diffusers scheduler for a model trained so; a flow's is always of class `FLOW`.

    A learned variance's is of class `LEARNED`, the only one that takes it. Raises ValueError where diffusers has no
    name for it.
    """
    if isinstance(schedule, Flow):
        if not isinstance(prediction, Velocity):
            raise ValueError(f"prediction {prediction.kind!r}: diffusers' flow scheduler takes 'velocity' only")
        dynamic = {}
        if schedule.dynamic is not None:
            dynamic = {"use_dynamic_shifting": True} | {k: getattr(schedule.dynamic, k) for k in DYNAMIC}
        terminal = {} if schedule.terminal is None else {"shift_terminal": schedule.terminal}
        known = {"_class_name": FLOW, "num_train_timesteps": schedule.steps, "shift": schedule.shift}
        return known | dynamic | terminal
    names = {v: k for k, v in _PREDICTIONS.items()}
    if prediction.kind not in names:
        raise ValueError(f"prediction {prediction.kind!r}: diffusers' schedulers take {sorted(names)}")
    betas = {v: k for k, v in _BETAS.items()} | {"quadratic": "scaled_linear"}
    learned = {"variance_type": "learned_range"} if variance == "learned" else {}
    return {
        "_class_name": LEARNED if learned else cls,
        "num_train_timesteps": schedule.steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": betas[schedule.betas],
        "prediction_type": names[prediction.kind],
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "timestep_spacing": "trailing" if schedule.zero_terminal_snr else "leading",
        "steps_offset": 0 if schedule.zero_terminal_snr else 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
        **learned,
    }


def flow_solver(schedule: Flow, order: int = 2) -> dict[str, Any]:
    """The config of diffusers' DPM-Solver++ on a flow's sigmas, for pipelines that take no flow scheduler (U-Nets').

    Raises ValueError for a shift that it does not know.
    """
    if schedule.dynamic is not None or schedule.terminal is not None:
        raise ValueError("schedule: diffusers' solvers on flow sigmas know no dynamic shift and no shift_terminal")
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": schedule.steps,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": schedule.shift,
        "algorithm_type": "dpmsolver++",
        "solver_order": order,
        "final_sigmas_type": "zero",
    }


def scheduler_from_diffusers(
    config: Mapping[str, Any],
    *,
    grid: FlowGrid = "flow",
    mu: Literal["linear", "flux2"] = "linear",
) -> SchedulerSettings:
    """Read a scheduler config; keys that are absent or null have the defaults of diffusers' class.

    Of flows it does not tell all: `grid` says whose sigmas the family's pipeline takes, "flow" the scheduler's own
    (SD3) or "flow_open" 1 ... 1/N (FLUX.1, FLUX.2, Z-Image), and `mu` by what rule it finds a dynamic shift.
    `spacing`, `offset` and `last_alpha_one` are those of diffusers' DDIM on this config, whatever its class.
    Raises ValueError naming the class or the key for a process that is not known. How the class itself draws is `own`;
    where no sampler here does, `unlike` says why, and the process is still the model's.
    """
    settings = resolved(config)
    _check_flow(settings)
    own, unlike = _own(settings, config, grid)
    if settings["_class_name"] in FLOWS or settings.get("use_flow_sigmas"):
        flow = _flow(settings, mu)
        return SchedulerSettings(schedule=flow, prediction=Velocity(), spacing="trailing", own=own, unlike=unlike)
    _one_of(settings, "beta_schedule", _BETAS)
    _one_of(settings, "prediction_type", _PREDICTIONS)
    _one_of(settings | {"timestep_type": settings.get("timestep_type", "discrete")}, "timestep_type", ("discrete",))
    if settings["trained_betas"] is not None:
        raise ValueError("scheduler: trained_betas are not supported; only beta_schedule is")
    variance = config.get("variance_type")
    if variance == "learned":
        raise ValueError("scheduler: variance_type 'learned' is not supported; 'learned_range' is")
    schedule = Discrete(
        betas=_BETAS[settings["beta_schedule"]],
        steps=int(_number(settings, "num_train_timesteps")),
        beta_start=_number(settings, "beta_start"),
        beta_end=_number(settings, "beta_end"),
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr")),
    )
    ddim = given(config, DEFAULTS["DDIMScheduler"])
    _one_of(ddim, "timestep_spacing", ("leading", "linspace", "trailing"))
    return SchedulerSettings(
        schedule=schedule,
        prediction=PREDICTIONS[_PREDICTIONS[settings["prediction_type"]]],
        spacing=ddim["timestep_spacing"],
        offset=int(_number(ddim, "steps_offset")),
        last_alpha_one=bool(ddim["set_alpha_to_one"]),
        variance="learned" if variance == "learned_range" else "fixed",
        own=own,
        unlike=unlike,
    )


def _flow(settings: Mapping[str, Any], mu: Literal["linear", "flux2"]) -> Flow:
    """The flow, with what its shift depends on. Raises ValueError naming the key for what cannot be."""
    steps = int(_number(settings, "num_train_timesteps"))
    shift = _number(settings, "shift" if settings["_class_name"] in FLOWS else "flow_shift")
    terminal = settings.get("shift_terminal") or None
    try:
        dynamic = None
        if settings.get("use_dynamic_shifting"):
            low, high = (int(_number(settings, k)) for k in ("base_image_seq_len", "max_image_seq_len"))
            dynamic = DynamicShift(
                base_shift=_number(settings, "base_shift"),
                max_shift=_number(settings, "max_shift"),
                base_image_seq_len=low,
                max_image_seq_len=high,
                time_shift_type=settings["time_shift_type"],
                mu=mu,
            )
        end = None if terminal is None else _number(settings, "shift_terminal")
        return Flow(steps=steps, shift=shift, dynamic=dynamic, terminal=end)
    except ValueError as error:
        message = str(error).replace("terminal must", "shift_terminal must", 1)
        raise ValueError(message if message.startswith("scheduler") else f"scheduler: {message}") from error


def _own(settings: dict[str, Any], config: Mapping[str, Any], grid: FlowGrid) -> tuple[OwnSampler | None, str]:
    """(how the class draws, or None and why no sampler here draws so)."""
    cls = settings["_class_name"]
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in settings and cls not in FLOWS:
        return None, f"scheduler: {cls} leaves rescale_betas_zero_snr out, which the model is taken to be trained with"
    try:
        return own_sampler(settings, grid), ""
    except ValueError as error:
        if cls in STUDENTS:  # a few-step student is drawn so unless something else is asked for
            raise
        return None, str(error)


def _number(settings: Mapping[str, Any], key: str) -> float:
    value = settings[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"scheduler: {key} {value!r} is not a number")
    return float(value)


def _one_of(settings: Mapping[str, Any], key: str, allowed: Collection[str]) -> None:
    if settings[key] not in allowed:
        raise ValueError(f"scheduler: {key} {settings[key]!r} is not one of {sorted(allowed)}")


def _check_flow(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a flow that runs the other way, or that half of the keys tell of."""
    if settings.get("invert_sigmas"):
        raise ValueError("scheduler: invert_sigmas True is not supported; only False is")
    flow = bool(settings.get("use_flow_sigmas")), settings.get("prediction_type") == "flow_prediction"
    if any(flow) and not all(flow):
        raise ValueError("scheduler: use_flow_sigmas and prediction_type 'flow_prediction' are supported only together")
    if settings["_class_name"] in FLOWS or all(flow):
        return
    for key in ("use_dynamic_shifting", "shift_terminal"):
        if settings.get(key):
            raise ValueError(f"scheduler: {key} {settings[key]!r} needs use_flow_sigmas")
