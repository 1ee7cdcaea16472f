"""The page of a plan: time and cost against the number of GPUs, memory by stage, what was assumed."""

from __future__ import annotations

from dataclasses import asdict

from ldm.plan.hardware import GB
from ldm.plan.report import COLUMNS, DAY, NOTHING, Plan, digits, duration
from ldm.web.chart import Bar, Curve
from ldm.web.gallery import Fact, Gallery


def page(plan: Plan) -> Gallery:
    """A plan as one page."""
    cluster = plan.cluster
    size = f"{cluster.nodes} x {cluster.per_node} {cluster.hardware.name}"
    gallery = Gallery(f"Plan of {plan.name}", f"What the run needs on {size}, counted without a GPU.", "ldm plan")
    gallery.facts(_facts(plan))
    if plan.warnings:
        section = gallery.section("Warnings")
        section.table(("what to look at",), [(w,) for w in plan.warnings])
    if len(plan.sweep) > 1:
        _sweep(gallery, plan)
    if plan.rounds:
        section = gallery.section("Rounds", "One after the other; memory below is that of the heaviest.")
        rows = [
            (r.name, r.steps, digits(r.step or 0.0), duration(r.days or 0.0), digits(r.memory / GB))
            for r in plan.rounds
        ]
        section.table(("round", "steps", "s a step", "time", "GB a GPU"), rows)
    _memory(gallery, plan)
    if plan.point is not None:
        section = gallery.section("A step", f"{digits(plan.point.step.total)} s, by part.")
        parts = [(name, value) for name, value in asdict(plan.point.step).items() if value > 0]
        section.bars([Bar(name, 1e3 * value) for name, value in parts], unit="ms")
    section = gallery.section(
        "Assumptions",
        "One set of constants for every accelerator and number of them; `docs/scale.md` says where they come from.",
    )
    assumed = {**asdict(cluster.assumptions), **asdict(cluster.hardware)}
    section.table(("constant", "value"), [(k, v) for k, v in assumed.items() if k not in ("name", "host")])
    return gallery


def _facts(plan: Plan) -> list[Fact]:
    facts = [
        Fact(
            f"{digits(plan.weights / 1e6, 1)} M",
            "trained weights",
            f"{digits(plan.flops_per_image / 1e9, 1)} GFLOP an image",
        ),
        Fact(
            f"{digits(plan.chosen.parts.total / GB, 2)} GB",
            f"a GPU at ZeRO-{plan.chosen.stage}",
            "with the configured batch",
        ),
        Fact(f"{digits(plan.wire.total / GB, 2)} GB", "sent by a GPU in a step", ""),
    ]
    if plan.point is not None:
        p = plan.point
        used = f"{digits(100 * plan.utilisation, 1)} % of peak"
        facts.append(Fact(digits(p.images_per_second, 1), "images a second", used))
        cost = "" if p.cost is None else f"cost {digits(p.cost, 2)}"
        facts.append(Fact(duration(p.days), f"for {plan.steps:,} steps", cost))
        if plan.drawn is not None:
            facts.append(Fact(duration(p.drawing / DAY), f"of it for {plan.drawn.count:,} {plan.drawn.name}", "first"))
    return facts


def _sweep(gallery: Gallery, plan: Plan) -> None:
    section = gallery.section("GPUs against time and cost", "The same run, the same batch, on more or fewer nodes.")
    gpus = [float(p.gpus) for p in plan.sweep]
    section.curve([Curve("days", gpus, [p.days for p in plan.sweep])], "GPUs", "days", log_y=True)
    costs = [p.cost for p in plan.sweep if p.cost is not None]
    if costs:
        section.curve([Curve("cost", gpus, costs)], "GPUs", "cost")
    else:
        spent = [p.days * p.gpus for p in plan.sweep]
        section.curve([Curve("GPU-days", gpus, spent)], "GPUs", "GPU-days")
    rows = [
        (p.gpus, digits(p.images_per_second, 1), duration(p.days), digits(p.days * p.gpus, 2),
         "" if p.cost is None else digits(p.cost, 2))
        for p in plan.sweep
    ]  # fmt: skip
    section.table(("GPUs", "images/s", "time", "GPU-days", "cost"), rows)


def _memory(gallery: Gallery, plan: Plan) -> None:
    usable = plan.cluster.hardware.memory * plan.cluster.assumptions.usable
    section = gallery.section(
        "Memory", f"GB on one GPU at the fullest moment of a step; {usable:.1f} GB are usable. The last column is the "
        f"largest number of images of a forward pass that fit. {NOTHING}.",
    )  # fmt: skip
    rows = []
    for fit in plan.fits:
        name = f"ZeRO-{fit.stage}{', checkpointing' * fit.recompute}{' (configured)' * (fit == plan.chosen)}"
        values = [digits(getattr(fit.parts, column) / GB) for column in COLUMNS]
        rows.append((name, *values, digits(fit.parts.total / GB), fit.largest))
    section.table(("", *COLUMNS, "total", "largest"), rows)
