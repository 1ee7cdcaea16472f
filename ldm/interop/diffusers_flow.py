"""Times and weights of diffusers' SD3 and FLUX.1 scripts."""

from __future__ import annotations

from typing import Any

from ldm.interop.sheet import Sheet

SCHEMES = ("none", "logit_normal", "mode", "cosmap", "sigma_sqrt")


def read(sheet: Sheet, family: str) -> None:
    """`weighting_scheme` and what belongs to it.

    Times are drawn below the scheduler's shift, as here; its u counts from the noise, so that a mean turns round. With
    `precondition_outputs` (SD3's default) the loss is that of x_0, and a scheme's weight is of it.
    """
    scheme = sheet.text("weighting_scheme", "logit_normal" if family == "sd3" else "none")
    x0 = family == "sd3" and sheet.whole("precondition_outputs", 1) == 1
    if family == "flux":
        sheet.keep("guidance_scale", "task.options.guidance", sheet.number("guidance_scale", 3.5),
                   "what the network is told while it trains")  # fmt: skip
    length = sheet.whole("max_sequence_length", 77 if family == "sd3" else 512)
    if family == "sd3" and length <= 256:
        sheet.near("max_sequence_length", "", None, f"T5 is given the family's own length here, theirs {length} tokens")
    if scheme not in SCHEMES:
        sheet.refuse("weighting_scheme", f"{scheme}: not here; {', '.join(SCHEMES)} are")
        return
    density: dict[str, Any] = {"kind": "uniform"}
    weighting: dict[str, Any] = {"kind": "x0"} if x0 else {"kind": "uniform"}
    if scheme == "logit_normal":
        mean = -sheet.number("logit_mean")
        density = {"kind": "logit_normal", "mean": mean or 0.0, "std": sheet.number("logit_std", 1.0)}
    elif scheme == "mode":
        density = {"kind": "mode", "scale": sheet.number("mode_scale", 1.29)}
    elif scheme in ("cosmap", "sigma_sqrt"):
        weighting = {"kind": scheme, "of": "x0" if x0 else "output"}
    sheet.keep("weighting_scheme", "task.density", density)
    if family == "sd3":
        sheet.keep("precondition_outputs", "task.weighting", weighting)
    else:
        sheet.put("task.weighting", weighting)
    sheet.leave("told with weighting_scheme", "logit_mean", "logit_std", "mode_scale")
