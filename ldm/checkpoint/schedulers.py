"""diffusers' `scheduler_config.json` <-> our schedule and prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ldm.diffusion.prediction import PREDICTIONS, Epsilon, Sample, V, Velocity
from ldm.diffusion.schedule import Betas, Discrete, Flow

_BETAS: dict[str, Betas] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
FLOW = "FlowMatchEulerDiscreteScheduler"
LEARNED = "DDPMScheduler"


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """What a scheduler config says: the process, and how its authors sample from it.

    `last_alpha_one`: the step after the last time ends at alpha_bar = 1, not at alpha_bar[0] (`set_alpha_to_one`).
    """

    schedule: Discrete | Flow
    prediction: Epsilon | V | Sample | Velocity
    spacing: str = "leading"
    offset: int = 0
    last_alpha_one: bool = True
    clip: bool = False
    variance: Literal["fixed", "learned"] = "fixed"


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
        return {"_class_name": FLOW, "num_train_timesteps": schedule.steps, "shift": schedule.shift}
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


def scheduler_from_diffusers(config: Mapping[str, Any]) -> SchedulerSettings:
    """Read a scheduler config; keys that are absent have diffusers' defaults.

    Raises ValueError for a schedule or a prediction that is not known.
    """
    steps = int(config.get("num_train_timesteps", 1000))
    if config.get("_class_name") == FLOW:
        flow = Flow(steps=steps, shift=float(config.get("shift", 1.0)))
        return SchedulerSettings(schedule=flow, prediction=Velocity(), spacing="trailing")
    betas, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if betas not in _BETAS:
        raise ValueError(f"scheduler: beta_schedule {betas!r} is not one of {sorted(_BETAS)}")
    if prediction not in _PREDICTIONS:
        raise ValueError(f"scheduler: prediction_type {prediction!r} is not one of {sorted(_PREDICTIONS)}")
    if config.get("trained_betas") is not None:
        raise ValueError("scheduler: trained_betas are not supported")
    if config.get("variance_type") == "learned":
        raise ValueError("scheduler: variance_type 'learned' is not supported; 'learned_range' is")
    schedule = Discrete(
        betas=_BETAS[betas],
        steps=steps,
        beta_start=float(config.get("beta_start", 0.0001)),
        beta_end=float(config.get("beta_end", 0.02)),
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )
    return SchedulerSettings(
        schedule=schedule,
        prediction=PREDICTIONS[_PREDICTIONS[prediction]],
        spacing=str(config.get("timestep_spacing", "leading")),
        offset=int(config.get("steps_offset", 0)),
        last_alpha_one=bool(config.get("set_alpha_to_one", True)),
        clip=bool(config.get("clip_sample", False)),
        variance="learned" if config.get("variance_type") == "learned_range" else "fixed",
    )
