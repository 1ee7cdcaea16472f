"""Editing with any base model: img2img, inpainting, DDIM inversion. Prompt-to-prompt is in `prompt_to_prompt`.

Masks are (1 or B, 1, H, W) in latent size, 1 where new content goes and 0 where the picture is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.schedule import Flow, Schedule
from ldm.sampling.run import Node, Run, implied_noise, nodes
from ldm.sampling.solvers import flow
from ldm.sampling.times import check_steps, check_times
from ldm.sampling.times import times as spaced
from ldm.types import Cond, Denoise


def img2img_times(
    schedule: Schedule,
    steps: int,
    strength: float,
    spacing: str = "trailing",
    *,
    times: Sequence[float] | None = None,
) -> list[float]:
    """The last `strength` of the sampler's times; pass them as `times`, and the picture's latents as `start`.

    SDEdit (arXiv 2108.01073). `times` are all of them, where they are not `spacing`'s. A share of the steps that is not
    whole is rounded as diffusers does it: up on flows, down elsewhere. Raises ValueError unless 0 < strength < 1: at 0
    nothing would change, at 1 nothing of the picture would be left.
    """
    if not 0 < strength < 1:
        raise ValueError(
            f"strength must lie strictly between 0 (the picture unchanged) and 1 (the picture ignored), got {strength}"
        )
    every = spaced(schedule, steps, spacing) if times is None else list(times)
    share = steps - int(steps - steps * strength) if isinstance(schedule, Flow) else int(steps * strength + 1e-9)
    keep = max(1, min(steps, share))
    return every[-keep:]


def check_mask(mask: Tensor, latents: Tensor) -> Tensor:
    """The mask as floats. Raises ValueError for a shape that does not fit the latents or values outside [0, 1]."""
    b, _, h, w = latents.shape
    if mask.dim() != 4 or mask.shape[0] not in (1, b) or mask.shape[1] != 1 or mask.shape[2:] != (h, w):
        raise ValueError(f"mask must be (1 or {b}, 1, {h}, {w}), got {tuple(mask.shape)}")
    mask = mask.to(latents)
    if float(mask.min()) < 0 or float(mask.max()) > 1:
        raise ValueError(f"mask must lie in [0, 1], got [{float(mask.min()):g}, {float(mask.max()):g}]")
    return mask


def inpaint(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """A denoiser whose estimate outside the mask is the known latents (B, C, H, W), for any sampler and base model.

    Given `known` as `start` as well, the state outside the mask is at every step the known picture at its noise
    level, and the result there the known picture; `keep` makes it exact to the last bit.
    """
    mask = check_mask(mask, known)

    def masked(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return keep(denoise(x, t, cond), known, mask)

    return masked


def keep(result: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """`result` inside the mask, `known` exactly where the mask is 0, a mixture where it is between."""
    mask = check_mask(mask, known)
    mixed = known + mask * (result - known)
    return torch.where(mask == 0, known, torch.where(mask == 1, result, mixed))


def inpaint_cond(cond: Cond, mask: Tensor, masked_latents: Tensor) -> Cond:
    """The conditioning of a 9-channel inpainting model: "concat" is the mask and the latents of the masked picture."""
    mask = check_mask(mask, masked_latents).expand(len(masked_latents), -1, -1, -1)
    return {**cond, "concat": torch.cat([mask, masked_latents], dim=1)}


@torch.no_grad()
def invert(
    denoise: Denoise,
    x0: Tensor,
    cond: Cond,
    *,
    schedule: Schedule,
    steps: int,
    spacing: str = "trailing",
    times: Sequence[float] | None = None,
    refine: int = 0,
    progress: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """DDIM inversion: the noise from which deterministic DDIM over the same times gives x0 back (DDIM, section 4.3).

    Each step takes the noise estimate of where it leaves; every one of `refine` fixed-point rounds takes that of
    where it arrives instead, which is what sampling will use, at one more call a step (AIDI, arXiv 2309.04907).
    Exact in the limit only without guidance. On flows it is Euler's method on the same ODE, backwards. `times`
    (decreasing, as for sampling) replaces `steps` and `spacing`.
    """
    if refine < 0:
        raise ValueError(f"refine must be at least 0, got {refine}")
    values = spaced(schedule, steps, spacing) if times is None else check_times(schedule, times)
    check_steps(schedule, len(values))
    path = nodes(schedule, values)[::-1]  # from the data to the noise
    run = Run(denoise, cond, schedule, path, _no_noise)
    x = x0
    for i, (a, b) in enumerate(itertools.pairwise(path)):
        run.step = i
        x = _invert_step(run, x, a, b, refine)
        if progress is not None:
            progress(i, x)
    run.check()
    return x


def _invert_step(run: Run, x: Tensor, a: Node, b: Node, refine: int) -> Tensor:
    if isinstance(run.schedule, Flow):
        return _flow_back(run, x, a, b, refine)
    if a.sigma > 0:
        noise = implied_noise(x, run.raw(x, a), a)
    else:  # the data has no time of its own: ask at the first one
        noise = implied_noise(b.alpha * x, run.raw(b.alpha * x, b), b)
    up = flow(x, noise, a, b)
    for _ in range(refine):
        up = flow(x, implied_noise(up, run.raw(up, b), b), a, b)
    return up


def _flow_back(run: Run, x: Tensor, a: Node, b: Node, refine: int) -> Tensor:
    """x_b = x_a + (sigma_b - sigma_a) velocity; where alpha_b is 0 the noise that x_b implies tells nothing."""

    def velocity(at: Tensor, node: Node) -> Tensor:
        return (at - run.raw(at, node)) / node.sigma

    up = x + (b.sigma - a.sigma) * velocity(x, a if a.sigma > 0 else b)  # data tells no velocity
    for _ in range(refine):
        up = x + (b.sigma - a.sigma) * velocity(up, b)
    return up


def _no_noise(step: int) -> Tensor:
    raise AssertionError(f"inversion draws no noise (step {step})")
