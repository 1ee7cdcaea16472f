"""Which settings make a run fit into a card: what is tried, and what each try takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from ldm.data.mixture import Data
from ldm.models.network import granularity
from ldm.plan.cards import Answer, Search, Setting, Tried, card_of, find
from ldm.plan.counted import Counted
from ldm.plan.memory import Activations, Parts, memory
from ldm.plan.report import Job, Planner
from ldm.plan.streaming import halving
from ldm.plan.throughput import Cluster
from ldm.plan.trace import Trace
from ldm.recipes import Task, plan_job
from ldm.recipes.autoencoder import AutoencoderTask
from ldm.recipes.clip import ClipTask
from ldm.recipes.planned import Asked, layout
from ldm.train.trainer import TrainConfig

Load = Callable[[tuple[str, ...]], tuple[Task, Data, TrainConfig]]
"""A run's config with `key=value` added to it."""
_DIVIDES = ("train.engine.blocks_on_device", "train.engine.offload_optimizer", "train.engine.zero_stage",
            "train.optim.algorithm", "train.accumulate")  # fmt: skip
"""Keys that change how a step is divided and what is kept between steps, and not what it computes."""
_NOTHING = Activations(*(Trace(batch=b, ops=(), peak=0, peak_kept=0, gradients=0) for b in (1, 2)))


class Needs:
    """What a run takes with settings added; steps that are the same are counted once, for any card."""

    def __init__(self, load: Load, name: str, cluster: Cluster) -> None:
        self._load, self._name, self.cluster = load, name, cluster
        self._jobs: dict[tuple[str, ...], tuple[Job, Counted]] = {}

    def on(self, cluster: Cluster) -> Needs:
        """The same run on other cards, as many of them, with what is counted already."""
        other = Needs(self._load, self._name, cluster)
        other._jobs = self._jobs
        return other

    def planner(self, words: tuple[str, ...] = ()) -> Planner:
        """The run as it is planned."""
        task, data, train = self._load(words)
        gpu = not self.cluster.hardware.host
        asked = Asked(name=self._name, world=self.cluster.world, gpu=gpu)
        key = tuple(sorted(word for word in words if word.partition("=")[0] not in _DIVIDES))
        alone = train.batch <= self.cluster.world * train.accumulate
        key = (*key, str(alone))
        if key not in self._jobs:
            job = plan_job(task, data, train, asked)
            again = (job.recompute,)
            counted = Counted(job.build, job.inputs, job.precision, gpu=gpu, recomputing=again, alone=alone)
            self._jobs[key] = job, counted
        job, counted = self._jobs[key]
        places = train.engine.blocks_on_device
        streamed = None if job.streamed is None else replace(job.streamed, places=places)
        job = replace(job, layout=layout(train, asked), streamed=streamed)
        return Planner(job, self.cluster, recomputing=(job.recompute,), counted=counted)

    def of(self, words: tuple[str, ...]) -> Tried:
        """Bytes by part, and minutes of a thousand steps where it fits."""
        planner = self.planner(words)
        how, job = replace(planner.job.layout, world=self.cluster.world), planner.job
        fit = planner.fit(how.stage, job.recompute, how, max(1, job.batch // (how.world * how.accumulate)))
        point = planner.point(self.cluster) if fit.fits else None
        parts = {field.name: float(getattr(fit.parts, field.name)) for field in fields(Parts)}
        return Tried(parts=parts, minutes=None if point is None else 1000 * point.step.total / 60)

    def least(self, words: tuple[str, ...]) -> float:
        """Bytes without activations, for which no step is counted."""
        planner = self.planner(words)
        how = replace(planner.job.layout, world=self.cluster.world)
        return memory(planner.sizes, _NOTHING, 1, how, planner.frozen_bytes).total

    def settings(self) -> list[Setting]:
        """What may be tried, in the order in which it is: what costs no time first."""
        task, _, train = self._load(())
        job, engine, world = self.planner().job, train.engine, self.cluster.world
        found = []
        frozen = bool(job.frozen) or job.streamed is not None
        if frozen and engine.frozen == "fp32":
            found.append(Setting(kind="frozen", words=("train.engine.frozen=bf16",)))
        if train.optim.algorithm == "adamw":
            found.append(Setting(kind="optimizer", words=("train.optim.algorithm=adamw8bit",)))
        if train.batch // (world * train.accumulate) > 1:
            found.append(Setting(kind="accumulate", words=(f"train.accumulate={train.batch // world}",)))
        if _computes_again(task) is False:
            found.append(Setting(kind="recompute", words=("task.gradient_checkpointing=block",)))
        if frozen and engine.compile == "off":
            kinds = ("int8", "nf4") if engine.frozen in ("fp32", "bf16") else ("nf4",) * (engine.frozen == "int8")
            found += [Setting(kind="frozen", words=(f"train.engine.frozen={kind}",), lossy=True) for kind in kinds]
        if job.streamed is not None and engine.zero_stage < 3 and engine.compile in ("off", "blocks"):
            places = engine.blocks_on_device or len(job.streamed.blocks)
            found += [Setting(kind="blocks", words=(f"train.engine.blocks_on_device={n}",)) for n in halving(places)]
        if job.streamed is None and not engine.offload_optimizer:
            stage = () if engine.zero_stage else ("train.engine.zero_stage=1",)
            found.append(Setting(kind="offload", words=(*stage, "train.engine.offload_optimizer=true")))
        return found

    def answer(self) -> Answer:
        """The settings with which the run fits this card."""
        planner = self.planner()
        search = Search(self.of, self.least, planner.limit)
        way, closest, other = find(search, self.settings())
        before = search.needs(()) if search.fits(()) else Tried(parts={"at least": self.least(())}, minutes=None)
        return Answer(
            name=self._name, card=card_of(self.cluster),
            limit=planner.limit, before=before, way=way, closest=closest, other=other, warnings=planner.job.warnings,
        )  # fmt: skip


def _computes_again(task: Task) -> bool | None:
    """Whether whole blocks are computed again in the backward pass; None where the task knows no such thing."""
    if isinstance(task, (AutoencoderTask, ClipTask)):
        return None
    return granularity(task.gradient_checkpointing) == "block"
