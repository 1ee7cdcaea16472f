"""Single files of Z-Image as ComfyUI's are laid out: what diffusers converts of ours, and strangers' read here."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoint.convert import Components, load_model
from ldm.models import networks
from ldm.models.transformers import presets
from ldm.models.vae.autoencoder import Autoencoder
from tests.families import make, scrambled
from tests.parity.test_transformer_files import NETWORK, one_line, same, single, stranger
from tests.parity.test_transformer_folders import save

torch.set_num_threads(1)
TEXT = "text_encoders.qwen3_4b.transformer."


def wide(folder: Path) -> Components:
    """With a head of 128 channels, as the published has, and 16 latent channels."""
    parts = make("zimage", folder)
    config = replace(presets.ZIMAGE, dim=128, n_heads=1, n_kv_heads=1, n_layers=2, n_refiner_layers=1, cap_feat_dim=32)
    vae = replace(parts.autoencoder.config, latent_channels=16)
    return replace(parts, network=scrambled(networks.build(config)), autoencoder=scrambled(Autoencoder(vae)))


def test_diffusers_converts_our_file(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers as convert

    parts = wide(tmp_path / "tokenizer")
    stored = load_file(single(parts, tmp_path / "x.safetensors"))
    found = convert({k: v for k, v in stored.items() if k.startswith(NETWORK)})
    state = parts.network.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found[k], v) for k, v in state.items())
    text = {k.removeprefix(f"{TEXT}model."): v for k, v in stored.items() if k.startswith(TEXT)}
    assert text.keys() == parts.text[0].model.state_dict().keys()


@pytest.mark.parametrize("prefix", ["", NETWORK, "diffusion_model."])
def test_a_network_alone(prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As z_image_turbo_bf16.safetensors, and with a norm that is not used; the rest comes from a folder."""
    parts = wide(tmp_path / "tokenizer")
    folder = save(parts, tmp_path / "folder")
    stored = load_file(single(parts, tmp_path / "all.safetensors"))
    net: dict[str, Tensor] = {prefix + k.removeprefix(NETWORK): v for k, v in stored.items() if k.startswith(NETWORK)}
    file = stranger(tmp_path / "z.safetensors", net | {f"{prefix}norm_final.weight": torch.ones(128)})
    one_line(file, "no text encoder qwen3_4b (Qwen3) (--text FOLDER gives them", vae=folder)
    with caplog.at_level(logging.WARNING):
        found = load_model(file, text=folder, vae=folder)
    same(parts, found)
    assert found.network.config == parts.network.config
    assert found.scheduler["shift"] == 3.0
    assert "nothing tells Z-Image from its Turbo" in caplog.text


def test_a_whole_file_needs_a_tokenizer_alone(tmp_path: Path) -> None:
    parts = wide(tmp_path / "tokenizer")
    folder = save(parts, tmp_path / "folder")
    stored = load_file(single(parts, tmp_path / "all.safetensors"))
    file = stranger(tmp_path / "aio.safetensors", {k: v for k, v in stored.items() if not k.startswith("vae.")})
    one_line(file, "holds a Qwen3 and, as all single files, no tokenizer for it: --text FOLDER", vae=folder)
    for shard in (folder / "text_encoder").glob("*.safetensors"):
        save_file({k: v + 1 for k, v in load_file(shard).items()}, shard)
    same(parts, load_model(file, text=folder, vae=folder))  # its own weights, that folder's tokenizer


def test_relatives_are_told(tmp_path: Path) -> None:
    one = torch.zeros(1)
    for name, told in (
        ("noise_refiner.0.attention.to_q.weight", "it is Z-Image in diffusers' names"),
        ("siglip_pad_token", "it is Z-Image-Omni, which is told pictures"),
        ("layers.0.adaLN_modulation.1.weight", "it is Lumina 2"),
    ):
        one_line(stranger(tmp_path / "x.safetensors", {name: one}), told)
    mixed = {"cap_pad_token": torch.zeros(1, 128), "x_pad_token": torch.zeros(1, 128)}
    one_line(stranger(tmp_path / "y.safetensors", mixed), "not a whole Z-Image: no tensor")
