"""Sample pictures while a network trains: the same prompts and noise again and again, and on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ldm import dist
from ldm.data.grid import save_grid
from ldm.data.mixture import Data
from ldm.models.network import Network
from ldm.objectives.denoise import DenoiseOptions
from ldm.pipeline import Settings, TextToImage
from ldm.recipes import concat, planned
from ldm.train.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """What one prompt is drawn with instead of the common settings; None is as they are. `size`: one side or (H, W).

    With a `seed` of its own a prompt is the picture that `ldm sample` draws with it.
    """

    size: int | tuple[int, int] | None = None
    steps: int | None = None
    """Sampler steps of this prompt; null is the common number."""
    seed: int | None = None
    guidance: float | None = None
    """Guidance strength of this prompt; null is the common one."""
    negative: str | None = None
    """Negative prompt of this prompt; null is the common one."""

    def of(self, common: Settings) -> Settings:
        """The common settings with these."""
        own = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(common, **own) if own else common


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Pictures of fixed prompts and noise, drawn with the averaged weights every `every` steps (0: at the end only).

    `pictures`, one a prompt, are what a network with `options.concat` is told; `masks` are white where it paints.
    `own`, one a prompt, are settings of single prompts. `first`: whether they are drawn before the first step, too.
    `walk_seed`: each prompt has noise of its own; else all have the first one's.
    """

    prompts: tuple[str, ...] = ()
    """What is drawn, one picture a prompt."""
    every: int = 1000
    settings: Settings = field(default_factory=Settings)
    pictures: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    own: tuple[PromptSettings, ...] = ()
    first: bool = True
    walk_seed: bool = True

    def __post_init__(self) -> None:
        if self.own and len(self.own) != len(self.prompts):
            raise ValueError(f"own: {len(self.own)} for {len(self.prompts)} prompts; give one for each, {{}} for none")
        for number, one in enumerate(self.own):
            try:
                one.of(self.settings)
            except ValueError as error:
                raise ValueError(f"own[{number}]: {error}") from None

    def groups(self) -> list[tuple[Settings, list[int], list[int]]]:
        """Settings, the places of the prompts that are drawn with them, and the numbers of their noise."""
        found: dict[Settings, tuple[list[int], list[int]]] = {}
        for place in range(len(self.prompts)):
            own = self.own[place] if self.own else PromptSettings()
            places, noise = found.setdefault(own.of(self.settings), ([], []))
            places.append(place)
            noise.append(place if self.walk_seed and own.seed is None else 0)
        return [(settings, places, noise) for settings, (places, noise) in found.items()]


class Sees(Protocol):
    """What sample prompts are drawn with beside their words."""

    def under(self, indices: Sequence[int]) -> TextToImage:
        """The pipeline that draws the prompts of these places."""
        ...

    def finished(self, indices: Sequence[int], drawn: Tensor) -> Tensor:
        """Their pictures (N, 3, H, W) as they are looked at."""
        return drawn


class SampleHook:
    """Draws the fixed prompts on all ranks together, each its share, and writes one picture."""

    on_demand = True

    def __init__(self, config: Samples, pipeline: TextToImage, sees: Sees | None = None) -> None:
        self.every, self.config, self.pipeline, self._sees = config.every, config, pipeline, sees
        if sees is None:
            concat.check_samples(None, config.prompts, config.pictures, config.masks)

    def __call__(self, trainer: Trainer, step: int) -> None:
        count = len(self.config.prompts)
        if not count and trainer.asked:
            dist.say("sample-now: nothing is drawn, as task.samples.prompts is empty")
        if not count or (step == 0 and not self.config.first and not trainer.asked):
            return
        found: dict[int, Tensor] = {}
        for settings, places, noise in self.config.groups():
            with trainer.averaged(), trainer.engine.autocast(), without_dropout(self.pipeline.network):
                found |= self._drawn(settings, places, noise)
        if dist.rank() == 0:
            images = level([found[i] for i in range(count)])
            save_grid(images, trainer.out / "samples" / f"step-{step:07d}.png", columns=math.ceil(count**0.5))

    def _drawn(self, settings: Settings, places: list[int], noise: list[int]) -> dict[int, Tensor]:
        """The prompts of some places by place, on rank 0; each rank draws its share."""
        world, rank = dist.world_size(), dist.rank()
        share = math.ceil(len(places) / world)  # equal on all ranks: the network may be divided over them
        mine = [(rank * share + i) % len(places) for i in range(share)]
        indices = [places[i] for i in mine]
        pipeline = self.pipeline if self._sees is None else self._sees.under(indices)
        prompts = [self.config.prompts[i] for i in indices]
        own = pipeline.sample(prompts, settings=settings, indices=[noise[i] for i in mine])
        own = own if self._sees is None else self._sees.finished(indices, own)
        images = dist.gather(own)[: len(places)]
        return dict(zip(places, images, strict=True)) if rank == 0 else {}


def level(images: Sequence[Tensor]) -> Tensor:
    """Pictures (3, H, W) of any sizes as one tensor (N, 3, H, W), white around the smaller ones."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    found = []
    for image in images:
        down, right = height - image.shape[1], width - image.shape[2]
        padding = (right // 2, right - right // 2, down // 2, down - down // 2)
        found.append(torch.nn.functional.pad(image, padding, value=1.0) if down or right else image)
    return torch.stack(found)


def sample_hook(config: Samples, pipeline: TextToImage, options: DenoiseOptions) -> SampleHook:
    """Sample pictures, each with the picture that the network is told where it is told one."""
    if config.own and config.pictures and any(own.size is not None for own in config.own):
        raise ValueError("samples.own: pictures that are told have one size; write samples.settings.size")
    seen = (config.settings.size, config.prompts, config.pictures, config.masks)
    return SampleHook(config, pipeline, concat.shown(options.concat, pipeline, *seen))


@contextmanager
def without_dropout(network: Network) -> Iterator[None]:
    """The network as it draws, inside; nothing where it has no dropout."""
    was = network.training
    if network.has_dropout:
        network.eval()
    try:
        yield
    finally:
        network.train(was)


def sized(config: Samples, network: Network, data: Data) -> Samples:
    """Sample pictures of the data's size, where neither they nor the network tell one (FLUX.1)."""
    if config.settings.size is not None or network.own_side is not None:
        return config
    side = planned.side(data)
    return replace(config, settings=replace(config.settings, size=(side, side)))
