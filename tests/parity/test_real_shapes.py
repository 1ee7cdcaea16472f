"""The published shapes with random weights against diffusers and transformers, in float32. Slow: minutes, 8 GB."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.config.load import encode
from ldm.models import presets
from ldm.models.text import TextTower
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae.autoencoder import Autoencoder

pytestmark = pytest.mark.slow
BOUND = 1e-5


def deviation(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def share(theirs: nn.Module, cls: type[nn.Module], config: Any) -> Any:
    """Our module on their very tensors: no second copy in memory."""
    with torch.device("meta"):
        ours = cls(config)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval()


def their_unet(config: UNetConfig) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(
        {k: v for k, v in encode(config).items() if k != "num_attention_heads"}
    ).eval()


@pytest.mark.parametrize(
    ("name", "depth", "size"),
    [("sd15", None, 32), ("sd15_inpainting", None, 16), ("sd21", None, 16), ("sdxl", (1, 1, 1), 16)],
)
@torch.no_grad()
def test_unet(name: str, depth: tuple[int, ...] | None, size: int) -> None:
    """SDXL has its widths at depth one: its 2.6 G parameters would need 10 GB here."""
    from dataclasses import replace

    torch.manual_seed(0)
    config = presets.UNETS[name]
    config = replace(config, transformer_layers_per_block=depth) if depth else config
    theirs = their_unet(config)
    ours = share(theirs, UNet, config)
    x, t = torch.randn(1, config.in_channels, size, size), torch.tensor([421])
    text = torch.randn(1, 77, config.per_level("cross_attention_dim")[0])
    cond, more = {"text": text}, {}
    if name == "sdxl":
        cond |= {"pooled": torch.randn(1, 1280), "time_ids": torch.tensor([[1024.0, 900, 0, 64, 1024, 1024]])}
        more = {"added_cond_kwargs": {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}}
    wanted = theirs(x, t, encoder_hidden_states=text, **more).sample
    assert deviation(ours(x, t, cond), wanted) < BOUND
    del theirs, ours
    gc.collect()


@torch.no_grad()
def test_autoencoder() -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    config = presets.AUTOENCODERS["kl_f8"]
    theirs = AutoencoderKL.from_config(encode(config)).eval()
    ours = share(theirs, Autoencoder, config)
    images, z = torch.rand(1, 3, 128, 128) * 2 - 1, torch.randn(1, 4, 16, 16)
    assert deviation(ours.encode(images)[:, :4], theirs.encode(images).latent_dist.mean) < BOUND
    assert deviation(ours.decode(z), theirs.decode(z).sample) < BOUND


@pytest.mark.parametrize(("name", "index"), [("sd15", 0), ("sd21", 0), ("sdxl", 0), ("sdxl", 1)])
@torch.no_grad()
def test_text(name: str, index: int) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from ldm.checkpoint.maps import carry_out, text_to_hf

    torch.manual_seed(0)
    config = presets.TEXTS[name][index]
    tower = TextTower(config)
    hf = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        hidden_act=config.activation,
        projection_dim=config.projection or 8,
        eos_token_id=49407,
        bos_token_id=49406,
    )
    theirs = CLIPTextModelWithProjection(hf).eval()
    state = tower.model.state_dict()
    report = theirs.load_state_dict(carry_out(text_to_hf(state), state, "tower"), strict=False, assign=True)
    assert not report.unexpected_keys
    tokens = tower.tokenize(["a photograph of an astronaut riding a horse", ""])
    expected = theirs(tokens, output_hidden_states=True)
    states = {
        "last": expected.last_hidden_state,
        "penultimate": expected.hidden_states[-2],
        "penultimate_norm": theirs.text_model.final_layer_norm(expected.hidden_states[-2]),
    }[config.output]
    ours = tower.encode(tokens)
    assert deviation(ours["text"], states) < BOUND
    if config.projection:
        assert deviation(ours["pooled"], expected.text_embeds) < BOUND
