"""ControlNet against diffusers' ControlNetModel with the same weights: outputs, gradients, names, what a U-Net makes of
them, and the published settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from ldm.config.load import decode
from ldm.models.unet import ControlNet, ControlNetConfig, UNet, UNetConfig

torch.set_num_threads(1)
SD1: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "layers_per_block": 2,
    "conditioning_embedding_out_channels": (4, 6, 8, 12),
}
SDXL: dict[str, Any] = SD1 | {
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": (2, 4, 8),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 46,
}
CASES: dict[str, dict[str, Any]] = {
    "sd1": SD1,
    "sd2": SD1 | {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "sdxl": SDXL,
    "sdxl mid": SDXL | {"transformer_layers_per_block": (0, 0, 1)},
    "sdxl small": SDXL | {"down_block_types": ("DownBlock2D",) * 3, "transformer_layers_per_block": (0, 0, 0)},
    "bgr": SD1 | {"controlnet_conditioning_channel_order": "bgr"},
    "shuffle": SD1 | {"global_pool_conditions": True},
    "one channel": SD1 | {"conditioning_channels": 1, "mid_block_type": "UNetMidBlock2D"},
}


def pair(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[ControlNet, Any]:
    """Ours and theirs with the same weights, none of them zero."""
    theirs = ControlNetModel(**settings).to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = ControlNet(ControlNetConfig(**settings)).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs(config: ControlNetConfig, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict, dict]:
    """x, t, our conditioning, and diffusers' keyword arguments."""
    x, t = torch.randn(2, 4, 8, 6, dtype=dtype), torch.tensor([3, 977])
    text = torch.randn(2, 7, config.cross_attention_dim, dtype=dtype)
    picture = torch.rand(2, config.conditioning_channels, 64, 48, dtype=dtype)
    cond, other = {"text": text, "condition": picture}, {"encoder_hidden_states": text, "controlnet_cond": picture}
    if config.addition_embed_type:
        cond |= {"pooled": torch.randn(2, 10, dtype=dtype), "time_ids": torch.randint(0, 1024, (2, 6)).to(dtype)}
        other["added_cond_kwargs"] = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    return x, t, cond, other


