"""sd-scripts' loss: its shape, weighting, noises and range of times."""

from __future__ import annotations

from typing import Any

from ldm.interop import common, kohya_flow
from ldm.interop.sheet import Sheet

_WEIGHTINGS = ("min_snr_gamma", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred")


def read(sheet: Sheet, family: str) -> None:
    """Put what the loss is into the sheet."""
    flow = family in ("flux", "sd3")
    if flow:
        kohya_flow.read(sheet, family)
    _weighting(sheet)
    _shape(sheet, flow)
    if flow:
        return
    sheet.keep("noise_offset", "task.options.offset_noise", sheet.number("noise_offset"))
    sheet.keep("ip_noise_gamma", "task.options.input_perturbation", sheet.number("ip_noise_gamma"))
    if levels := sheet.whole("multires_noise_iterations"):
        sheet.near("multires_noise_iterations", "task.options.multires_iterations", levels,
                   "drawn and scaled for each picture; theirs for a batch together")  # fmt: skip
        sheet.keep("multires_noise_discount", "task.options.multires_discount",
                   sheet.number("multires_noise_discount", 0.3))  # fmt: skip
    sheet.leave("off", "multires_noise_iterations", "multires_noise_discount")
    low, high = sheet.whole("min_timestep"), sheet.whole("max_timestep", 1000)
    if low:
        sheet.keep("min_timestep", "task.options.min_timestep", low)
    if high != 1000:
        sheet.keep("max_timestep", "task.options.max_timestep", high)
    sheet.leave("all times", "min_timestep", "max_timestep")


def _weighting(sheet: Sheet) -> None:
    weightings = [key for key in _WEIGHTINGS if sheet.has(key) and sheet.given[key] not in (False, 0)]
    if len(weightings) > 1:
        sheet.refuse(weightings[1], f"beside {weightings[0]}: one weighting of the loss here")
    first = "".join(weightings[:1])
    if first == "min_snr_gamma":
        common.min_snr(sheet, "min_snr_gamma")
    elif first == "debiased_estimation_loss" and sheet.flag("v_parameterization"):
        sheet.refuse(first, "theirs of a network that predicts v is 1 / (SNR + 1), which is no weighting here")
    elif first == "debiased_estimation_loss":
        sheet.near("debiased_estimation_loss", "task.weighting", {"kind": "debiased"},
                   "of a network that predicts noise; theirs takes SNRs above 1000 as 1000")  # fmt: skip
    elif first:
        sheet.keep(first, "task.weighting", {"kind": "snr"}, "1 on the error of the noise")
    sheet.leave("off", *[key for key in _WEIGHTINGS if key not in weightings])


def _shape(sheet: Sheet, flow: bool) -> None:
    """`loss_type`; the threshold's schedule by SNR is not scaled in theirs, and not of flows."""
    kind = sheet.text("loss_type", "l2")
    of_huber = ("huber_schedule", "huber_c", "huber_scale")
    if kind in ("huber", "smooth_l1"):
        schedule = sheet.text("huber_schedule", "snr")
        told: dict[str, Any] = {"kind": kind, "schedule": schedule, "c": sheet.number("huber_c", 0.1)}
        if schedule not in ("constant", "exponential", "snr") or (schedule == "snr" and flow):
            sheet.refuse("huber_schedule", f"{schedule}: theirs has none of flows; constant and exponential are")
            sheet.leave("told with huber_schedule", "loss_type", *of_huber)
            return
        told |= {"scale": sheet.number("huber_scale", 1.0)} if schedule != "snr" else {}
        sheet.keep("loss_type", "task.options.loss", told)
    elif kind == "l1":
        sheet.keep("loss_type", "task.options.loss", {"kind": "l1"})
    elif kind != "l2":
        sheet.refuse("loss_type", f"{kind}: not here; l2, l1, huber and smooth_l1 are")
    sheet.leave("as here without it", "loss_type")
    sheet.leave("told with loss_type, or of another", *of_huber)
