"""A run of several rounds as one plan: steps, time and cost of all together, memory of the heaviest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from ldm.plan.report import Fit, Job, Plan, Planner, Point, Round
from ldm.plan.throughput import Cluster, Step


def plan(job: Job, cluster: Cluster, price: float | None = None) -> Plan:
    """The plan of a job and of the rounds that follow it."""
    jobs = (job, *job.then)
    found = [Planner(j, cluster, price).plan() for j in jobs]
    if len(found) == 1:
        return found[0]
    steps, days = sum(p.steps for p in found), sum(_days(p.point) for p in found)
    fits = tuple(_heaviest(rows) for rows in zip(*(p.fits for p in found), strict=True))
    chosen = fits[found[0].fits.index(found[0].chosen)]
    heaviest = max(found, key=lambda p: p.chosen.parts.total)
    points = [[p.point for p in found], *([_at(p, size.gpus) for p in found] for size in found[0].sweep)]
    point, *sweep = (_together(found, at) for at in points)
    rounds = tuple(
        Round(
            name=j.round, steps=p.steps, step=p.point.step.total if p.point else None,
            days=p.point.days if p.point else None, memory=p.chosen.parts.total,
        )
        for j, p in zip(jobs, found, strict=True)
    )  # fmt: skip
    said = f"rounds: {steps:,} steps and their time are of all together, memory is that of the heaviest of them"
    return replace(
        heaviest,
        name=job.name,
        weights=max(p.weights for p in found),
        flops_per_image=sum(p.steps * p.flops_per_image for p in found) / steps,
        steps=steps,
        fits=fits,
        chosen=chosen,
        point=point,
        sweep=tuple(p for p in sweep if p is not None),
        utilisation=sum(p.utilisation * _days(p.point) for p in found) / days if days else 0.0,
        data_rate=0.0 if point is None else point.images_per_second * _sample(heaviest),
        warnings=tuple(dict.fromkeys([said, *(w for p in found for w in p.warnings)])),
        rounds=rounds,
    )


def _heaviest(rows: Sequence[Fit]) -> Fit:
    most = max(rows, key=lambda f: f.parts.total)
    return replace(most, largest=min(f.largest for f in rows), fits=all(f.fits for f in rows))


def _at(found: Plan, gpus: int) -> Point | None:
    return next((p for p in found.sweep if p.gpus == gpus), None)


def _together(found: Sequence[Plan], points: Sequence[Point | None]) -> Point | None:
    """Days and cost of all rounds, and the mean step; None where one of them cannot run."""
    there = [p for p in points if p is not None]
    if len(there) < len(points):
        return None
    weights = [p.steps / sum(q.steps for q in found) for p in found]
    pairs = list(zip(weights, there, strict=True))
    step = Step(**{f.name: sum(w * getattr(p.step, f.name) for w, p in pairs) for f in fields(Step)})
    least = min(there, key=lambda p: p.micro)
    costs = [p.cost for p in there if p.cost is not None]
    return replace(
        least, step=step, images_per_second=found[0].batch / step.total, days=sum(p.days for p in there),
        cost=sum(costs) if costs else None, drawing=sum(p.drawing for p in there),
    )  # fmt: skip


def _days(point: Point | None) -> float:
    return 0.0 if point is None else point.days


def _sample(found: Plan) -> float:
    """Bytes of a sample."""
    return found.data_rate / found.point.images_per_second if found.point else 0.0