def deviation(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("guess", [False, True])
def test_equals_diffusers(name: str, guess: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = pair(CASES[name])
    x, t, cond, other = inputs(ours.config)
    found = ours(x, t, cond, 0.7, guess=guess)
    wanted = theirs(x, t, **other, conditioning_scale=0.7, guess_mode=guess)
    down, mid = wanted.down_block_res_samples, wanted.mid_block_res_sample
    assert len(found.down) == len(down)
    assert max(deviation(a, b) for a, b in zip((*found.down, found.mid), (*down, mid), strict=True)) < 1e-5


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_gradients_and_what_the_unet_makes_of_them(name: str) -> None:
    """The frozen U-Net's answer under control, and the gradients that reach the ControlNet through it."""
    torch.manual_seed(0)
    ours, theirs = pair(CASES[name], torch.float64)
    own = ("conditioning_embedding_out_channels",)
    settings = {k: v for k, v in CASES[name].items() if k not in own}
    up = tuple(k.replace("Down", "Up") for k in reversed(settings["down_block_types"]))
    unet = UNet2DConditionModel(**settings, up_block_types=up).double().requires_grad_(False)
    our_unet = UNet(UNetConfig(**settings, up_block_types=up)).double().requires_grad_(False)
    our_unet.load_state_dict(unet.state_dict(), strict=True)
    x, t, cond, other = inputs(ours.config, torch.float64)
    out = our_unet(x, t, cond, ours(x, t, cond, 0.7))
    added = theirs(x, t, **other, conditioning_scale=0.7)
    wanted = unet(
        x, t, **{k: v for k, v in other.items() if k != "controlnet_cond"},
        down_block_additional_residuals=added.down_block_res_samples,
        mid_block_additional_residual=added.mid_block_res_sample,
    ).sample  # fmt: skip
    assert deviation(out, wanted) < 1e-12
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    grads = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        assert torch.allclose(parameter.grad, grads[key].grad, rtol=1e-8, atol=1e-10), key


PUBLISHED: dict[str, dict[str, Any]] = {
    "control_v11p_sd15_canny": {
        "act_fn": "silu", "addition_embed_type": None, "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": None, "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
        "class_embed_type": None, "conditioning_channels": 3, "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "controlnet_conditioning_channel_order": "rgb", "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "flip_sin_to_cos": True,
        "freq_shift": 0, "global_pool_conditions": False, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "num_attention_heads": None,
        "num_class_embeds": None, "only_cross_attention": False, "projection_class_embeddings_input_dim": None,
        "resnet_time_scale_shift": "default", "transformer_layers_per_block": 1, "upcast_attention": False,
        "use_linear_projection": False,
    },
    "like an early one of SD 2.1": {
        "act_fn": "silu", "attention_head_dim": [5, 10, 20, 20], "block_out_channels": [320, 640, 1280, 1280],
        "class_embed_type": None, "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "controlnet_conditioning_channel_order": "rgb", "cross_attention_dim": 1024,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "num_class_embeds": None,
        "only_cross_attention": False, "projection_class_embeddings_input_dim": None,
        "resnet_time_scale_shift": "default", "upcast_attention": False, "use_linear_projection": True,
        "sample_size": 32, "dropout": 0.0,
    },
    "controlnet-canny-sdxl-1.0": {
        "act_fn": "silu", "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
        "class_embed_type": None, "conditioning_channels": 3, "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "controlnet_conditioning_channel_order": "rgb", "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
        "encoder_hid_dim": None, "encoder_hid_dim_type": None, "flip_sin_to_cos": True, "freq_shift": 0,
        "global_pool_conditions": False, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "norm_eps": 1e-05, "norm_num_groups": 32, "num_attention_heads": None, "num_class_embeds": None,
        "only_cross_attention": False, "projection_class_embeddings_input_dim": 2816,
        "resnet_time_scale_shift": "default", "transformer_layers_per_block": [1, 2, 10], "upcast_attention": None,
        "use_linear_projection": True,
    },
}  # fmt: skip
PUBLISHED["like controlnet-canny-sdxl-1.0-mid"] = PUBLISHED["controlnet-canny-sdxl-1.0"] | {
    "transformer_layers_per_block": [0, 0, 1]
}
PUBLISHED["like controlnet-canny-sdxl-1.0-small"] = PUBLISHED["controlnet-canny-sdxl-1.0"] | {
    "down_block_types": ["DownBlock2D"] * 3,
    "transformer_layers_per_block": [0, 0, 0],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_have_their_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        theirs = ControlNetModel.from_config({"_class_name": "ControlNetModel", **PUBLISHED[name]})
        ours = ControlNet(decode(ControlNetConfig, PUBLISHED[name], "config.json"))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_a_copy_of_a_unet_is_diffusers_copy_of_it() -> None:
    torch.manual_seed(0)
    settings = {k: v for k, v in CASES["sdxl"].items() if k != "conditioning_embedding_out_channels"}
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(**settings, up_block_types=up)
    ours = UNet(UNetConfig(**settings, up_block_types=up))
    ours.load_state_dict(unet.state_dict(), strict=True)
    theirs, copy = ControlNetModel.from_unet(unet), ControlNet.copy_of(ours)
    wanted, found = theirs.state_dict(), copy.state_dict()
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        own = key.startswith("controlnet_cond_embedding.") and not key.startswith("controlnet_cond_embedding.conv_out")
        assert own or torch.equal(found[key], value), key
    x, t, cond, _ = inputs(copy.config)
    assert all(not part.any() for part in (*copy(x, t, cond).down, copy(x, t, cond).mid))
    assert torch.equal(ours(x, t, cond, copy(x, t, cond)), ours(x, t, cond))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PUBLISHED if "mid" not in n])
def test_the_published_shapes_equal_diffusers(name: str) -> None:
    """One forward pass of 8 x 8 latents with random weights of every layer."""
    theirs = ControlNetModel.from_config({"_class_name": "ControlNetModel", **PUBLISHED[name]})
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * parameter[0].numel() ** -0.5)
    with torch.device("meta"):
        ours = ControlNet(decode(ControlNetConfig, PUBLISHED[name], "config.json"))
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    text = torch.randn(1, 77, ours.config.cross_attention_dim, generator=g)
    cond = {"text": text, "condition": torch.rand(1, 3, 64, 64, generator=g)}
    other: dict[str, Any] = {"encoder_hidden_states": text, "controlnet_cond": cond["condition"]}
    if ours.config.addition_embed_type:
        sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])
        cond |= {"pooled": torch.randn(1, 1280, generator=g), "time_ids": sizes}
        other["added_cond_kwargs"] = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    x, t = torch.randn(1, 4, 8, 8, generator=g), torch.tensor([500])
    with torch.no_grad():
        found, wanted = ours(x, t, cond), theirs(x, t, **other)
    pairs = zip((*found.down, found.mid), (*wanted.down_block_res_samples, wanted.mid_block_res_sample), strict=True)
    assert max(deviation(a, b) for a, b in pairs) < 1e-5
