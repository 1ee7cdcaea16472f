"""`ldm sample` under a ControlNet and with an image prompt, by the options that save memory or time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint.control_files import save_control
from ldm.checkpoint.ip_adapter_files import About, save_ip_adapter
from ldm.cli.__main__ import main
from ldm.models.unet.controlnet import ControlNet
from ldm.models.unet.image_prompt import IPAdapter
from ldm.pipeline import TextToImage
from ldm.recipes.sources import load_image_encoder

torch.set_num_threads(1)
OPTIONS = {
    "--batch 1": 0.1,
    "--attention-slice 16": 0.1,
    "--blocks-on-device 2": 0.1,
    "--offload": 0.1,
    "--precision bf16": 1.0,
}
"""Bounds of the mean distance to the plain picture, in levels of 255."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Words of both, of random weights that the picture shows."""
    folder = tmp_path_factory.mktemp("told")
    torch.manual_seed(0)
    base, encoder = TextToImage.load("emoji"), load_image_encoder("clip_emoji")
    control = ControlNet.copy_of(base.network, base.codec.factor)
    for parameter in control.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    save_control(folder / "control", control.config, control.state_dict())
    adapter = IPAdapter.beside(base.network, encoder.of(False), "plain", None)
    save_ip_adapter(folder / "ip", adapter.config, adapter.state_dict(), About(base="emoji", encoder="clip_emoji"))
    picture = str(folder / "picture.png")
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 100).convert("RGB").save(picture)
    return {
        "none": [],
        "control": ["--control", f"{folder / 'control'}:{picture}"],
        "ip": ["--ip-adapter", str(folder / "ip"), "--image-prompt", picture],
    }


def drawn(out: Path, *words: str) -> np.ndarray:
    own = ["a red apple", "--model", "emoji", "--steps", "2", "--count", "2", "--device", "cpu", "--out", str(out)]
    assert main(["sample", *own, *words]) == 0
    return np.stack([np.asarray(Image.open(path), dtype=np.float64) for path in sorted(out.glob("0*.png"))])


@pytest.mark.parametrize("kind", ["control", "ip"])
def test_every_option_draws_the_plain_picture(kind: str, told: dict[str, list[str]], tmp_path: Path) -> None:
    plain, without = (drawn(tmp_path / k, *told[k]) for k in (kind, "none"))
    distances = {
        option: float(np.abs(drawn(tmp_path / f"{i}", *told[kind], *option.split()) - plain).mean())
        for i, option in enumerate(OPTIONS)
    }
    assert {o: d for o, d in distances.items() if d > OPTIONS[o]} == {}
    assert np.abs(plain - without).mean() > 2 * max(OPTIONS.values())  # what is told is seen
