"""A recipe by the project's own Trainer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.quality import cache
from bench.quality.course import Clock, Course, Watch, planned
from bench.quality.judge import Quality
from bench.quality.rows import Recipe, placed
from bench.quality.runs import Spec
from ldm.recipes import assemble
from ldm.recipes.base import Assembly
from ldm.recipes.text_to_image import SampleHook, without_dropout
from ldm.train import engine
from ldm.train.stop import AGAIN
from ldm.train.trainer import Trainer
from ldm.train.validate import LossOnHeldOut

WARM, COUNT = 3, 12
"""Steps before the rate is measured, and of the measurement."""


class _Timed:
    """Hook: processor seconds at the ends of the warm-up and of the measurement."""

    every = 1

    def __init__(self, warm: int, count: int) -> None:
        self._steps, self._at = (warm, warm + count), [0.0, 0.0]

    def __call__(self, trainer: Trainer, step: int) -> None:
        if step in self._steps:
            self._at[self._steps.index(step)] = time.process_time()

    @property
    def rate(self) -> float:
        return (self._at[1] - self._at[0]) / (self._steps[1] - self._steps[0])


class _Watched:
    """Hook: `Watch` after every step."""

    every = 1

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, trainer: Trainer, step: int) -> None:
        self._watch.after(step)


def _trainer(spec: Spec, recipe: Recipe, out: Path, steps: int) -> tuple[Trainer, Assembly]:
    folder = cache.folder_of(Path(spec.out), recipe)
    run = placed(recipe, out, folder, spec.seed, steps)
    with cache.alone(folder):
        assembly = assemble(run.task, run.data, run.train, run.seed, run.workers)
    settings: dict[str, Any] = {}
    return Trainer(run.train, assembly.objective, assembly.loader, out, seed=spec.seed, settings=settings), assembly


def seconds_a_step(spec: Spec, recipe: Recipe) -> float:
    """Processor seconds of a step of a run that is thrown away."""
    warm, count = (1, 3) if spec.quick else (WARM, COUNT)
    with tempfile.TemporaryDirectory(prefix="ldm-quality-") as folder:
        trainer, _ = _trainer(spec, recipe, Path(folder), warm + count + 1)
        timed = _Timed(warm, count)
        trainer.run([timed])
    return timed.rate


def run(spec: Spec, recipe: Recipe, quality: Callable[[], Quality]) -> int:
    """Train to the budget from wherever the run folder is; 0 at the end, `AGAIN` when told to stop."""
    engine.start()
    course = Course.read(spec.work / "course.json")
    if course is None:
        rate = seconds_a_step(spec, recipe)
        course = Course(spec.work / "course.json", planned(spec.budget, rate), rate)
    trainer, assembly = _trainer(spec, recipe, spec.work, course.steps)
    done = trainer.resume()
    clock = Clock(course.begin(done))
    course.write()
    watch = Watch(
        course, clock, spec.budget, spec.marks, batch=trainer.config.batch, save=lambda: trainer.save(now=True),
        measure=lambda: figures(trainer, assembly, recipe, quality()),
    )  # fmt: skip
    if done:  # at step 0 the hook is called, and starts the clock
        clock.start()
    code = trainer.run([_Watched(watch)])
    if code == AGAIN:
        watch.keep(trainer.step)
    return code


def figures(trainer: Trainer, assembly: Assembly, recipe: Recipe, quality: Quality) -> dict[str, Any]:
    """Of the averaged weights."""
    pipeline = next(h.pipeline for h in assembly.hooks if isinstance(h, SampleHook))
    own = next((h for h in assembly.hooks if isinstance(h, LossOnHeldOut)), None)
    with trainer.averaged():
        with without_dropout(pipeline.network):
            found = quality.of(pipeline, recipe.task.samples.settings)
        return found | ({} if own is None else {"own_loss": own.loss(trainer)})
