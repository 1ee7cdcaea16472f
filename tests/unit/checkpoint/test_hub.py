"""A hub id: what lies in the hub's cache loads without a network, and only the files that are needed are asked for."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from ldm.checkpoint.convert import _HUB_FILES, load_model, save_diffusers
from ldm.models.presets import UNETS
from ldm.models.text import TextConfig, TextTower
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder
from tests import miniature


def cached(cache: Path, name: str) -> UNet:
    """Write a model where huggingface_hub keeps a downloaded one."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123abcd")
    unet = UNet(UNETS["tiny"])
    torch.nn.init.normal_(unet.conv_out.weight)
    tower = TextTower(TextConfig(width=32, heads=2, layers=2, context_length=12, vocab_size=4096, bpe="emoji"))
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.parent.mkdir()
    save_diffusers(snapshot, network=unet, autoencoder=Autoencoder(miniature.VAE), text=[tower], scheduler=scheduler)
    return unet


def test_what_is_in_the_cache_loads_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    unet = cached(tmp_path, "someone/small")
    found = load_model("someone/small")
    assert found.scheduler["prediction_type"] == "v_prediction"
    assert all(torch.equal(a, b) for a, b in zip(found.network.state_dict().values(), unet.state_dict().values()))
    with pytest.raises(ValueError, match=r"someone/other: .*download it where there is a network"):
        load_model("someone/other")


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("model_index.json", True),
        ("unet/config.json", True),
        ("unet/diffusion_pytorch_model.safetensors", True),
        ("tokenizer/vocab.json", True),
        ("unet/diffusion_pytorch_model.bin", False),
        ("v1-5-pruned.ckpt", False),
    ],
)
def test_only_the_folders_own_files_are_asked_for(name: str, needed: bool) -> None:
    assert any(fnmatch.fnmatch(name, pattern) for pattern in _HUB_FILES) == needed
