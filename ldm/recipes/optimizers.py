"""What an optimizer's settings ask of a task, told from the config alone: before anything is loaded or written."""

from __future__ import annotations

from typing import Any

from ldm.adapters.full import FullConfig
from ldm.adapters.lora_config import LoraConfig
from ldm.adapters.pivotal import PivotalConfig
from ldm.adapters.tokens import TokensConfig
from ldm.models.network import NO_HIDDEN
from ldm.recipes.controlnet import ControlTask
from ldm.recipes.distill import DistillTask
from ldm.recipes.dreambooth import DreamboothTask
from ldm.recipes.finetune import FinetuneTask
from ldm.recipes.inversion import InversionTask
from ldm.recipes.text_to_image import TextToImageTask
from ldm.train.trainer import TrainConfig


def check_optimizer(task: Any, train: TrainConfig) -> None:
    """Raise ValueError for an algorithm, a decay or rates of weights that do not train in this task."""
    optim, adapter = train.optim, _adapter(task)
    whole = isinstance(task, ControlTask | TextToImageTask) or adapter is FullConfig
    if optim.algorithm == "muon" and not whole:
        raise ValueError(NO_HIDDEN)
    if optim.weight_decay and adapter in (TokensConfig, PivotalConfig):
        raise ValueError(
            f"train.optim.weight_decay: {optim.weight_decay} would pull new tokens to zero; write 0 for them"
        )
    if optim.rates.lora_plus != 1 and adapter not in (LoraConfig, PivotalConfig):
        raise ValueError(f"train.optim.rates.lora_plus: {optim.rates.lora_plus}, but no LoRA trains; write 1")


def _adapter(task: Any) -> type | None:
    """The config of what trains on a base; None where that is something of the task's own."""
    if isinstance(task, DistillTask):
        return FullConfig if task.lora is None else LoraConfig
    if isinstance(task, InversionTask):
        return TokensConfig
    return type(task.adapter) if isinstance(task, DreamboothTask | FinetuneTask) else None
