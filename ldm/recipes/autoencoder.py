"""Train a KL autoencoder on pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm import dist
from ldm.checkpoint.files import write_text
from ldm.checkpoint.folders import write_module
from ldm.config.load import encode
from ldm.data.grid import save_grid
from ldm.data.loader import Loader
from ldm.data.mixture import Data, main_source, without_texts
from ldm.metrics.features import EfficientNetLite0
from ldm.metrics.reconstruction import psnr, ssim
from ldm.models.discriminator import Discriminator, DiscriminatorConfig
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.objectives.autoencoder import AutoencoderLoss, AutoencoderObjective, Features
from ldm.plan.flops import count_flops
from ldm.plan.report import Job
from ldm.recipes import planned
from ldm.recipes.base import Assembly
from ldm.recipes.sources import training_data
from ldm.rng import seed_torch
from ldm.train.trainer import TrainConfig, Trainer
from ldm.types import Batch


@dataclass(frozen=True, kw_only=True)
class AutoencoderTask:
    """`perceptual_network` gives the features of the perceptual term; validation reads the split `validation`."""

    kind: Literal["autoencoder"] = "autoencoder"
    model: AutoencoderConfig
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: AutoencoderLoss = field(default_factory=AutoencoderLoss)
    perceptual_network: Literal["efficientnet_lite0", "none"] = "efficientnet_lite0"
    validation: str = "heldout"
    validate_every: int = 500
    """Optimizer steps between validations."""


class Validation:
    """Reconstructs held-out pictures with the averaged weights: PSNR, SSIM, latent spread and a picture of pairs."""

    on_demand = True

    def __init__(self, autoencoder: Autoencoder, images: Tensor, every: int) -> None:
        self.every, self.images, self._autoencoder = every, images, autoencoder
        self.last: dict[str, float] = {}

    @torch.no_grad()
    def __call__(self, trainer: Trainer, step: int) -> None:
        with trainer.averaged(), torch.no_grad():
            parts = self.images.split(32)
            moments = [self._autoencoder.encode(p.to(trainer.engine.device)).float() for p in parts]
            means = torch.cat([m.chunk(2, dim=1)[0] for m in moments])
            decoded = torch.cat([self._autoencoder.decode(m.chunk(2, dim=1)[0]).float().cpu() for m in moments])
        decoded = decoded.clamp(-1, 1)
        self.last = {
            "psnr": float(psnr(decoded, self.images).mean()),
            "ssim": float(ssim(decoded, self.images).mean()),
            "latent_std": float(means.std()),
            "step": step,
        }
        if dist.rank() == 0:
            folder = trainer.out / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            pairs = torch.stack([self.images[:32], decoded[:32]], dim=1).flatten(0, 1)
            save_grid(pairs, folder / f"step-{step:06d}.png", columns=16)
            with (trainer.out / "log" / "validation.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.last) + "\n")
            dist.say(f"step {step}: held-out PSNR {self.last['psnr']:.2f} dB, SSIM {self.last['ssim']:.4f}")


def held_out(data: Data, split: str, limit: int = 512) -> Batch:
    """The first samples of another split of the same data (a mixture's first), in stored order, not augmented."""
    source = main_source(data)
    captions = "none" if source.captions == "none" else "first"
    plain = replace(source, split=split, shuffle=False, captions=captions, crop="center", flip=False, cached=False)
    count = min(limit, len(Loader(replace(plain, last="wrap"), seed=0, micro_batch=1).samples))
    return Loader(plain, seed=0, micro_batch=count).batch(0, 0)


def build(task: AutoencoderTask, data: Data, train: TrainConfig, seed: int, workers: int) -> Assembly:
    """The autoencoder and its discriminator, the pictures, and validation."""
    seed_torch(seed)  # initial weights
    autoencoder, discriminator = Autoencoder(task.model), Discriminator(task.discriminator)
    device = dist.device()
    features: Features | None = None
    if task.perceptual_network == "efficientnet_lite0" and task.loss.perceptual > 0:
        features = EfficientNetLite0(device=device).perceptual_features
    objective = AutoencoderObjective(autoencoder, discriminator, task.loss, features).to(device)
    data = without_texts(data)
    loader = training_data(data, train, seed, workers)
    validation = Validation(autoencoder, held_out(data, task.validation)["image"], task.validate_every)

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        state = {k.removeprefix("autoencoder."): v for k, v in weights.items() if k.startswith("autoencoder.")}
        spread = validation.last.get("latent_std", 0.0)
        scale = 1.0 / spread if spread > 0 else task.model.scaling_factor
        config = replace(task.model, scaling_factor=round(scale, 5))
        write_module(folder / "vae", state, {"_class_name": "AutoencoderKL", **encode(config)})
        write_text(folder / "figures.json", json.dumps(validation.last, indent=1))

    return Assembly(objective, loader, [validation], export)


class Reconstruct(nn.Module):
    """Images -> moments -> images."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.autoencoder = Autoencoder(config)

    def forward(self, images: Tensor) -> Tensor:
        mean, _ = self.autoencoder.encode(images).chunk(2, dim=1)
        return self.autoencoder.decode(mean)


def job(task: AutoencoderTask, data: Data, train: TrainConfig, asked: planned.Asked) -> Job:
    """The autoencoder's own step."""
    said = ["the discriminator and the perceptual network are not counted", "checkpointing is not counted"]
    size = planned.side(data)
    planned.check_size(size, 2 ** (len(task.model.block_out_channels) - 1), "data.size")

    def build(recompute: bool) -> nn.Module:
        with torch.device("meta"):
            return Reconstruct(task.model).train()

    def inputs(batch: int) -> tuple[Any, ...]:
        return (torch.empty(batch, 3, size, size, device="meta"),)

    samples, stored = planned.samples_of(data, 0.0, False, said)
    return Job(
        name=asked.name, build=build, inputs=inputs, flops=float(count_flops(build(False), *inputs(1))),
        batch=train.batch, steps=train.steps, layout=planned.layout(train, asked), recompute=False,
        precision=planned.precision(train, asked.gpu), samples=samples, sample_bytes=stored, warnings=tuple(said),
    )  # fmt: skip
