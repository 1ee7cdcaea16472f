"""What the distillations share: a network with its process, a guided teacher, a target that follows the student.

Legend: w guidance strength of distillation papers, the guidance scale - 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.prediction import broadcast
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Schedule
from ldm.rng import Rng
from ldm.sampling.guidance import together
from ldm.types import Cond, Net


@dataclass(frozen=True)
class Estimator:
    """A network as estimates of x_0 and of the noise; `conditioned` on w through cond "guidance".

    `as_scale`: it is told the guidance scale, w + 1 (FLUX.1).
    """

    net: Net
    process: Process
    conditioned: bool = False
    as_scale: bool = False

    def seen(self, cond: Cond, w: Tensor) -> Cond:
        """The conditioning with w, for a network that takes it."""
        return {**cond, "guidance": w + 1 if self.as_scale else w} if self.conditioned else cond

    def out(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's own answer, of as many channels as x: without a learned variance (PixArt)."""
        if x.dim() == 4 and not x.is_meta and torch.is_autocast_enabled(x.device.type):  # as in the denoising loss
            x = x.contiguous(memory_format=torch.channels_last)
        return self.net(x, t, cond)[:, : x.shape[1]]

    def both(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """(x_0, noise), float32."""
        return split(self.process, self.out(x, t, cond), x, t)


class Teacher:
    """A frozen network under classifier-free guidance c + w (c - u), or one that takes w itself.

    Not an nn.Module: it stays outside the engine.
    """

    def __init__(self, estimator: Estimator, empty: Cond | None) -> None:
        """`empty`: the conditioning without a prompt, batch 1; None means no guidance, whatever w is."""
        self.estimator, self._empty = estimator, empty

    @torch.no_grad()
    def both(self, x: Tensor, t: Tensor, cond: Cond, w: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, noise) under guidance w (B,), float32.

        Outputs are combined: at fixed x estimates of x_0 and of the noise are affine in them.
        """
        own = self.estimator
        if own.conditioned or self._empty is None:
            return own.both(x, t, own.seen(cond, w))
        empty = {k: v.to(x.device) for k, v in self._empty.items()}
        c, u = together(own.out, x, t, [cond, empty])
        out = c.float() + broadcast(w.to(x.device), x) * (c.float() - u.float())
        return split(own.process, out, x, t)


def split(process: Process, out: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_0, noise) that a network's output means at x, at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    alpha, sigma = process.schedule.alpha_sigma(t, wide)
    out, x = out.to(wide), x.to(wide)
    return process.prediction.x0(out, x, alpha, sigma), process.prediction.noise(out, x, alpha, sigma)


def place(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """alpha_t x_0 + sigma_t noise: where DDIM's step arrives (arXiv 2010.02502, eq. 12 with eta 0)."""
    alpha, sigma = (broadcast(v, x0) for v in schedule.alpha_sigma(t, x0.dtype))
    return alpha * x0 + sigma * noise


def solver_times(schedule: Schedule, steps: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """A uniform pair of neighbours (t_{n+k}, t_n) of a solver of `steps` steps from uniform u (B,).

    k = T // steps, t_{n+k} in {k - 1, 2k - 1, ...}, t_n = max(t_{n+k} - k, 0) (arXiv 2310.04378, section 4.3). A flow's
    times are real and start at k.
    """
    index, stride = (u.double() * steps).long().clamp(max=steps - 1), solver_stride(schedule, steps)
    if schedule.discrete:
        late = (index + 1) * int(stride) - 1
        return late, (late - int(stride)).clamp(min=0)
    return ((index + 1) * stride).float(), (index * stride).float()


def solver_stride(schedule: Schedule, steps: int) -> int | float:
    """k: time between neighbours of a solver of `steps` steps."""
    return schedule.steps // steps if schedule.discrete else schedule.last / steps


def check_range(name: str, value: tuple[float, float]) -> None:
    """Raise ValueError unless 0 <= low <= high."""
    low, high = value
    if not 0 <= low <= high:
        raise ValueError(f"{name} must be [low, high] with 0 <= low <= high, got {list(value)}")


def guidance_of(rng: Rng, span: tuple[float, float], device: torch.device) -> Tensor:
    """Uniform w (B,) in the range."""
    low, high = span
    return (low + (high - low) * rng.uniform("guidance")).to(device)


class Target:
    """The target network's own whole copy of what trains, an exponential average of it (Song et al. 2023, eq. 8).

    Every rank holds it whole and moves it by the same whole weights after each step, so it is the same at every ZeRO
    stage; its size is that of the trained weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """`weights`: the copy's own parameters by the names that the trained ones have below `trained`."""
        self.decay, self._weights = decay, dict(weights)
        self._done: int | None = None

    @torch.no_grad()
    def follow(self, step: int, whole: Iterator[tuple[str, Tensor]]) -> None:
        """target <- decay target + (1 - decay) trained, once for each optimizer step; `whole` is collective."""
        if self._done is not None and step > self._done:
            for name, value in whole:
                own = self._weights[name]
                own.lerp_(value.to(own), 1.0 - self.decay)
        self._done = step

    def tensors(self) -> dict[str, Tensor]:
        """What resuming needs."""
        return {f"target.{name}": value.detach() for name, value in self._weights.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `tensors`; the next `follow` only takes note of its step. Raises ValueError when one is missing."""
        missing = [name for name in self._weights if f"target.{name}" not in tensors]
        if missing:
            raise ValueError(f"checkpoint has no target weights {missing[:3]}: it is of another kind of run")
        for name, value in self._weights.items():
            value.copy_(tensors[f"target.{name}"])
        self._done = None
