"""A plan: what a run will need on a cluster, as plain data and as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ldm.plan.counted import Counted
from ldm.plan.hardware import GB
from ldm.plan.links import Wire, advice, wire
from ldm.plan.memory import STAGES, Activations, Layout, Parts, Sizes, largest_micro_batch, memory
from ldm.plan.streaming import Streamed
from ldm.plan.throughput import Cluster, Step, drawing_time, step_time

DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A network that is not trained: its weights in bytes, and operations an image where it runs in training."""

    name: str
    bytes: float
    flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Pictures that are drawn once, before the first step: how many, operations of one, and the rows of a batch."""

    name: str
    count: int
    flops: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is planned. `build(recompute)` makes the trained network on the meta device, `inputs(b)` its arguments.

    `flops` are those of its forward pass for one image; None counts forward and backward as they are, for steps where
    the backward pass is not twice the forward (frozen weights, a teacher in the loss). `samples` of the data (None:
    unknown), each of `sample_bytes`. `drawn` comes before, `then` are rounds that follow, each a job of its own; with
    them `round` names this one. `streamed`: the network that stays as it is below what trains, whose blocks may come
    and go. `asked`: forward passes without gradients beside a step's own, on the average of steps.
    """

    name: str
    build: Callable[[bool], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    flops: float | None
    batch: int
    steps: int
    layout: Layout
    recompute: bool
    precision: torch.dtype
    frozen: tuple[Frozen, ...] = ()
    samples: int | None = None
    sample_bytes: float = 0.0
    warnings: tuple[str, ...] = ()
    drawn: Drawn | None = None
    round: str = ""
    then: tuple[Job, ...] = ()
    streamed: Streamed | None = None
    asked: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One way to divide the run: its memory by part, and the most samples of a forward pass that fit."""

    stage: int
    recompute: bool
    parts: Parts
    largest: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Point:
    """A size of the cluster: time and cost of the whole run. `accumulate` is what it takes to fit.

    `drawing`: seconds before the first step.
    """

    gpus: int
    micro: int
    accumulate: int
    step: Step
    images_per_second: float
    days: float
    cost: float | None
    drawing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Round:
    """One of several rounds of a run: its steps, and on the cluster that was asked for seconds a step, days, bytes."""

    name: str
    steps: int
    step: float | None
    days: float | None
    memory: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer. Sizes in bytes, times in seconds; `point` is the cluster that was asked for."""

    name: str
    cluster: Cluster
    weights: int
    flops_per_image: float
    frozen_flops_per_image: float
    batch: int
    steps: int
    fits: tuple[Fit, ...]
    chosen: Fit
    wire: Wire
    point: Point | None
    sweep: tuple[Point, ...]
    utilisation: float
    samples: int | None
    data_bytes: float | None
    data_rate: float
    warnings: tuple[str, ...]
    drawn: Drawn | None = None
    rounds: tuple[Round, ...] = ()

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class Planner:
    """Counts a job once, without and with recomputation (or one of them alone), and answers for any cluster."""

    def __init__(
        self,
        job: Job,
        cluster: Cluster,
        price: float | None = None,
        recomputing: Sequence[bool] = (False, True),
        counted: Counted | None = None,
    ) -> None:
        """`counted`: of a job that takes the same steps, in place of counting this one's."""
        self.job, self.cluster, self.price = job, cluster, price
        alone = job.batch // (cluster.world * job.layout.accumulate) <= 1
        gpu = not cluster.hardware.host
        if counted is None:
            counted = Counted(job.build, job.inputs, job.precision, gpu=gpu, recomputing=recomputing, one=alone)
        self._counted = counted
        self.frozen_bytes = sum(f.bytes for f in job.frozen) + (job.streamed.held if job.streamed is not None else 0.0)
        self.limit = cluster.hardware.memory * GB * cluster.assumptions.usable

    @cached_property
    def frozen_flops(self) -> float:
        """Operations an image without gradients: of frozen networks, and of passes beside a step's own."""
        frozen = sum(f.flops for f in self.job.frozen)
        if not self.job.asked:
            return frozen
        once = self.activations[min(self.activations)].few
        return frozen + self.job.asked * sum(op.flops for op in once.ops if not op.backward) / once.batch

    @property
    def sizes(self) -> Sizes:
        """Numbers of trained weights."""
        return self._counted.sizes

    @property
    def activations(self) -> dict[bool, Activations]:
        """Counts by whether blocks are computed again."""
        return self._counted.activations

    def plan(self) -> Plan:
        """Everything for the cluster that was asked for."""
        job, layout = self.job, replace(self.job.layout, world=self.cluster.world)
        micro = max(1, job.batch // (layout.world * layout.accumulate))
        fits = tuple(self.fit(stage, recompute, layout, micro) for recompute in self.activations for stage in STAGES)
        chosen = next(f for f in fits if (f.stage, f.recompute) == (layout.stage, job.recompute))
        point = self.point(self.cluster)
        each = self._flops()
        used = point.images_per_second * each / self.cluster.world if point else 0.0
        peak = self.cluster.hardware.matmul if self._half else self.cluster.hardware.matmul_fp32
        rate = (point.images_per_second if point else 0.0) * job.sample_bytes
        return Plan(
            name=job.name,
            cluster=self.cluster,
            weights=self.sizes.weights,
            flops_per_image=each,
            frozen_flops_per_image=self.frozen_flops,
            batch=job.batch,
            steps=job.steps,
            fits=fits,
            chosen=chosen,
            wire=wire(
                self.sizes.weights, layout.stage, layout.world,
                element=2 if layout.half and layout.stage else 4, live=layout.live,
                micro_steps=point.accumulate if point else layout.accumulate, zeropp=layout.zeropp,
                node=self.cluster.per_node,
            ),
            point=point,
            sweep=self.sweep(),
            utilisation=used / (peak * 1e12),
            samples=job.samples,
            data_bytes=None if job.samples is None else job.samples * job.sample_bytes,
            data_rate=rate,
            warnings=(*job.warnings, *self._warnings(fits, chosen, micro, point)),
            drawn=job.drawn,
        )  # fmt: skip

    def _flops(self) -> float:
        """Of forward and backward for one image, without what is computed twice to save memory."""
        if self.job.flops is not None:
            return 3 * self.job.flops
        counted = self.activations[min(self.activations)].few
        return sum(op.flops for op in counted.ops) / counted.batch

    @property
    def _half(self) -> bool:
        return self.job.precision != torch.float32

    def fit(self, stage: int, recompute: bool, layout: Layout, micro: int) -> Fit:
        """Memory at one stage, with or without checkpointing."""
        # Options that a stage does not have do not count there.
        layout = replace(
            layout, stage=stage,
            offload_optimizer=layout.offload_optimizer and stage > 0,
            offload_parameters=layout.offload_parameters and stage == 3,
        )  # fmt: skip
        counted = self.activations[recompute]
        parts = memory(self.sizes, counted, micro, layout, self.frozen_bytes)
        if self.job.streamed is not None:
            parts = replace(parts, host=parts.host + self.job.streamed.host)
        largest = largest_micro_batch(self.sizes, counted, layout, self.limit, self.frozen_bytes)
        return Fit(stage=stage, recompute=recompute, parts=parts, largest=largest, fits=parts.total <= self.limit)

    def point(self, cluster: Cluster) -> Point | None:
        """Time and cost on a cluster with the configured stage; None where the batch does not divide or nothing fits.

        A micro-batch that does not fit is accumulated in more parts.
        """
        job, world = self.job, cluster.world
        layout = replace(job.layout, world=world)
        if job.batch % world:
            return None
        counted = self.activations[job.recompute]
        each = job.batch // world
        most = max(
            largest_micro_batch(self.sizes, counted, replace(layout, accumulate=a), self.limit, self.frozen_bytes)
            for a in {layout.accumulate, 2}
        )
        micros = range(min(most, each // layout.accumulate), 0, -1)
        micro = next((m for m in micros if each % m == 0), None)
        if micro is None:
            return None
        accumulate = each // micro
        step = step_time(
            activations=counted, micro=each // accumulate, accumulate=accumulate, weights=self.sizes.weights,
            stage=layout.stage, cluster=cluster, half=self._half, copies=layout.copies,
            frozen_flops=self.frozen_flops, element=2 if layout.half and layout.stage else 4, live=layout.live,
            zeropp=layout.zeropp, streamed=job.streamed, offload=layout.offload_optimizer,
        )  # fmt: skip
        drawn = job.drawn
        drawing = 0.0 if drawn is None else drawing_time(counted, drawn.flops, drawn.count, drawn.rows, cluster)
        days = (job.steps * step.total + drawing) / DAY
        return Point(
            gpus=world,
            micro=each // accumulate,
            accumulate=accumulate,
            step=step,
            images_per_second=job.batch / step.total,
            days=days,
            cost=None if self.price is None else days * 24 * world * self.price,
            drawing=drawing,
        )

    def sweep(self) -> tuple[Point, ...]:
        """The run on one node, two, four and so on, as far as the batch divides."""
        found = []
        for power in range(12):
            point = self.point(replace(self.cluster, nodes=2**power))
            if point is not None:
                found.append(point)
        return tuple(found)

    def _warnings(self, fits: Sequence[Fit], chosen: Fit, micro: int, point: Point | None) -> list[str]:
        job, world, accumulate = self.job, self.cluster.world, self.job.layout.accumulate
        said = []
        if job.batch % (world * accumulate):
            parts = world * accumulate
            near = max(parts, parts * round(job.batch / parts))
            said.append(
                f"train.batch: {job.batch} does not divide by {world} GPUs x accumulate {accumulate}; {near} does"
            )
        if job.batch < world:
            said.append(
                f"train.batch: {job.batch} is smaller than the number of GPUs, {world}: some have nothing to do"
            )
        if chosen.stage == 3:
            said += advice(
                job.layout.zeropp, weights=self.sizes.weights, live=job.layout.live,
                accumulate=point.accumulate if point else accumulate, world=world, node=self.cluster.per_node,
            )  # fmt: skip
        if not chosen.fits:
            other = next((f for f in fits if f.fits), None)
            hint = ""
            if other is not None:
                hint = f"; it would with zero_stage {other.stage}{' and gradient_checkpointing' * other.recompute}"
            most = f"at most {chosen.largest} do" if chosen.largest else "not even 1 does"
            said.append(f"{micro} images a forward pass do not fit, {most}{hint}")
            if point is not None:
                said.append(f"times are those of accumulate {point.accumulate} with {point.micro} images")
        below = next((f for f in fits if f.stage < 3 and f.fits and f.recompute == chosen.recompute), None)
        if chosen.stage == 3 and below is not None:
            accumulate = point.accumulate if point else accumulate
            ranks = max(2, world)
            least, most = (
                wire(
                    self.sizes.weights,
                    stage,
                    ranks,
                    micro_steps=accumulate,
                    live=job.layout.live,
                    zeropp=job.layout.zeropp,
                    node=min(ranks, self.cluster.per_node),
                ).total
                / (4.0 * self.sizes.weights * (ranks - 1) / ranks)
                for stage in (below.stage, 3)
            )
            least, most = round(least, 6), round(most, 6)
            more = f"sends {least:.3g} psi a step" + (f" instead of {most:.3g} psi" if most > least else ", no more")
            said.append(f"zero_stage 3 is not worth it: stage {below.stage} fits, and {more}")
        if job.samples is not None:
            if job.samples < job.batch:
                said.append(f"data: {job.samples} samples are fewer than one batch of {job.batch}")
            elif job.steps * job.batch > 300 * job.samples:
                epochs = job.steps * job.batch / job.samples
                said.append(
                    f"data: {job.samples:,} samples are few for {job.steps:,} steps: each is seen {epochs:,.0f} times"
                )
        return said


def digits(value: float, places: int = 3) -> str:
    """A figure with `places` decimals, or with two digits where it would read as nothing; 0 is exactly nothing."""
    if value == 0:
        return "0"
    return f"{value:,.{places}f}" if abs(value) >= 10.0 ** (1 - places) else f"{value:.2g}"


def text(plan: Plan) -> str:
    """The plan for a terminal."""
    c, h = plan.cluster, plan.cluster.hardware
    lines = [f"{plan.name} on {c.nodes} x {c.per_node} {h.name}", ""]
    frozen = plan.frozen_flops_per_image
    alone = ": one GPU sends nothing" if c.world == 1 else ""
    if plan.wire.inside:
        alone = f", {digits(plan.wire.inside / GB)} of them within its node"
    lines += [
        f"trained weights    {digits(plan.weights / 1e6, 1)} M",
        f"compute an image   {digits(plan.flops_per_image / 1e9, 1)} GFLOP forward and backward"
        + (f", {digits(frozen / 1e9, 1)} of frozen networks" if frozen else ""),
        f"on the wire        {digits(plan.wire.total / GB)} GB a step and GPU (ZeRO-{plan.chosen.stage}){alone}",
    ]
    lines += ["", *_memory(plan), "", *_time(plan)]
    if plan.warnings:
        lines += ["", *(f"warning: {w}" for w in plan.warnings)]
    return "\n".join(lines)


COLUMNS = ("weights", "gradients", "optimizer", "ema", "activations", "buffers", "frozen", "host")
NOTHING = "0: none at the fullest moment, which is the end of the forward pass or the optimizer's step"


def _memory(plan: Plan) -> list[str]:
    limit = plan.cluster.hardware.memory * plan.cluster.assumptions.usable
    head = "".join(f"{name:>12}" for name in (*COLUMNS, "total", "largest"))
    lines = [
        f"memory, GB a GPU ({limit:.1f} are usable); largest: images of a forward pass that fit",
        NOTHING,
        f"{'':<20}{head}",
    ]
    for fit in plan.fits:
        label = f"ZeRO-{fit.stage}{', recompute' * fit.recompute}"
        values = [digits(getattr(fit.parts, name) / GB) for name in COLUMNS] + [digits(fit.parts.total / GB)]
        mark = " <" if fit == plan.chosen else ("" if fit.fits else " does not fit")
        lines.append(f"{label:<20}{''.join(f'{v:>12}' for v in values)}{fit.largest:12d}{mark}")
    return lines


def _time(plan: Plan) -> list[str]:
    if plan.point is None:
        return ["time               no figure: the batch does not divide or does not fit"]
    p, s = plan.point, plan.point.step
    parts = (
        f"compute {digits(s.compute)}, frozen {digits(s.frozen)}, optimizer {digits(s.optimizer)}, "
        f"links {digits(s.links)}, slowest rank {digits(s.stragglers)}, other {digits(s.other)}"
        + (f", host's memory {digits(s.moving)}" if s.moving else "")
    )
    lines = [
        f"a step             {digits(s.total)} s of {plan.batch} images ({p.micro} a GPU x {p.accumulate}): {parts}",
        f"images a second    {digits(p.images_per_second, 1)} ({digits(100 * plan.utilisation, 1)} % of the peak rate)",
        f"the run            {plan.steps:,} steps in {duration(p.days)}"
        + ("" if p.cost is None else f", cost {digits(p.cost, 2)}"),
        *([f"before the steps   {before(plan)}"] if plan.drawn is not None else []),
        f"data               {digits(plan.data_rate / 1e6)} MB/s"
        + ("" if plan.data_bytes is None else f", {digits(plan.data_bytes / GB)} GB of {plan.samples:,} samples")
        + ("" if plan.data_rate else ": not counted, as the size of a sample is not known"),
    ]
    lines += [
        f"{r.name + ':':<18} {r.steps:,} steps of {digits(r.step or 0.0)} s, {duration(r.days or 0.0)}, "
        f"{digits(r.memory / GB)} GB a GPU"
        for r in plan.rounds
    ]
    if len(plan.sweep) > 1:
        lines += ["", f"{'GPUs':>8}{'images/s':>12}{'time':>16}{'cost':>12}"]
        for q in plan.sweep:
            cost = "" if q.cost is None else digits(q.cost, 2)
            lines.append(f"{q.gpus:8d}{digits(q.images_per_second, 1):>12}{duration(q.days):>16}{cost:>12}")
    return lines


def before(plan: Plan) -> str:
    """What is drawn before the first step, and how long it takes, in words."""
    assert plan.drawn is not None
    took = "" if plan.point is None else f" in {duration(plan.point.drawing / DAY)}, counted in the run's time"
    return f"{plan.drawn.count:,} {plan.drawn.name} are drawn{took}"


def duration(days: float) -> str:
    """Days, hours, minutes or seconds, whichever says most."""
    if days >= 2:
        return f"{days:,.1f} days"
    hours = days * 24
    if hours >= 2:
        return f"{hours:.1f} hours"
    minutes = max(hours * 60, 0.0)
    return f"{minutes:.1f} minutes" if minutes >= 2 else f"{digits(60 * minutes, 1)} seconds"
