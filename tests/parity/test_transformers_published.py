"""The published transformers: names, shapes and counts on the meta device; their widths with few layers in float32.

The table of positions has 96 x 96 places there where it would only take memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.models.networks import diffusers_keys
from ldm.models.transformers import presets
from ldm.models.transformers.flux import FluxTransformer
from ldm.models.transformers.pixart import PixArtTransformer
from ldm.models.transformers.sd3 import SD3Transformer

torch.set_num_threads(1)
COUNTS = {
    "SD3_MEDIUM": 2_028_328_000,
    "SD35_MEDIUM": 2_243_171_520,
    "SD35_LARGE": 8_056_627_520,
    "FLUX_DEV": 11_901_408_320,
    "FLUX_SCHNELL": 11_891_178_560,
    "PIXART_SIGMA": 610_856_096,
}
BUFFERS = {"SD3_MEDIUM": 2_084_951_104, "SD35_MEDIUM": 2_469_663_936, "SD35_LARGE": 8_146_280_768}
KINDS: dict[str, tuple[type[Any], str]] = {
    "SD": (SD3Transformer, "SD3Transformer2DModel"),
    "FL": (FluxTransformer, "FluxTransformer2DModel"),
    "PI": (PixArtTransformer, "PixArtTransformer2DModel"),
}
BOUND, GRADIENT = 1e-5, 1e-4


def deviation(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def both(name: str, config: Any, device: str) -> tuple[Any, Any]:
    import diffusers

    kind, other = KINDS[name[:2]]
    with torch.device(device):
        theirs = getattr(diffusers, other)(**diffusers_keys(config))
    with torch.device("meta"):
        ours = kind(config)
    return ours, theirs


@pytest.mark.parametrize("name", COUNTS)
def test_names_shapes_and_counts(name: str) -> None:
    ours, theirs = both(name, getattr(presets, name), "meta")
    shapes = [{key: tuple(value.shape) for key, value in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert [key for key, _ in ours.named_parameters() if key not in dict(theirs.named_parameters())] == []
    assert sum(p.numel() for p in ours.parameters()) == COUNTS[name]
    if name in BUFFERS:
        assert sum(p.numel() for p in ours.state_dict().values()) == BUFFERS[name]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3_medium": ("SD3_MEDIUM", {"num_layers": 2, "pos_embed_max_size": 96}),
    "sd35_medium": ("SD35_MEDIUM", {"num_layers": 2, "dual_attention_layers": (0,), "pos_embed_max_size": 96}),
    "pixart_sigma": ("PIXART_SIGMA", {"num_layers": 3}),
    "sd35_large": ("SD35_LARGE", {"num_layers": 2}),
    "flux_dev": ("FLUX_DEV", {"num_layers": 1, "num_single_layers": 1}),
}
HEAVY = ("sd35_large", "flux_dev")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in HEAVY else ()) for c in CASES])
def test_real_widths(case: str) -> None:
    """One tensor for both networks' weights; gradients of a part of the parameters, where both have the same graph."""
    torch.manual_seed(0)
    name, fewer = CASES[case]
    config = replace(getattr(presets, name), **fewer)
    ours, theirs = both(name, config, "cpu")
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    text = torch.randn(1, 20, 4096)
    t = torch.tensor([421.0])
    x = torch.randn(1, ours.latent_channels, 16, 24)
    cond, call = {"text": text}, {}
    if name.startswith("PI"):
        cond["mask"] = torch.arange(20)[None] < 13
        call = {"encoder_attention_mask": cond["mask"].float()}
    else:
        cond["pooled"] = call["pooled_projections"] = torch.randn(1, config.pooled_projection_dim)
    if name.startswith("FL"):
        cond["guidance"] = call["guidance"] = torch.tensor([3.5])
        t = t / 1000 * 1000
    wanted = their_output(theirs, x, text, t, call)
    out = ours(x, t, cond)
    assert deviation(out, wanted) < BOUND
    some = [key for key, _ in ours.named_parameters() if "blocks.0.attn.to_q" in key or "blocks.0.attn1.to_q" in key]
    some += ["context_embedder.bias" if "pooled" in cond else "adaln_single.linear.bias"]
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((y * weight).sum(), chosen(n, some)) for n, y in ((ours, out), (theirs, wanted))]
    for key, found, expected in zip(some, *grads, strict=True):
        assert deviation(found, expected) < GRADIENT, key


def chosen(net: nn.Module, names: list[str]) -> list[nn.Parameter]:
    return [net.get_parameter(name) for name in names]


def their_output(theirs: Any, x: Tensor, text: Tensor, t: Tensor, call: dict[str, Any]) -> Tensor:
    if type(theirs).__name__ != "FluxTransformer2DModel":
        return theirs(x, encoder_hidden_states=text, timestep=t, **call).sample
    from diffusers import FluxPipeline

    b, c, h, w = x.shape
    tokens = FluxPipeline._pack_latents(x, b, c, h, w)
    ids = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, x.device, x.dtype)
    more = {"img_ids": ids, "txt_ids": torch.zeros(text.shape[1], 3), **call}
    out = theirs(tokens, encoder_hidden_states=text, timestep=t / 1000, **more).sample
    return FluxPipeline._unpack_latents(out, 8 * h, 8 * w, 8)
