"""Functions that assemble one method: objective, adapter, data, hooks. No loop and no loss here."""

from __future__ import annotations

from types import ModuleType

from ldm.data.mixture import Data
from ldm.models.frozen import check_storage
from ldm.plan.report import Job
from ldm.recipes import (
    autoencoder,
    clip,
    controlnet,
    distill,
    dreambooth,
    finetune,
    inversion,
    ip_adapter,
    text_to_image,
)
from ldm.recipes.autoencoder import AutoencoderTask
from ldm.recipes.base import Assembly
from ldm.recipes.clip import ClipTask
from ldm.recipes.controlnet import ControlTask
from ldm.recipes.distill import DistillTask
from ldm.recipes.dreambooth import DreamboothTask
from ldm.recipes.finetune import FinetuneTask, Finetuning
from ldm.recipes.inversion import InversionTask
from ldm.recipes.ip_adapter import IPAdapterTask
from ldm.recipes.optimizers import check_optimizer
from ldm.recipes.planned import Asked
from ldm.recipes.text_to_image import TextToImageTask
from ldm.recipes.validation import captions_of, held_out_batch, is_built
from ldm.train.trainer import TrainConfig
from ldm.train.validate import LossOnHeldOut

Task = (
    AutoencoderTask
    | ClipTask
    | ControlTask
    | DistillTask
    | DreamboothTask
    | FinetuneTask
    | InversionTask
    | IPAdapterTask
    | TextToImageTask
)
RECIPES: dict[type[Task], ModuleType] = {
    AutoencoderTask: autoencoder,
    ClipTask: clip,
    ControlTask: controlnet,
    DistillTask: distill,
    DreamboothTask: dreambooth,
    FinetuneTask: finetune,
    InversionTask: inversion,
    IPAdapterTask: ip_adapter,
    TextToImageTask: text_to_image,
}
"""The recipe of a kind of task: `build` puts the method together, `job` tells the planner what it takes."""


def check_validation(task: Task, train: TrainConfig) -> None:
    """Raise ValueError for `train.validate` with a task that validates in its own way, and where nothing is frozen."""
    if train.engine.frozen != "fp32" and isinstance(task, (AutoencoderTask, ClipTask)):
        raise ValueError(
            f"train.engine.frozen: {train.engine.frozen!r}, but everything trains in the task {task.kind}; write fp32"
        )
    if train.validate is not None and not isinstance(task, (TextToImageTask, Finetuning)):
        raise ValueError(f"train.validate: is for text_to_image and fine-tuning; {task.kind} has none or its own")


def assemble(
    task: Task,
    data: Data,
    train: TrainConfig,
    seed: int,
    workers: int,
) -> Assembly:
    """Put a method together.

    Raises ValueError for `train.validate` with a task that validates in its own way, for `train.engine.frozen` where
    nothing is frozen, for an optimizer of what does not train, and without the package that it needs.
    """
    check_validation(task, train)
    check_optimizer(task, train)
    check_storage(train.engine.frozen)
    assembly = RECIPES[type(task)].build(task, data, train, seed, workers)
    if train.validate is not None:
        batch = held_out_batch(train.validate, data, captions_of(task), is_built(task))
        assembly.hooks.append(LossOnHeldOut(train.validate, batch, seed))
    return assembly


def plan_job(task: Task, data: Data, train: TrainConfig, asked: Asked) -> Job:
    """What the planner needs of a run. Raises ValueError, naming keys and values, for parts that do not fit."""
    return RECIPES[type(task)].job(task, data, train, asked)
