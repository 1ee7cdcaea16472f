"""FLUX.1's ControlNets against diffusers' model, files and pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from PIL import Image

from ldm.checkpoint.control_files import load_control, save_control
from ldm.config.load import decode
from ldm.models import presets
from ldm.models.families import check_control
from ldm.models.transformers.flux_control import FluxControlConfig, FluxControlNet
from ldm.pipeline import Control
from tests.parity.test_controlnet import deviation
from tests.parity.test_transformer_pipelines import DYNAMIC, PROMPT, STEPS, both, close, drawn

torch.set_num_threads(1)
SMALL: dict[str, Any] = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": [4, 2, 2],
}  # fmt: skip


def pair(settings: dict[str, Any], folder: Path) -> tuple[FluxControlNet, Any]:
    torch.manual_seed(0)
    theirs = FluxControlNetModel(**settings)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(folder)
    ours = load_control(folder)
    assert isinstance(ours, FluxControlNet)
    return ours, theirs


def packed(x: torch.Tensor) -> torch.Tensor:
    return FluxControlNetPipeline._pack_latents(x, *x.shape)


@pytest.mark.parametrize("more", [{}, {"guidance_embeds": True}, {"num_single_layers": 0}])
@torch.no_grad()
def test_equals_diffusers(more: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(SMALL | more, tmp_path)
    x, t, shown = torch.randn(2, 4, 8, 6), torch.tensor([30.0, 970.0]), torch.randn(2, 4, 8, 6)
    text, pooled, guidance = torch.randn(2, 7, 12), torch.randn(2, 10), torch.tensor([2.0, 3.5])
    ids = FluxControlNetPipeline._prepare_latent_image_ids(1, 4, 3, "cpu", torch.float32)
    told = {"guidance": guidance} if more.get("guidance_embeds") else {}
    wanted = theirs(
        packed(x), packed(shown), conditioning_scale=0.7, encoder_hidden_states=text, pooled_projections=pooled,
        timestep=t / 1000, img_ids=ids, txt_ids=torch.zeros(7, 3), **told,
    )  # fmt: skip
    cond = {"text": text, "pooled": pooled, "condition": shown, "guidance": guidance}
    found = ours(x, t, cond, 0.7)
    assert len(found.single) == len(wanted.controlnet_single_block_samples or ())
    all_of = (*wanted.controlnet_block_samples, *(wanted.controlnet_single_block_samples or ()))
    assert max(deviation(a, b) for a, b in zip((*found.joint, *found.single), all_of, strict=True)) < 1e-5
    save_control(tmp_path / "again", ours.config, ours.state_dict())
    again = FluxControlNetModel.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("kind", ["flux", "flux_schnell"])
@pytest.mark.parametrize("singles", [0, 1])
@pytest.mark.parametrize("steps", [(0.0, 1.0), (0.2, 0.7)])
def test_draws_as_theirs(kind: str, singles: int, steps: tuple[float, float], tmp_path: Path) -> None:
    ours, theirs = both(kind, tmp_path, DYNAMIC if kind == "flux" else None)
    base = ours.network.config
    settings = {key: getattr(base, key) for key in SMALL} | {"num_layers": 1, "num_single_layers": singles}
    settings |= {"guidance_embeds": base.guidance_embeds}
    net, their_net = pair(settings, tmp_path / "control")
    channels = ours.codec.channels
    for vae in (ours.codec.autoencoder, theirs.vae):  # they draw from the posterior: make it one point
        with torch.no_grad():
            vae.encoder.conv_out.weight[channels:] = 0
            vae.encoder.conv_out.bias[channels:] = -60
    parts = {k: v for k, v in theirs.components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = FluxControlNetPipeline(**parts, controlnet=their_net)
    pipe.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(3).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    noise = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(1))
    wanted = pipe(
        PROMPT, latents=packed(noise), height=24, width=16, num_inference_steps=STEPS, guidance_scale=3.0,
        output_type="pt", control_image=image, controlnet_conditioning_scale=0.8, control_guidance_start=steps[0],
        control_guidance_end=steps[1], max_sequence_length=ours.text[-1].config.max_length,
    ).images  # fmt: skip
    control = Control(network=net, picture=image, scale=0.8, start=steps[0], end=steps[1])
    guidance = 3.0 if kind == "flux" else 1.0
    close(drawn(ours.controlled([control]), noise, (24, 16), guidance=guidance), wanted)
    assert (drawn(ours, noise, (24, 16), guidance=guidance) - wanted).abs().max() > 5e-3


def test_published_settings_and_other_families() -> None:
    canny = {
        "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": True, "in_channels": 64,
        "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 5, "num_mode": None,
        "num_single_layers": 0, "patch_size": 1, "pooled_projection_dim": 768,
    }  # fmt: skip
    config = decode(FluxControlConfig, canny, "like FLUX.1-dev-Controlnet-Canny")
    with torch.device("meta"):
        ours, theirs = FluxControlNet(config), FluxControlNetModel(**canny)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    check_control(config, presets.PRESETS["flux_dev"], "'canny'", "'mine'")
    with pytest.raises(ValueError, match=r"'canny' is a ControlNet of FLUX\.1, but 'mine' is Stable Diffusion 3"):
        check_control(config, presets.PRESETS["sd35_medium"], "'canny'", "'mine'")
    with pytest.raises(ValueError, match="num_mode 7 is not supported"):
        decode(FluxControlConfig, canny | {"num_mode": 7}, "a union")
