"""Scripts of version 0.1 import and read what they know by its earlier name."""

from __future__ import annotations

from importlib import import_module

import pytest

from ldm.pipeline import TextToImage

NAMES = {
    "ldm.models.autoencoder": ("ldm.models.vae.autoencoder", "AutoencoderConfig"),
    "ldm.models.prompts": ("ldm.models.text.prompts", "encode_prompts"),
    "ldm.models.text": ("ldm.models.text.clip", "TextTower"),
    "ldm.models.unet": ("ldm.models.unet.config", "UNetConfig"),
    "ldm.evaluate.fid": ("ldm.metrics.fid", "compare"),
    "ldm.pipeline": ("ldm.sampling.settings", "Settings"),
}


@pytest.mark.parametrize("old", NAMES)
def test_modules(old: str) -> None:
    new, name = NAMES[old]
    assert getattr(import_module(old), name) is getattr(import_module(new), name)


def test_the_network_of_a_pipeline() -> None:
    pipe = TextToImage.load("emoji")
    assert pipe.unet is pipe.network
