"""The U-Net against diffusers' UNet2DConditionModel with the same weights: outputs, gradients, parameter counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.models import presets
from ldm.models.unet import UNet, UNetConfig

torch.set_num_threads(1)
TWO = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "layers_per_block": 1,
}
CASES: dict[str, dict[str, Any]] = {
    "sd1": TWO | {"layers_per_block": 2},
    "sd2": TWO | {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "sdxl": {
        "block_out_channels": (16, 32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": (2, 4, 8),
        "cross_attention_dim": 12,
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 46,
    },
    "inpainting": TWO | {"in_channels": 9},
    "labels": TWO | {"num_class_embeds": 5},
    "vector": TWO | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
    "simple": TWO | {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 10},
    "timestep": TWO | {"class_embed_type": "timestep"},
    "identity": TWO | {"class_embed_type": "identity"},
    "guidance": TWO | {"time_cond_proj_dim": 8},
    "scale_shift": TWO | {"resnet_time_scale_shift": "scale_shift", "mid_block_type": "UNetMidBlock2D"},
    "conventions": TWO | {"flip_sin_to_cos": False, "freq_shift": 1, "time_embedding_dim": 24, "out_channels": 8},
}


def deviation(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def inputs(
    name: str, config: UNetConfig, dtype: torch.dtype, size: tuple[int, int]
) -> tuple[Tensor, Tensor, dict, dict]:
    """x, t, our conditioning, and the same as diffusers' keyword arguments."""
    batch = 2
    x = torch.randn(batch, config.in_channels, *size, dtype=dtype)
    t = torch.tensor([3, 977])
    text = torch.randn(batch, 7, config.per_level("cross_attention_dim")[0], dtype=dtype)
    cond: dict[str, Tensor] = {"text": text}
    other: dict[str, Any] = {"encoder_hidden_states": text}
    if name == "sdxl":
        cond["pooled"] = torch.randn(batch, 10, dtype=dtype)
        cond["time_ids"] = torch.randint(0, 1024, (batch, 6)).to(dtype)
        other["added_cond_kwargs"] = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    if name == "guidance":
        from diffusers import LatentConsistencyModelPipeline

        cond["guidance"] = torch.tensor([2.0, 7.5])
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        other["timestep_cond"] = embed(None, cond["guidance"], embedding_dim=8).to(dtype)
    labels = {
        "labels": torch.tensor([0, 4]),
        "vector": torch.randn(batch, 10, dtype=dtype),
        "simple": torch.randn(batch, 10, dtype=dtype),
        "timestep": torch.tensor([1, 700]),
        "identity": torch.randn(batch, 64, dtype=dtype),
    }
    if name in labels:
        cond["class"] = other["class_labels"] = labels[name]
    return x, t, cond, other


def pair(settings: dict[str, Any], dtype: torch.dtype) -> tuple[UNet, Any]:
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel(**settings).to(dtype)
    ours = UNet(UNetConfig(**settings)).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_diffusers(name: str, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    ours, theirs = pair(CASES[name], dtype)
    x, t, cond, other = inputs(name, ours.config, dtype, (8, 8) if dtype == torch.float32 else (6, 10))
    out, wanted = ours(x, t, cond), theirs(x, t, **other).sample
    assert deviation(out, wanted) < bound
    if dtype == torch.float64 or name == "sd1":
        weight = torch.randn_like(out)
        (out * weight).sum().backward()
        (wanted * weight).sum().backward()
        grads = dict(theirs.named_parameters())
        total = torch.stack([p.grad.norm() for p in theirs.parameters() if p.grad is not None]).norm()
        for key, parameter in ours.named_parameters():
            assert parameter.grad is not None, key
            assert (parameter.grad - grads[key].grad).norm() < bound * (grads[key].grad.norm() + total), key


def test_odd_sides_and_concat() -> None:
    torch.manual_seed(0)
    ours, theirs = pair(CASES["inpainting"], torch.float64)
    x, t, cond, other = inputs("inpainting", ours.config, torch.float64, (7, 9))
    wanted = theirs(x, t, **other).sample
    assert deviation(ours(x[:, :4], t, cond | {"concat": x[:, 4:]}), wanted) < 1e-12
    with pytest.raises(ValueError, match="9 channels, got 4"):
        ours(x[:, :4], t, cond)


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    ours, _ = pair(CASES["sdxl"], torch.float64)
    x, t, cond, _ = inputs("sdxl", ours.config, torch.float64, (8, 8))
    grads = []
    for on in (False, True):
        ours.zero_grad()
        ours.enable_gradient_checkpointing(on)
        ours(x, t, cond).square().sum().backward()
        grads.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_channels_last_changes_nothing() -> None:
    torch.manual_seed(0)
    ours, _ = pair(CASES["sd1"], torch.float64)
    x, t, cond, _ = inputs("sd1", ours.config, torch.float64, (8, 8))
    assert deviation(ours(x.contiguous(memory_format=torch.channels_last), t, cond), ours(x, t, cond)) < 1e-12


@pytest.mark.parametrize(
    ("name", "count"),
    [("sd15", 859_520_964), ("lcm_sd15", 859_602_884), ("sd21", 865_910_724), ("sdxl", 2_567_463_684)],
)
def test_parameter_counts_of_the_real_shapes(name: str, count: int) -> None:
    with torch.device("meta"):
        model = UNet(presets.UNETS[name])
    assert sum(p.numel() for p in model.parameters()) == count
