"""Train a small CLIP on captioned pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm import dist
from ldm.checkpoint.files import write_text
from ldm.checkpoint.folders import write_module
from ldm.config.load import encode
from ldm.data.mixture import Data
from ldm.metrics.retrieval import caption_retrieval
from ldm.models.text import ClipConfig, build_clip, build_tokenizer
from ldm.objectives.contrastive import ContrastiveObjective
from ldm.plan.report import Job
from ldm.recipes import planned
from ldm.recipes.autoencoder import held_out
from ldm.recipes.base import Assembly
from ldm.recipes.sources import training_data
from ldm.rng import seed_torch
from ldm.train.trainer import TrainConfig, Trainer


@dataclass(frozen=True, kw_only=True)
class ClipTask:
    """Validation measures retrieval in the splits `validation`; `augment` is the strength of zooms and shifts."""

    kind: Literal["clip"] = "clip"
    model: ClipConfig = field(default_factory=ClipConfig)
    augment: float = 0.15
    validation: tuple[str, ...] = ("heldout",)
    validate_every: int = 500
    """Optimizer steps between validations."""


class RetrievalValidation:
    """Picture to caption retrieval on held-out splits with the averaged weights, each against the whole split."""

    on_demand = False

    def __init__(self, clip: nn.Module, tokens: dict[str, Tensor], images: dict[str, Tensor], every: int) -> None:
        self.every, self._clip, self._tokens, self._images = every, clip, tokens, images
        self.last: dict[str, Any] = {}

    @torch.no_grad()
    def __call__(self, trainer: Trainer, step: int) -> None:
        clip: Any = self._clip
        device = trainer.engine.device
        figures: dict[str, Any] = {"step": step}
        was = clip.training
        clip.eval()
        with trainer.averaged(), torch.no_grad():
            for split, tokens in self._tokens.items():
                parts = self._images[split].split(64)
                image = torch.cat([clip.encode_image(p.to(device), normalize=True).float().cpu() for p in parts])
                text = torch.cat(
                    [clip.encode_text(p.to(device), normalize=True).float().cpu() for p in tokens.split(64)]
                )
                ks = [k for k in (1, 10) if k <= len(text)]
                found = caption_retrieval(image, text, range(len(image)), candidates=len(text), ks=ks)
                figures[split] = {"candidates": len(text), **{f"R@{k}": found.at(k).rate for k in ks}}
        clip.train(was)
        self.last = figures
        if dist.rank() == 0:
            with (trainer.out / "log" / "validation.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")
            parts = [f"{s} {k} {v:.3f}" for s in self._tokens for k, v in figures[s].items() if k != "candidates"]
            dist.say(f"step {step}: {', '.join(parts)}")


def build(task: ClipTask, data: Data, train: TrainConfig, seed: int, workers: int) -> Assembly:
    """Both towers, captioned pictures, and retrieval on held-out ones."""
    seed_torch(seed)  # initial weights
    clip = build_clip(task.model)
    tokenizer = build_tokenizer(task.model)
    objective = ContrastiveObjective(clip, task.augment).to(dist.device())
    loader = training_data(data, train, seed, workers, tokenize=tokenizer)
    images, tokens = {}, {}
    for split in task.validation:
        samples = held_out(data, split)
        images[split] = samples["image"]
        tokens[split] = tokenizer(samples["caption"])
    validation = RetrievalValidation(clip, tokens, images, task.validate_every)

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        write_module(folder / "clip", weights, {"_class_name": "CLIP", **encode(task.model)})
        write_text(folder / "figures.json", json.dumps(validation.last, indent=1))

    return Assembly(objective, loader, [validation], export)


def job(task: ClipTask, data: Data, train: TrainConfig, asked: planned.Asked) -> Job:
    """Both towers on pictures and tokens."""

    def build(recompute: bool) -> nn.Module:
        with torch.device("meta"):
            model = build_clip(task.model).train()
        return planned.Loss(ContrastiveObjective(model, task.augment))

    def inputs(batch: int) -> tuple[Any, ...]:
        size = task.model.image_size
        tokens = torch.zeros(batch, task.model.context_length, dtype=torch.int64)
        return (planned.positions(batch) | {"image": torch.zeros(batch, 3, size, size), "tokens": tokens},)

    said = ["checkpointing is not counted: the towers have none", *planned.attention(asked.gpu)]
    return planned.loss_job(asked, data, train, build, inputs, said=said)
