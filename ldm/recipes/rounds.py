"""The rounds of progressive distillation: which task each run has, and where its teacher comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ldm.checkpoint.convert import open_model
from ldm.checkpoint.schedulers import scheduler_from_diffusers
from ldm.models.shipped import SHIPPED
from ldm.objectives.progressive import ProgressiveOptions
from ldm.recipes.distill_task import DistillTask


@dataclass(frozen=True)
class Round:
    """One run: its folder's name below the whole's, and its task."""

    name: str
    task: DistillTask


def rounds(task: DistillTask, out: Path, prediction: str) -> list[Round]:
    """A match first if asked for, or if the teacher predicts epsilon; then N, N/2, ... steps.

    Each round's teacher is the export of the one before. What takes no w has its guidance after the first round, so
    that later ones add none. Raises ValueError for a method that is not progressive, or steps that do not halve.
    """
    method = task.method
    if not isinstance(method, ProgressiveOptions):
        raise ValueError(f"task.method.kind: 'progressive' is needed here, got {method.kind!r}")
    counts = method.rounds()
    names = [f"round-{i + 1}-{count}" for i, count in enumerate(counts)]
    wanted = task.prediction if task.prediction != "teacher" else ("v" if prediction == "epsilon" else "teacher")
    planned: list[Round] = []
    if method.stage == "match" or wanted != "teacher":
        planned.append(Round("round-0-match", replace(task, prediction=wanted, method=replace(method, stage="match"))))
    for name, count in zip(names, counts, strict=True):
        halve = replace(method, stage="halve", steps=count, until=count)
        if planned:
            if task.guidance_embedding is None:
                halve = replace(halve, w=(0.0, 0.0))
            teacher = str(out / planned[-1].name / "export")
            planned.append(Round(name, replace(task, teacher=teacher, prediction="teacher", method=halve)))
        else:
            planned.append(Round(name, replace(task, method=halve)))
    return planned


def prediction_of(source: str) -> str:
    """What a model's network predicts; of a shipped name, a run, a diffusers folder or a single file."""
    found = SHIPPED.get(source, Path(source))
    opened = open_model(found / "export" if (found / "export").is_dir() else found)
    return scheduler_from_diffusers(opened.scheduler).prediction.kind
