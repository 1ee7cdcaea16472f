"""Which steps a picture takes: the model's own times, and the guidance of its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from ldm.checkpoint.scheduler_classes import OwnSampler, Plan
from ldm.checkpoint.students import FewSteps
from ldm.diffusion.schedule import Schedule
from ldm.models.network import Network
from ldm.models.transformers.base import Transformer
from ldm.sampling.guidance import (
    classifier_free,
    interval_of_steps,
    of_text_and_picture,
    perpendicular,
    projected,
    pushed,
    skip_layers,
    times_of,
)
from ldm.sampling.registry import lookup
from ldm.sampling.settings import Settings
from ldm.sampling.times import times as spaced
from ldm.types import Cond, Denoise, Net


@dataclass(frozen=True)
class OwnSteps:
    """How a model's own scheduler spaces DDIM's and DDPM's times, as published pipelines do; None is the sampler's way.

    `student` and `own` are the samplers of a distilled model and of its own scheduler's class.
    """

    spacing: str | None = None
    offset: int = 0
    end: Literal["data", "first"] | None = None
    student: FewSteps | None = None
    own: OwnSampler | None = None

    def plan(self, settings: Settings, schedule: Schedule) -> Plan:
        """The model's times for the settings' sampler; none of its own where the settings say a spacing."""
        sampler = settings.sampler
        if settings.spacing is not None:
            return Plan()
        if self.student is not None and sampler == self.student.sampler and not self.student.halved:
            return Plan(self.student.times(schedule, settings.steps))
        if self.own is not None and sampler == self.own.name:
            return self.own.plan(schedule, settings.steps)
        known = self.spacing if sampler in ("ddim", "ddpm") else None
        path = None if known is None else spaced(schedule, settings.steps, known, offset=self.offset)
        return Plan(path, self.end if sampler == "ddim" else None)


def visited(plan: Plan, settings: Settings, schedule: Schedule) -> list[float]:
    """The times at which the network is told to answer; solvers may ask at others between them."""
    path = plan.times
    if path is None:
        path = spaced(schedule, settings.steps, settings.spacing or lookup(settings.sampler).spacing)
    return [float(int(t)) for t in path] if plan.whole else list(path)


def skipped(network: Network, net: Callable[..., Tensor], settings: Settings) -> Net | None:
    """The network, called as `net` does, without the settings' blocks; None where they name none.

    Raises ValueError for a block that there is not, and for a network without skip-layer guidance.
    """
    if not settings.skip_layers:
        return None
    if not isinstance(network, Transformer):
        raise ValueError(f"skip_layers: the {network.title} has no skip-layer guidance; transformers have")
    network.without(settings.skip_layers)
    return partial(net, skip=frozenset(settings.skip_layers))


def guided(
    denoise: Denoise,
    settings: Settings,
    schedule: Schedule,
    of: Callable[[str], Cond],
    without: Denoise | None = None,
    path: Sequence[float] | None = None,
) -> Denoise:
    """The estimate of x_0 under the settings' guidance; `of` gives the conditioning of a prompt.

    `without`: the estimate without the blocks that skip-layer guidance leaves out, at some of the times `path`.
    """
    scale, push = settings.guidance, None
    if settings.image_guidance is not None:
        told = (of(settings.negative), scale, settings.image_guidance, settings.rescale)
        return of_text_and_picture(denoise, *told, times_of(settings.interval, schedule.last))
    if without is not None:
        path = visited(Plan(path), settings, schedule)
        push = skip_layers(without, settings.skip_scale, interval_of_steps(path, settings.skip_interval))
    if scale == 1 and settings.guide != "perpendicular":
        return denoise if push is None else pushed(denoise, push)
    interval = times_of(settings.interval, schedule.last)
    negative = of(settings.negative)
    if settings.guide == "cfg":
        return classifier_free(denoise, negative, scale, settings.rescale, interval, push)
    if settings.guide == "projected":
        return projected(denoise, negative, scale, interval=interval, push=push)
    return perpendicular(denoise, of(""), negative, scale, interval=interval, push=push)
