"""Textual inversion: new words for a subject or a style, nothing else trains (Gal 2022, arXiv 2208.01618)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm.adapters.tokens import NewToken, TokensAdapter, TokensConfig
from ldm.data.loader import DataConfig
from ldm.data.mixture import Data
from ldm.plan.report import Job
from ldm.recipes import planned
from ldm.recipes.base import Assembly
from ldm.recipes.finetune import Finetuning, adapted_job, assembled, open_base
from ldm.recipes.pictures import prepare
from ldm.recipes.validation import share_of
from ldm.train.trainer import TrainConfig

TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": (
        "{}",
        "a {}",
        "one {}",
        "the {} alone",
        "a picture of {}",
        "a good picture of a {}",
        "a small {} in the middle",
        "a large {}",
        "a {} seen up close",
        "a {} on a plain ground",
        "this is a {}",
        "my {}",
    ),
    "style": (
        "{}",
        "in the style of {}",
        "a picture in {} style",
        "something drawn in {} style",
        "a {} painting",
        "an illustration, {} style",
        "a scene as {} would show it",
        "the look of {}",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Concept(NewToken):
    """A new token and its pictures, captioned for an object or a style, or by `templates` with {} for the token."""

    images: Path
    """The folder of the concept's pictures."""
    learn: Literal["object", "style"] = "object"
    """Whether the captions speak of an object or of a style."""
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"templates: {template!r} has no {{}}, so {self.token} would not be in the caption")

    @property
    def captions(self) -> list[str]:
        """Of its pictures, one drawn at a time."""
        return [t.replace("{}", self.token) for t in self.templates or TEMPLATES[self.learn]]


@dataclass(frozen=True, kw_only=True)
class InversionTask(Finetuning):
    """`data` is one data set for one concept, or a mixture with one source a concept, in their order.

    `max_norm` as in `TokensConfig`.
    """

    kind: Literal["textual_inversion"] = "textual_inversion"
    concepts: tuple[Concept, ...]
    max_norm: float = 2.0

    def __post_init__(self) -> None:
        if not self.concepts:
            raise ValueError("concepts must not be empty")
        tokens = [c.token for c in self.concepts]
        for prompt in self.samples.prompts:
            if not any(t in prompt for t in tokens):
                raise ValueError(f"samples.prompts: {prompt!r} names none of the new tokens {tokens}")


def build(task: InversionTask, data: Data, train: TrainConfig, seed: int, workers: int) -> Assembly:
    """Each concept's pictures as shards under its templates, and the new rows."""
    sources = concept_sources(task, data)
    tokens = tuple(NewToken(token=c.token, vectors=c.vectors, initializer=c.initializer) for c in task.concepts)
    config = TokensConfig(tokens=tokens, max_norm=task.max_norm)
    pipeline = open_base(task, config, train)
    for number, (concept, source) in enumerate(zip(task.concepts, sources, strict=True)):
        share = 0.0 if number else share_of(train, data)
        prepare(concept.images, Path(source.path), concept.captions, source.size, share, task.masks)
    return assembled(task, TokensAdapter(config), pipeline, data, train, seed, workers, task.concepts[0].images)


def concept_sources(task: InversionTask, data: Data) -> list[DataConfig]:
    """The data set of each concept. Raises ValueError where their numbers differ."""
    sources = [data] if isinstance(data, DataConfig) else [s.data for s in data.sources]
    if len(sources) != len(task.concepts):
        raise ValueError(
            f"data: {len(sources)} source(s) for {len(task.concepts)} concept(s); one each, in their order"
        )
    return sources


def job(task: InversionTask, data: Data, train: TrainConfig, asked: planned.Asked) -> Job:
    """The new rows of the text towers: gradients pass through the frozen network and towers to them."""
    concept_sources(task, data)
    tokens = tuple(NewToken(token=c.token, vectors=c.vectors) for c in task.concepts)
    # No bound: without weights there are no norms to take it from, and it takes next to nothing.
    found = adapted_job(task, TokensConfig(tokens=tokens, max_norm=0.0), data, train, asked)
    count = planned.pictures_in(*(c.images for c in task.concepts))
    return found if found.samples is not None or count is None else planned.told(found, count)
