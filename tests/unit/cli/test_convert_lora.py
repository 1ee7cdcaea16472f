"""`ldm convert --to lora | kohya`: a tuned model's difference from its base, as a file that gives it back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.adapters.sites import all_sites
from ldm.cli.convert import main
from ldm.pipeline import TextToImage
from tests.parity.test_diffusers_folder import make, save

LAYERS = (
    "unet.mid_block.resnets.0.conv1",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "text_encoder.text_model.encoder.layers.1.self_attn.v_proj",
)


@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_the_file_gives_the_tuned_weights_back(form: str, tmp_path: Path) -> None:
    parts = make("sd1")
    save(parts, tmp_path / "base")
    sites = all_sites(parts.unet, parts.text)
    with torch.no_grad():
        for name in LAYERS:
            weight = sites[name].read()
            weight += (0.1 * torch.randn(len(weight), 2) @ torch.randn(2, weight[0].numel())).view(weight.shape)
    save(parts, tmp_path / "tuned")
    target = tmp_path / "x.safetensors"
    argv = [str(tmp_path / "tuned"), str(target), "--to", form, "--base", str(tmp_path / "base")]
    assert main([*argv, "--rank", "2"]) == 0
    pipeline = TextToImage.load(tmp_path / "base")
    pipeline.load_lora(target)
    found = all_sites(pipeline.unet, pipeline.text)
    assert all(torch.allclose(found[n].read(), sites[n].read(), atol=1e-5) for n in sites)
    save(make("sd2"), tmp_path / "other")
    with pytest.raises(ValueError, match="of different form"):
        main([str(tmp_path / "other"), *argv[1:]])
    with pytest.raises(ValueError, match="the same weights: nothing to extract"):
        main([str(tmp_path / "base"), *argv[1:]])
    with pytest.raises(ValueError, match=r"--to \w+: needs --base"):
        main(argv[:-2])
    with pytest.raises(ValueError, match=r"expected a file ending in \.safetensors"):
        main([argv[0], str(tmp_path / "folder"), *argv[2:]])
