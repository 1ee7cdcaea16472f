"""DreamBooth: a few pictures of a subject under a rare word, with the class as it was (Ruiz 2022, arXiv 2208.12242)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ldm import dist
from ldm.adapters.full import FullConfig
from ldm.adapters.lora import LoraConfig
from ldm.adapters.pivotal import PivotalConfig
from ldm.adapters.tokens import NewToken
from ldm.data.loader import DataConfig
from ldm.data.mixture import Data
from ldm.plan.report import Drawn, Job
from ldm.recipes import planned, planned_models
from ldm.recipes import prior as class_pictures
from ldm.recipes.base import Assembly
from ldm.recipes.finetune import Finetuning, adapted_job, assembled, make_adapter, open_base
from ldm.recipes.picture_masks import WHITE
from ldm.recipes.pictures import prepare
from ldm.recipes.prior import Prior
from ldm.recipes.sources import weights_hash
from ldm.recipes.validation import share_of
from ldm.sampling.registry import lookup
from ldm.train.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DreamboothTask(Finetuning):
    """Every picture of `images` is captioned "a IDENTIFIER NOUN", or `prompt`.

    With `prior`, `data` is a mixture of two sources in this order: the subject's pictures and the class pictures, whose
    `weight` is that of prior preservation. Each sample's loss has its own time's weighting and its source's weight.
    With the adapter `pivotal`, the subject's caption says its new words.
    """

    kind: Literal["dreambooth"] = "dreambooth"
    images: Path
    identifier: str = "sks"
    """The rare word that names the subject in its caption."""
    noun: str
    """The word of the subject's class, such as dog."""
    prompt: str | None = None
    prior: Prior | None = field(default_factory=Prior)
    adapter: FullConfig | LoraConfig | PivotalConfig = field(default_factory=FullConfig)
    """What trains: all weights, a LoRA, or a LoRA with new words."""

    def __post_init__(self) -> None:
        if not self.noun.strip() or not self.identifier.strip():
            raise ValueError(f"identifier {self.identifier!r} and noun {self.noun!r} must not be empty")
        if isinstance(self.adapter, PivotalConfig):
            for new in self.adapter.tokens:
                if new.token not in self.instance_prompt:
                    raise ValueError(
                        f"adapter.tokens: {new.token!r} is not in the subject's caption {self.instance_prompt!r}, "
                        "so nothing would train it; write it as `identifier`, or into `prompt`"
                    )

    def words(self, data: Data) -> tuple[str, str]:
        """The identifier is left out before the noun: "a sks dog" becomes "a dog"."""
        return f"{self.identifier} {self.noun}", self.noun

    @property
    def instance_prompt(self) -> str:
        """The subject's caption."""
        return self.prompt if self.prompt is not None else f"a {self.identifier} {self.noun}"

    @property
    def class_prompt(self) -> str:
        """The class's caption."""
        asked = None if self.prior is None else self.prior.prompt
        return asked if asked is not None else f"a {self.noun}"


def build(task: DreamboothTask, data: Data, train: TrainConfig, seed: int, workers: int) -> Assembly:
    """The subject's pictures and, with prior preservation, class pictures by the base model, each as shards."""
    sources = _sources(task, data)
    pipeline = open_base(task, task.adapter, train)
    share = share_of(train, data)
    prepare(task.images, Path(sources[0].path), [task.instance_prompt], sources[0].size, share, task.masks)
    if task.prior is not None:
        shards = Path(sources[1].path)
        folder = task.prior.folder or shards.parent / "class_pictures"
        base = f"{task.base} {weights_hash(pipeline.network, *pipeline.text)}"
        if pipeline.network.streaming is None:
            pipeline.to(dist.device())  # they are drawn by the base as it is
        class_pictures.make(task.prior, task.class_prompt, folder, base, pipeline)
        prepare(folder, shards, [task.class_prompt], sources[1].size, masks=None if task.masks is None else WHITE)
    return assembled(task, make_adapter(task.adapter), pipeline, data, train, seed, workers, task.images)


def _sources(task: DreamboothTask, data: Data) -> list[DataConfig]:
    if isinstance(data, DataConfig):
        found = [data]
    else:
        found = [s.data for s in data.sources]
    want = 1 if task.prior is None else 2
    if len(found) != want:
        why = "the subject and, with task.prior, the class" if want == 2 else "the subject, since task.prior is null"
        raise ValueError(f"data: {len(found)} source(s), expected {want}: {why}")
    return found


def job(task: DreamboothTask, data: Data, train: TrainConfig, asked: planned.Asked) -> Job:
    """Fine-tuning on subject and class, after the class pictures that are not there yet are drawn by the base model."""
    sources = _sources(task, data)
    adapter = task.adapter
    if isinstance(adapter, PivotalConfig):  # without weights there are no norms to take a bound from
        new = tuple(NewToken(token=t.token, vectors=t.vectors) for t in adapter.tokens)
        adapter = replace(adapter, tokens=new, max_norm=0.0)
    found = adapted_job(task, adapter, data, train, asked)
    prior, own = task.prior, planned.pictures_in(task.images)
    if prior is not None:
        folder = prior.folder or Path(sources[1].path).parent / "class_pictures"
        found = _with_drawn(found, task, prior, class_pictures.to_draw(prior, folder), sources[1].size)
        own = None if own is None else own + prior.count
    return found if found.samples is not None or own is None else planned.told(found, own)


def _with_drawn(found: Job, task: DreamboothTask, prior: Prior, count: int, pixels: int) -> Job:
    """With the time of `count` class pictures; they are drawn in float32, whatever training computes in."""
    if not count:
        return found
    base, settings = planned_models.whole(task.base, "task.base", []), prior.settings
    guided = settings.guidance != 1 and base.network.guidance_width is None
    calls = settings.steps * lookup(settings.sampler).cost
    flops = planned.drawing_flops(base, pixels, calls, guided)
    said = (
        f"{count} class pictures are drawn first, each of {calls:g} {'guided ' * guided}calls of the network; "
        "the memory of drawing is not counted"
    )
    drawn = Drawn(name="class pictures", count=count, flops=flops, rows=settings.batch * (2 if guided else 1))
    return replace(found, drawn=drawn, warnings=(said, *found.warnings))
