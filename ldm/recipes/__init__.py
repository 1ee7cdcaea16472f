"""Functions that assemble one method: objective, adapter, data, hooks. No loop and no loss here."""

from __future__ import annotations

from ldm.data.mixture import Data
from ldm.recipes import autoencoder, clip, distill, text_to_image
from ldm.recipes.autoencoder import AutoencoderTask
from ldm.recipes.base import Assembly
from ldm.recipes.clip import ClipTask
from ldm.recipes.distill import DistillTask
from ldm.recipes.text_to_image import TextToImageTask
from ldm.train.trainer import TrainConfig


def assemble(
    task: AutoencoderTask | ClipTask | DistillTask | TextToImageTask,
    data: Data,
    train: TrainConfig,
    seed: int,
    workers: int,
) -> Assembly:
    """Put a method together."""
    if isinstance(task, AutoencoderTask):
        return autoencoder.build(task, data, train, seed, workers)
    if isinstance(task, ClipTask):
        return clip.build(task, data, train, seed, workers)
    if isinstance(task, DistillTask):
        return distill.build(task, data, train, seed, workers)
    return text_to_image.build(task, data, train, seed, workers)
