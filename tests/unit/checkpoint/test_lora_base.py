"""A LoRA of another base is refused with the name of the base that it was trained over, as far as its files tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint.lora_files import read_lora
from ldm.models.presets import UNETS
from ldm.models.unet import UNet


def write(folder: Path, notes: dict[str, str]) -> Path:
    """A LoRA of one layer, much wider than the tiny network's."""
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 999), f"{name}.lora_B.weight": torch.ones(999, 2)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "style.safetensors", metadata=notes)
    return folder / "style.safetensors"


@pytest.mark.parametrize("place", ["beside", "header", "nowhere"])
def test_the_base_is_named(place: str, tmp_path: Path) -> None:
    path = write(tmp_path / "export", {"ss_sd_model_name": "emoji"} if place == "header" else {})
    if place == "beside":
        (path.parent / "adapter.json").write_text(json.dumps({"base": "emoji", "loras": [path.name]}))
    with pytest.raises(ValueError, match="none of its 2 tensors fits") as refused:
        read_lora(path, UNet(UNETS["tiny"]), [])
    assert ("it was trained over 'emoji'" in str(refused.value)) == (place != "nowhere")
