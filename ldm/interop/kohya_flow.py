"""sd-scripts' settings of flows (SD3, FLUX.1): times, their weights, the guidance that is told."""

from __future__ import annotations

from typing import Any

from ldm.interop.common import SHIFTS, times
from ldm.interop.sheet import Sheet


def read(sheet: Sheet, family: str) -> None:
    """Density, weighting and guidance. What only part of the choices use is told with the choice."""
    if family == "flux":
        guidance = sheet.number("guidance_scale", 3.5)
        sheet.keep("guidance_scale", "task.options.guidance", guidance, "what the network is told while it trains")
        predicted = sheet.text("model_prediction_type", "sigma_scaled")
        if predicted == "raw":
            sheet.keep("model_prediction_type", "task.weighting", {"kind": "uniform"})
        else:
            sheet.refuse("model_prediction_type", f"{predicted}: not here; raw is, the plain loss of the velocity")
    _density(sheet, family)


def _density(sheet: Sheet, family: str) -> None:
    own = SHIFTS.get(family, 1.0)
    how = sheet.text("timestep_sampling", "sigma")
    scale = sheet.number("sigmoid_scale", 1.0)
    shift = sheet.number("discrete_flow_shift", 3.0) if family == "flux" else sheet.number("training_shift", 1.0)
    note = f"the schedule's own shift {own:g} comes on top" if own != 1 else ""
    found: dict[str, Any] | None = None
    if how == "uniform":
        found = times("uniform", own=own)
    elif how == "sigmoid":
        found = times("sigmoid", own=own, std=scale)
    elif how == "shift":
        found = times("sigmoid", own=own, std=scale, shift=shift)
    elif how == "flux_shift" and family == "flux":
        found = {"kind": "flux_shift", "std": scale}
    elif how == "sigma":
        found = _of_scheme(sheet, shift, own)
    if found is None:
        key = "weighting_scheme" if how == "sigma" and sheet.has("weighting_scheme") else "timestep_sampling"
        sheet.refuse(key, f"{sheet.text(key, how)}: not here")
    else:
        sheet.keep("timestep_sampling", "task.density", found, note)
    sheet.leave("told with timestep_sampling", "timestep_sampling", "weighting_scheme", "sigmoid_scale",
                "discrete_flow_shift", "training_shift", "logit_mean", "logit_std", "mode_scale")  # fmt: skip


def _of_scheme(sheet: Sheet, shift: float, own: float) -> dict[str, Any] | None:
    """Times by `weighting_scheme`, below the scheduler's shift; u counts from the noise: a mean turns round."""
    scheme = sheet.text("weighting_scheme", "none")
    if scheme in ("none", "uniform"):
        return times("uniform", shift=shift, own=own)
    if scheme == "logit_normal":
        found = times("sigmoid", shift=shift, own=own, std=sheet.number("logit_std", 1.0))
        return found | {"mean": found["mean"] - sheet.number("logit_mean")}
    return None
