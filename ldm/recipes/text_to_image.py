"""Train a cross-attention U-Net on latents and text embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ldm.data.loader import DataConfig
from ldm.recipes.base import Assembly
from ldm.train.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TextToImageTask:
    kind: Literal["text_to_image"] = "text_to_image"


def build(task: TextToImageTask, data: DataConfig, train: TrainConfig, seed: int, workers: int) -> Assembly:
    raise ValueError("not yet")
