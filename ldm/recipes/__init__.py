"""Functions that assemble one method: objective, adapter, data, hooks. No loop and no loss here."""

from __future__ import annotations

from ldm.data.mixture import Data
from ldm.recipes import autoencoder, clip, distill, dreambooth, finetune, inversion, text_to_image
from ldm.recipes.autoencoder import AutoencoderTask
from ldm.recipes.base import Assembly
from ldm.recipes.clip import ClipTask
from ldm.recipes.distill import DistillTask
from ldm.recipes.dreambooth import DreamboothTask
from ldm.recipes.finetune import FinetuneTask
from ldm.recipes.inversion import InversionTask
from ldm.recipes.text_to_image import TextToImageTask
from ldm.train.trainer import TrainConfig
from ldm.train.validate import LossOnHeldOut

Task = AutoencoderTask | ClipTask | DistillTask | DreamboothTask | FinetuneTask | InversionTask | TextToImageTask


def check_validation(task: Task, train: TrainConfig) -> None:
    """Raise ValueError for `train.validate` with a task that validates in its own way."""
    if train.validate is not None and not isinstance(task, TextToImageTask):
        raise ValueError(f"train.validate: is for the task text_to_image; {task.kind} has none or its own")


def assemble(
    task: Task,
    data: Data,
    train: TrainConfig,
    seed: int,
    workers: int,
) -> Assembly:
    """Put a method together. Raises ValueError for `train.validate` with a task that validates in its own way."""
    check_validation(task, train)
    if isinstance(task, AutoencoderTask):
        return autoencoder.build(task, data, train, seed, workers)
    if isinstance(task, ClipTask):
        return clip.build(task, data, train, seed, workers)
    if isinstance(task, DistillTask):
        return distill.build(task, data, train, seed, workers)
    if isinstance(task, DreamboothTask):
        return dreambooth.build(task, data, train, seed, workers)
    if isinstance(task, FinetuneTask):
        return finetune.build(task, data, train, seed, workers)
    if isinstance(task, InversionTask):
        return inversion.build(task, data, train, seed, workers)
    assembly = text_to_image.build(task, data, train, seed, workers)
    if train.validate is not None:
        batch = autoencoder.held_out(data, train.validate.split, train.validate.samples)
        assembly.hooks.append(LossOnHeldOut(train.validate, batch, seed))
    return assembly
