"""SD3, FLUX.1 and PixArt against diffusers with the same weights: outputs, gradients, skipped blocks, in float64.

diffusers computes a few things in float32 whatever the weights' type: its RMS norm's statistics (SD3.5) and rotary
positions (FLUX). There it is given float64 replacements, written here; sinusoids and tables of positions are float32 in
both. The real widths in float32, and names and counts, are in `test_transformers_published.py`.
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
from ldm.models.transformers.pixart import PixArtConfig, PixArtTransformer
from ldm.models.transformers.sd3 import SD3Config, SD3Transformer

torch.set_num_threads(1)
SD3: dict[str, SD3Config] = {
    "sd3": replace(presets.SD3_TINY, qk_norm=None, dual_attention_layers=()),
    "sd35_medium": presets.SD3_TINY,
    "sd35_large": replace(presets.SD3_TINY, dual_attention_layers=(), out_channels=None, patch_size=1),
}


def deviation(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def randomized(theirs: Any, dtype: torch.dtype = torch.float64) -> Any:
    """No weight left at its starting value: zeros and ones would hide what they multiply."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
            )
    return theirs.to(dtype).eval()


def exact_rms(self: Any, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def sd3_pair(config: SD3Config) -> tuple[SD3Transformer, Any]:
    from diffusers import SD3Transformer2DModel

    theirs = randomized(SD3Transformer2DModel(**diffusers_keys(config)))
    ours = SD3Transformer(config).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def sd3_inputs(config: SD3Config, size: tuple[int, int]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = torch.randn(2, config.in_channels, *size, dtype=torch.float64)
    text = torch.randn(2, 7, config.joint_attention_dim, dtype=torch.float64)
    pooled = torch.randn(2, config.pooled_projection_dim, dtype=torch.float64)
    return x, torch.tensor([3.25, 977.0]), {"text": text, "pooled": pooled}


def same_gradients(ours: nn.Module, theirs: nn.Module, out: Tensor, wanted: Tensor, bound: float = 1e-12) -> None:
    """Of a random projection of the output, in every parameter; relative to it and to the whole gradient."""
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    grads = dict(theirs.named_parameters())
    total = torch.stack([p.grad.norm() for p in theirs.parameters() if p.grad is not None]).norm()
    for key, parameter in ours.named_parameters():
        expected = grads[key].grad
        assert expected is not None, key
        found = torch.zeros_like(expected) if parameter.grad is None else parameter.grad
        assert (found - expected).norm() < bound * (expected.norm() + total), key


@pytest.mark.parametrize("name", SD3)
@pytest.mark.parametrize("size", [(8, 8), (12, 6)])
def test_sd3(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.models.normalization.RMSNorm.forward", exact_rms)
    torch.manual_seed(0)
    ours, theirs = sd3_pair(SD3[name])
    x, t, cond = sd3_inputs(ours.config, size)
    wanted = theirs(x, cond["text"], cond["pooled"], t).sample
    out = ours(x, t, cond)
    assert deviation(out, wanted) < 1e-12
    same_gradients(ours, theirs, out, wanted)


@pytest.mark.parametrize("skipped", [(1,), (0, 2)])
def test_sd3_skips_layers(skipped: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.models.normalization.RMSNorm.forward", exact_rms)
    torch.manual_seed(0)
    ours, theirs = sd3_pair(presets.SD3_TINY)
    x, t, cond = sd3_inputs(ours.config, (8, 6))
    wanted = theirs(x, cond["text"], cond["pooled"], t, skip_layers=list(skipped)).sample
    with torch.no_grad():
        assert deviation(ours.without(skipped)(x, t, cond), wanted) < 1e-12
        assert deviation(ours(x, t, cond), wanted) > 0.01


def exact_turns(dim: int, pos: Tensor, theta: float, **_: Any) -> tuple[Tensor, Tensor]:
    angle = torch.outer(pos.double(), theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    return angle.cos(), angle.sin()


def exact_rotation(x: Tensor, turns: tuple[Tensor, Tensor], sequence_dim: int) -> Tensor:
    """Pairs of channels as complex numbers."""
    assert sequence_dim == 1
    turn = torch.complex(*turns)[None, :, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (12, 6)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_flux(
    guided: bool, size: tuple[int, int], dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing and ids are those of diffusers' pipeline; t / 1000 * 1000 is exact. In float32 diffusers is as it is."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    if dtype == torch.float64:
        flux = "diffusers.models.transformers.transformer_flux"
        monkeypatch.setattr(f"{flux}.get_1d_rotary_pos_embed", exact_turns)
        monkeypatch.setattr(f"{flux}.apply_rotary_emb", exact_rotation)
    torch.manual_seed(0)
    config = replace(presets.FLUX_TINY, guidance_embeds=guided, in_channels=24, out_channels=16)
    theirs = randomized(FluxTransformer2DModel(**diffusers_keys(config)), dtype)
    ours = FluxTransformer(config).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, extra = torch.randn(2, 4, *size, dtype=dtype), torch.randn(2, 2, *size, dtype=dtype)
    t = torch.tensor([250.0, 875.0])
    cond = {"text": torch.randn(2, 5, 20, dtype=dtype), "pooled": torch.randn(2, 12, dtype=dtype)}
    guidance = torch.tensor([3.5, 1.0]) if guided else None
    tokens = FluxPipeline._pack_latents(torch.cat([x, extra], dim=1), 2, 6, *size)
    ids = FluxPipeline._prepare_latent_image_ids(2, size[0] // 2, size[1] // 2, torch.device("cpu"), dtype)
    wanted = theirs(
        tokens, cond["text"], cond["pooled"], t / 1000, ids, torch.zeros(5, 3, dtype=dtype), guidance
    ).sample
    wanted = FluxPipeline._unpack_latents(wanted, 8 * size[0], 8 * size[1], 8)
    out = ours(x, t, cond | {"concat": extra} | ({} if guidance is None else {"guidance": guidance}))
    assert ours.latent_channels == 4
    assert deviation(out, wanted) < bound
    same_gradients(ours, theirs, out, wanted, bound)


PIXART: dict[str, PixArtConfig] = {
    "sigma": presets.PIXART_TINY,
    "alpha": replace(presets.PIXART_TINY, use_additional_conditions=True, interpolation_scale=None),
    "plain": replace(
        presets.PIXART_TINY, caption_channels=None, out_channels=None, attention_bias=False, norm_eps=1e-5
    ),
    "stretched": replace(presets.PIXART_TINY, interpolation_scale=2, patch_size=1),
}


@pytest.mark.parametrize("name", PIXART)
@pytest.mark.parametrize("size", [(8, 8), (12, 6)])
def test_pixart(name: str, size: tuple[int, int]) -> None:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    config = PIXART[name]
    theirs = randomized(PixArtTransformer2DModel(**diffusers_keys(config)))
    ours = PixArtTransformer(config).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, t = torch.randn(2, 4, *size, dtype=torch.float64), torch.tensor([3, 977])
    text = torch.randn(2, 5, config.caption_channels or config.cross_attention_dim, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    cond, more = {"text": text, "mask": mask}, None
    if config.micro:
        more = {"resolution": torch.tensor([[512.0, 768], [64, 32]]), "aspect_ratio": torch.tensor([[0.6667], [2.0]])}
        cond |= more
    wanted = theirs(x, text, t, added_cond_kwargs=more, encoder_attention_mask=mask.double()).sample
    out = ours(x, t, cond)
    assert deviation(out, wanted) < 1e-12
    same_gradients(ours, theirs, out, wanted)
    assert deviation(ours(x, t, cond | {"mask": mask & False}), ours(x, t, cond | {"mask": mask | True})) == 0
