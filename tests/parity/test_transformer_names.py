"""Transformers in their authors' names: diffusers' converters make of our files what we had, tensor for tensor.

Every row of every tensor has a value of its own, so that rows that are split, joined or swapped wrongly are seen.
Tensors keep their rows and lose their columns, which no conversion touches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import maps, weights
from ldm.checkpoint.families import flux, pixart, sd3
from ldm.checkpoint.opened import shapes_of
from ldm.checkpoint.pairs import from_authors, to_authors
from ldm.models.transformers import presets

torch.set_num_threads(1)
CASES: dict[str, tuple[ModuleType, Any]] = {
    "sd3": (sd3, presets.SD3_MEDIUM),
    "sd35_medium": (sd3, presets.SD35_MEDIUM),
    "sd35_large": (sd3, presets.SD35_LARGE),
    "flux_dev": (flux, presets.FLUX_DEV),
    "flux_schnell": (flux, presets.FLUX_SCHNELL),
    "pixart_sigma": (pixart, presets.PIXART_SIGMA),
    "pixart_alpha": (
        pixart,
        replace(presets.PIXART_SIGMA, interpolation_scale=None, use_additional_conditions=True),
    ),
}


def rows(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A tensor of each name with the rows of its shape, no two rows alike."""
    out, start = {}, 0
    for key, shape in shapes.items():
        count = 1 if key == "pos_embed.pos_embed" else shape[0]
        out[key] = torch.arange(start, start + count, dtype=torch.int32)
        start += count
    return out


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_has_one_name_and_comes_back(name: str) -> None:
    module, config = CASES[name]
    state, pairs = rows(shapes_of(config)), module.pairs(config)
    file = maps.carry_out(to_authors(pairs), state, "network")
    back = maps.carry_out(from_authors(pairs), file, "file")
    assert set(back) == set(state)
    assert all(torch.equal(back[k], v) for k, v in state.items())
    assert sum(v.numel() for v in file.values()) == sum(v.numel() for v in state.values())


@pytest.mark.parametrize("name", ["sd3", "sd35_medium", "sd35_large", "flux_dev", "flux_schnell"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_diffusers_reads_what_we_write(name: str, prefix: str) -> None:
    from diffusers.loaders import single_file_utils as theirs

    module, config = CASES[name]
    state = rows(shapes_of(config))
    width = {"context_embedder.weight": config.width}  # where their converter looks for it
    assert len(state["context_embedder.weight"]) == width["context_embedder.weight"]
    file = {prefix + k: v for k, v in maps.carry_out(to_authors(module.pairs(config)), state, "network").items()}
    convert = (
        theirs.convert_sd3_transformer_checkpoint_to_diffusers
        if name.startswith("sd3")
        else theirs.convert_flux_transformer_checkpoint_to_diffusers
    )
    found = convert(file)
    assert set(found) == set(state)
    wrong = [k for k, v in state.items() if not torch.equal(found[k], v)]
    assert wrong == []


@pytest.mark.parametrize("name", CASES)
def test_shapes_tell_the_settings(name: str) -> None:
    """On the meta device, at the published sizes."""
    module, config = CASES[name]
    shapes = shapes_of(config)
    source = weights.of_state({k: torch.empty(v, device="meta") for k, v in shapes.items()})
    file = maps.follow(to_authors(module.pairs(config)), source, "network")
    if module is pixart:
        file[pixart.TABLE] = weights.Entry(torch.Size([1, 4096, 1152]), torch.float32, lambda: torch.zeros(0))
        found = pixart.settings(file, "file")
        assert found.interpolation == config.interpolation
        found = replace(found, interpolation_scale=config.interpolation_scale)
        assert found == replace(config, use_additional_conditions=config.micro)
    else:
        assert module.settings(file, "file") == config


def test_pixart_names_as_its_authors_file_has_them() -> None:
    """By hand, from diffusers' scripts/convert_pixart_sigma_to_diffusers.py."""
    config = replace(presets.PIXART_TINY, num_layers=1)
    state = {k: torch.randn(v) for k, v in shapes_of(config).items()}
    file = maps.carry_out(to_authors(pixart.pairs(config)), state, "network")
    block = "transformer_blocks.0."
    for kind in ("weight", "bias"):
        qkv = torch.cat([state[f"{block}attn1.to_{x}.{kind}"] for x in "qkv"])
        assert torch.equal(file.pop(f"blocks.0.attn.qkv.{kind}"), qkv)
        kv = torch.cat([state[f"{block}attn2.to_{x}.{kind}"] for x in "kv"])
        assert torch.equal(file.pop(f"blocks.0.cross_attn.kv_linear.{kind}"), kv)
        for own, other in {
            "pos_embed.proj": "x_embedder.proj",
            "caption_projection.linear_1": "y_embedder.y_proj.fc1",
            "caption_projection.linear_2": "y_embedder.y_proj.fc2",
            "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "adaln_single.linear": "t_block.1",
            f"{block}attn1.to_out.0": "blocks.0.attn.proj",
            f"{block}ff.net.0.proj": "blocks.0.mlp.fc1",
            f"{block}ff.net.2": "blocks.0.mlp.fc2",
            f"{block}attn2.to_q": "blocks.0.cross_attn.q_linear",
            f"{block}attn2.to_out.0": "blocks.0.cross_attn.proj",
            "proj_out": "final_layer.linear",
        }.items():
            assert torch.equal(file.pop(f"{other}.{kind}"), state[f"{own}.{kind}"])
    assert torch.equal(file.pop("blocks.0.scale_shift_table"), state[f"{block}scale_shift_table"])
    assert torch.equal(file.pop("final_layer.scale_shift_table"), state["scale_shift_table"])
    assert not file
