"""Parts in the host's memory, each on the device while it is used: the same pictures, and the card is free after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.diffusion.prediction import V
from ldm.diffusion.process import Process
from ldm.models.presets import UNETS
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.latents import LatentCodec
from ldm.pipeline import Settings, TextToImage
from tests import miniature
from tests.devices import DEVICES

KINDS = ("unet", "sd3", "flux", "pixart", "zimage")
SETTINGS = Settings(steps=2, guidance=2.0, size=(32, 32))


def pipeline(kind: str, folder: Path) -> TextToImage:
    """A small model of a family with its text encoders."""
    pytest.importorskip("open_clip")
    if kind == "unet":
        from ldm.models.text import TextConfig, TextTower

        torch.manual_seed(0)
        tower = TextTower(TextConfig(width=32, heads=2, layers=2, context_length=12, vocab_size=4096, bpe="emoji"))
        network = UNet(UNETS["tiny"]).requires_grad_(False).eval()
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.1)
        codec = LatentCodec.of(Autoencoder(miniature.VAE).eval().requires_grad_(False))
        return TextToImage(network, codec, [tower], Process(prediction=V()))
    pytest.importorskip("transformers")
    from tests import families

    made = families.make(kind, folder / "model")
    from ldm.diffusion.prediction import Velocity
    from ldm.diffusion.schedule import Flow

    learned = Process(prediction=V(), variance="learned")
    process = learned if kind == "pixart" else Process(schedule=Flow(), prediction=Velocity())
    return TextToImage(made.network, made.codec, made.text, process)


def draw(model: TextToImage) -> Tensor:
    return model.sample(["a red apple"], settings=SETTINGS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_offloaded_parts_draw_the_same(device: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = pipeline(kind, tmp_path)
    expected = draw(model)
    used: list[tuple[str, bool]] = []

    def watch(name: str) -> Any:
        return lambda module, *_: used.append((name, next(module.parameters()).device.type == device))

    hooks = [part.register_forward_pre_hook(watch(name)) for name, part in (("network", model.network),)]
    hooks += [tower.register_forward_pre_hook(watch("text")) for tower in model.text]
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    made = draw(model.offload(device))
    for hook in hooks:
        hook.remove()
    assert used
    assert all(there for _, there in used)
    close = 0.0 if device == "cpu" else 1e-3
    assert float((made - expected).abs().max()) <= close
    parts = [model.network, model.codec.autoencoder, *model.text]
    assert {p.device.type for part in parts for p in part.parameters()} == {"cpu"}
    if device == "cuda":
        del made
        assert torch.cuda.memory_allocated() - before < 1 << 20, "something stayed on the card"
