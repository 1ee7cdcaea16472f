"""Model configs: mistakes are told by key and value, presets are valid and survive YAML, sizes are as stated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.config.load import decode, encode
from ldm.models import presets
from ldm.models.text import ClipConfig, TextConfig, Tokenizer, build_clip
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (UNetConfig, {"norm_num_groups": 7}, "norm_num_groups 7 must divide"),
        (UNetConfig, {"attention_head_dim": 7}, "heads.* 7 must divide block_out_channels 320"),
        (UNetConfig, {"attention_head_dim": (8, 8)}, "attention_head_dim .*each of 4 levels"),
        (UNetConfig, {"layers_per_block": 0}, "layers_per_block 0: expected a positive number"),
        (UNetConfig, {"down_block_types": ("DownBlock2D",)}, "down_block_types .*each of 4 levels"),
        (UNetConfig, {"mid_block_type": "None"}, "mid_block_type 'None' is not one of"),
        (UNetConfig, {"act_fn": "mish"}, "act_fn 'mish' is not supported; only 'silu'"),
        (UNetConfig, {"class_embed_type": "projection"}, "projection_class_embeddings_input_dim is needed"),
        (UNetConfig, {"addition_embed_type": "text"}, "addition_embed_type 'text' is not one of"),
        (AutoencoderConfig, {"norm_num_groups": 48}, "norm_num_groups 48 must divide"),
        (AutoencoderConfig, {"scaling_factor": 0.0}, "scaling_factor must be positive"),
        (AutoencoderConfig, {"down_block_types": ("DownBlock2D",) * 4}, "expected 'DownEncoderBlock2D'"),
        (TextConfig, {"heads": 7}, "width 768 must be a multiple of heads 7"),
        (TextConfig, {"layers": 1, "output": "penultimate"}, "needs at least 2 layers"),
        (ClipConfig, {"patch_size": 7}, "image_size 64 must be a multiple of patch_size 7"),
        (ClipConfig, {"vision_head_width": 50}, "vision_width 192 must be a multiple"),
    ],
)
def test_mistakes(cls: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**settings)


def test_presets_survive_plain_data() -> None:
    for table in (presets.UNETS, presets.AUTOENCODERS, presets.CLIPS):
        for config in table.values():
            assert decode(type(config), encode(config)) == config


def test_sizes_of_the_small_models() -> None:
    with torch.device("meta"):
        unet = UNet(presets.UNETS["emoji"])
    assert sum(p.numel() for p in unet.parameters()) == 5_440_548
    assert sum(p.numel() for p in build_clip(presets.CLIPS["emoji"]).parameters()) == 4_475_905


def test_a_new_unet_predicts_zero_and_every_parameter_is_used() -> None:
    torch.manual_seed(0)
    unet = UNet(presets.UNETS["tiny"])
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([0, 999]), {"text": torch.randn(2, 5, 32)}
    assert unet(x, t, cond).abs().sum() == 0
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    unet(x, t, cond).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def test_missing_conditioning_is_named() -> None:
    unet = UNet(UNetConfig(**(encode_tuple(presets.UNETS["tiny"]) | {"num_class_embeds": 3})))
    with pytest.raises(ValueError, match=r"needs cond 'class'; got \['text'\]"):
        unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), {"text": torch.zeros(1, 5, 32)})
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), {"guidance": torch.ones(1), "text": torch.zeros(1, 5, 32)})


def encode_tuple(config: UNetConfig) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in encode(config).items()}


def test_autoencoder_size_and_clamp() -> None:
    torch.manual_seed(0)
    model = Autoencoder(presets.AUTOENCODERS["tiny"])
    assert model.factor == 4
    with pytest.raises(ValueError, match=r"\(30, 32\): each side must be a multiple of 4"):
        model.encode(torch.zeros(1, 3, 30, 32))
    with torch.no_grad():
        model.quant_conv.bias.fill_(1000)  # type: ignore[union-attr]
    assert model.encode(torch.zeros(1, 3, 8, 8))[:, 4:].max() == 20
    with pytest.raises(ValueError, match="scale must be positive"):
        LatentCodec(model, 0.0)
    loss = model.decode(torch.randn(1, 4, 2, 2)).sum()
    (grad,) = torch.autograd.grad(loss, model.last_layer)
    assert grad.shape == model.last_layer.shape


def test_autocast_keeps_moments_float32_and_is_close() -> None:
    torch.manual_seed(0)
    model = Autoencoder(presets.AUTOENCODERS["tiny"])
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    exact = model.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.encode(images.contiguous(memory_format=torch.channels_last))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_tokenizer_messages(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="expected a list of prompts"):
        Tokenizer("emoji")("a red apple")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer("nowhere.txt")
    (tmp_path / "bad.txt").write_text("#version\na b\nabc\n")
    with pytest.raises(ValueError, match="two tokens a line; got 'abc'"):
        Tokenizer(str(tmp_path / "bad.txt"))
    with pytest.raises(ValueError, match="vocab_size 100: bpe 'emoji' has 4096 tokens"):
        build_clip_tokenizer()


def build_clip_tokenizer() -> None:
    from ldm.models.text import build_tokenizer

    build_tokenizer(ClipConfig(vocab_size=100))
