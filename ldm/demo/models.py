"""The demo's own model, before its training and after it."""

from __future__ import annotations

from pathlib import Path

from ldm.config.schema import RunConfig
from ldm.models import networks
from ldm.models.vae.latents import LatentCodec
from ldm.pipeline import TextToImage
from ldm.precision import chosen
from ldm.recipes.sources import load_autoencoder, load_towers
from ldm.recipes.text_to_image import TextToImageTask
from ldm.rng import seed_torch


def untrained(config: RunConfig) -> TextToImage:
    """The run's frozen parts and process around the random weights that its training starts from."""
    task = config.task
    assert isinstance(task, TextToImageTask)
    assert task.network is not None
    seed_torch(config.seed)  # then the same parts in the same order as the recipe: the same weights
    codec, towers = LatentCodec.of(load_autoencoder(task.vae)), load_towers(task.text)
    network = networks.build(task.network).eval().requires_grad_(False)
    return TextToImage(network, codec, towers, task.process, precision=chosen("auto", "cpu")).to("cpu")


def trained(out: Path) -> TextToImage:
    """What the run exported, with the process that it was trained for."""
    return TextToImage.load(out / "export", precision="auto")
