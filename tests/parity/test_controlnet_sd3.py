"""SD3's ControlNets against diffusers' model, files and pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from PIL import Image

from ldm.checkpoint.control_files import load_control, save_control
from ldm.config.load import decode
from ldm.models import presets
from ldm.models.families import check_control
from ldm.models.transformers.sd3_control import SD3ControlConfig, SD3ControlNet
from ldm.pipeline import Control, TextToImage
from tests.parity.test_controlnet import deviation
from tests.parity.test_transformer_pipelines import NEGATIVE, PROMPT, STEPS, both, close, drawn

torch.set_num_threads(1)
SMALL: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10,
    "out_channels": 4, "pos_embed_max_size": 12,
}  # fmt: skip


def pair(settings: dict[str, Any], folder: Path) -> tuple[SD3ControlNet, Any]:
    torch.manual_seed(0)
    theirs = SD3ControlNetModel(**settings)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(folder)
    ours = load_control(folder)
    assert isinstance(ours, SD3ControlNet)
    return ours, theirs


@pytest.mark.parametrize(
    "more", [{}, {"force_zeros_for_pooled_projection": False}, {"qk_norm": "rms_norm", "dual_attention_layers": [0]}]
)
@torch.no_grad()
def test_equals_diffusers(more: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(SMALL | more, tmp_path)
    x, t, shown = torch.randn(2, 4, 8, 6), torch.tensor([30.0, 970.0]), torch.randn(2, 4, 8, 6)
    text, pooled = torch.randn(2, 7, 12), torch.randn(2, 10)
    told = pooled if more.get("force_zeros_for_pooled_projection") is False else torch.zeros_like(pooled)  # pipeline's
    wanted = theirs(x, shown, 0.7, text, told, t).controlnet_block_samples
    found = ours(x, t, {"text": text, "pooled": pooled, "condition": shown}, 0.7)
    assert max(deviation(a, b) for a, b in zip(found.blocks, wanted, strict=True)) < 1e-5
    save_control(tmp_path / "again", ours.config, ours.state_dict())
    again = SD3ControlNetModel.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("steps", [(0.0, 1.0), (0.2, 0.7)])
def test_draws_as_theirs(forced: bool, steps: tuple[float, float], tmp_path: Path) -> None:
    ours, theirs = both("sd3", tmp_path)
    base = ours.network.config
    keys = [key for key in SMALL if key not in ("num_layers", "out_channels")]
    settings = {key: getattr(base, key) for key in keys} | {"num_layers": 1, "qk_norm": base.qk_norm}
    net, their_net = pair(settings | {"force_zeros_for_pooled_projection": forced}, tmp_path / "control")
    for vae in (ours.codec.autoencoder, theirs.vae):  # they draw from the posterior: make it one point
        with torch.no_grad():
            vae.encoder.conv_out.weight[4:] = 0
            vae.encoder.conv_out.bias[4:] = -60
    pipe = StableDiffusion3ControlNetPipeline(**theirs.components, controlnet=their_net)
    pipe.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(3).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    noise = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(1))
    wanted = pipe(
        PROMPT, negative_prompt=NEGATIVE, latents=noise, height=24, width=16, num_inference_steps=STEPS,
        guidance_scale=5.0, output_type="pt", control_image=image, controlnet_conditioning_scale=0.8,
        control_guidance_start=steps[0], control_guidance_end=steps[1],
    ).images  # fmt: skip
    control = Control(network=net, picture=image, scale=0.8, start=steps[0], end=steps[1])
    how = {"guidance": 5.0, "negative": NEGATIVE}
    close(drawn(ours.controlled([control]), noise, (24, 16), **how), wanted)
    assert (drawn(ours, noise, (24, 16), **how) - wanted).abs().max() > 5e-3


def test_published_settings_and_other_families(tmp_path: Path) -> None:
    canny = {
        "attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16, "joint_attention_dim": 4096,
        "num_attention_heads": 24, "num_layers": 6, "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192, "sample_size": 128,
    }  # fmt: skip
    config = decode(SD3ControlConfig, canny, "SD3-Controlnet-Canny")
    with torch.device("meta"):
        ours, theirs = SD3ControlNet(config), SD3ControlNetModel(**canny)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    check_control(config, presets.PRESETS["sd3_medium"], "'canny'", "'mine'")
    with pytest.raises(ValueError, match="of Stable Diffusion 3, but 'mine' is Stable Diffusion 1"):
        check_control(config, presets.PRESETS["sd15"], "'canny'", "'mine'")
    with pytest.raises(ValueError, match="of another Stable Diffusion 3 than 'mine': width 1536 for 2432"):
        check_control(config, presets.PRESETS["sd35_large"], "'canny'", "'mine'")
    with pytest.raises(ValueError, match="use_pos_embed False is not supported"):
        decode(SD3ControlConfig, canny | {"use_pos_embed": False}, "SD3.5 large's")
    net, _ = pair(SMALL, tmp_path / "small")
    with pytest.raises(ValueError, match="the SD3 ControlNet has no guess mode"):
        Control(network=net, picture=torch.zeros(3, 16, 16), guess=True)
    with pytest.raises(ValueError, match="edges is a ControlNet of Stable Diffusion 3, but the model is"):
        TextToImage.load("emoji").controlled([Control(network=net, picture=torch.zeros(3, 8, 8), name="edges")])


def test_a_copy_is_theirs(tmp_path: Path) -> None:
    """What a training starts from: `from_transformer` as diffusers' script calls it."""
    ours, theirs = both("sd3", tmp_path)
    made = SD3ControlNet.copy_of(ours.network, 2)
    wanted = SD3ControlNetModel.from_transformer(theirs.transformer, num_layers=2, num_extra_conditioning_channels=0)
    told = wanted.state_dict()
    zero = [k for k in told if k.startswith(("controlnet_blocks", "pos_embed_input"))]
    assert {k for k, v in made.state_dict().items() if not v.any()} == set(zero)
    for key, value in made.state_dict().items():
        if key.startswith("pos_embed_input"):
            assert value.shape == told[key].shape
        else:
            assert torch.equal(value, told[key]), key
    with pytest.raises(ValueError, match="layers: 3 is not between 1 and 2"):
        SD3ControlNet.copy_of(ours.network, 3)


def test_published_shapes_of_copies() -> None:
    """Stable Diffusion 3 medium's and 3.5 medium's: half of 24 layers, those with two attentions among them."""
    three, more = (SD3ControlConfig.of(presets.PRESETS[name]) for name in ("sd3_medium", "sd35_medium"))  # type: ignore[arg-type]
    assert (three.num_layers, three.joint_attention_dim, three.pos_embed_max_size) == (12, 4096, 192)
    assert (more.num_layers, more.dual_attention_layers, more.qk_norm) == (12, tuple(range(12)), "rms_norm")
    assert more.pos_embed_max_size == 384
