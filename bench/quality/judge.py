"""The quality of a model in training: what its pictures and its estimates of x_0 are worth, by one rule for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.quality.runs import Protocol
from ldm.evaluate import held_out, measure, statistics
from ldm.evaluate.sampler_measure import Judge
from ldm.metrics.features import EfficientNetLite0
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.sources import load_clip

HELD_OUT = "heldout"
"""The split of concepts that no recipe sees."""
UNSEEN = "compositional"
"""The split of combinations of seen parts that no recipe sees."""


class Quality:
    """Retrieval by the shipped CLIP, kernel distance by EfficientNet-Lite0, the velocity's error on held-out pictures.

    All in float32, on the averaged weights, without touching torch's global generator's place in training.
    """

    def __init__(self, protocol: Protocol, data: str, split: str, cache: Path) -> None:
        clip, config = load_clip("clip_emoji")
        self.protocol, self.data, self.split = protocol, data, split
        self.judge = Judge(
            network=EfficientNetLite0(), clip=clip, clip_config=config, clip_name="clip_emoji", data=data,
            candidates=protocol.candidates, seed=protocol.seed,
        )  # fmt: skip
        self.size = 64
        reference = measure.draw(data, split, protocol.real, seed=protocol.seed + 1)
        self.real = statistics.real_features(self.judge.network, data, split, reference.ids, self.size, cache)

    def of(self, pipeline: TextToImage, settings: Settings) -> dict[str, Any]:
        """Every figure, with none left out: which judges count for a recipe is said where they are told."""
        settings = replace(settings, steps=self.protocol.steps, seed=self.protocol.seed, batch=32)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return {
                "train": self.drawn(pipeline, settings, self.split),
                "unseen": self.drawn(pipeline, settings, UNSEEN),
                "velocity_error": self.errors(pipeline),
            }

    def drawn(self, pipeline: TextToImage, settings: Settings, split: str) -> dict[str, Any]:
        """Of the pictures of a split's captions."""
        drawn = measure.draw(self.data, split, self.protocol.pictures, seed=self.protocol.seed)
        images = pipeline.sample(drawn.captions, settings=settings)
        figures = self.judge.figures(self.judge.describe(images), drawn.captions, drawn.pool, self.real)
        recall = figures["R@1"]
        return {
            "retrieval": {"rate": recall["rate"], "interval_95": recall["interval_95"], "chance": recall["chance"]},
            "kernel_distance": figures["kernel_distance"],
        }

    def errors(self, pipeline: TextToImage) -> dict[str, Any]:
        """Of the straight path's velocity, the mean over the levels and each level's."""
        chosen = measure.draw(self.data, HELD_OUT, self.protocol.held_out, seed=self.protocol.seed)
        images = measure.real_pictures(self.data, HELD_OUT, chosen.ids, self.size)
        found = held_out.velocity_errors(pipeline, images, chosen.captions, seed=self.protocol.seed).mean(0)
        return {"mean": float(found.mean()), "levels": found.tolist()}


def calls(settings: Settings, protocol: Protocol) -> int:
    """Network calls of a guided picture, which are the same for all rows. Raises ValueError for a sampler with more."""
    if settings.sampler not in ONE_CALL:
        raise ValueError(
            f"task.samples.settings.sampler: {settings.sampler!r} is not one of {', '.join(ONE_CALL)}, "
            "which call the network once a step"
        )
    return protocol.steps * (2 if settings.guidance != 1 else 1)


ONE_CALL: Sequence[str] = ("dpmpp_2m", "ddim", "ddpm", "euler", "unipc")
