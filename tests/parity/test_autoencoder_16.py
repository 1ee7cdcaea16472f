"""The autoencoders of SD3 and FLUX.1 (16 channels, a shift, no quant convolutions) against diffusers' AutoencoderKL.

`PUBLISHED` are their settings as published; the same weights give the same moments, pictures, latents and gradients,
and files in the authors' names are what diffusers' converter makes of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import maps
from ldm.config.load import decode
from ldm.models.presets import AUTOENCODERS
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec

torch.set_num_threads(1)
_BOTH: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "kl_f8_sd3": _BOTH | {"_diffusers_version": "0.29.0.dev0", "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "kl_f8_flux": _BOTH
    | {"_diffusers_version": "0.30.0.dev0", "_name_or_path": "../checkpoints/flux-dev", "mid_block_add_attention": True,
       "scaling_factor": 0.3611, "shift_factor": 0.1159},
}  # fmt: skip
SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}


def deviation(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def small(name: str) -> dict[str, Any]:
    """The published settings at two levels of few channels."""
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return {k: v for k, v in (PUBLISHED[name] | SMALL | types).items() if not k.startswith("_")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings_are_the_preset_s(name: str) -> None:
    from diffusers import AutoencoderKL

    own = {k: v for k, v in PUBLISHED[name].items() if not k.startswith("_")}
    assert decode(AutoencoderConfig, own, name) == AUTOENCODERS[name]
    with torch.device("meta"):
        ours = Autoencoder(AUTOENCODERS[name])
        theirs: Any = AutoencoderKL.from_config(PUBLISHED[name])
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == 83_819_683


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_diffusers(name: str, dtype: torch.dtype, bound: float) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    theirs: Any = AutoencoderKL(**small(name))
    theirs = theirs.to(dtype)
    ours = Autoencoder(decode(AutoencoderConfig, small(name), name)).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    codec = LatentCodec.of(ours)
    images = torch.randn(2, 3, 16, 24, dtype=dtype)
    moments, expected = ours.encode(images), theirs.encode(images).latent_dist
    wanted = torch.cat([expected.mean, expected.logvar], dim=1)
    assert deviation(moments, wanted) < bound
    scale, shift = theirs.config["scaling_factor"], theirs.config["shift_factor"]
    latents = (expected.mean - shift) * scale  # as StableDiffusion3Img2ImgPipeline and FluxImg2ImgPipeline have it
    assert deviation(codec.sample(moments), latents) < bound
    noise = torch.randn(2, 16, 8, 12, dtype=dtype)
    drawn = (expected.mean + expected.std * noise - shift) * scale
    assert deviation(codec.sample(moments, noise), drawn) < bound
    decoded, pictures = codec.decode(noise), theirs.decode(noise / scale + shift).sample
    assert deviation(decoded, pictures) < bound
    (decoded.square().mean() + moments.square().mean()).backward()
    (pictures.square().mean() + wanted.square().mean()).backward()
    grads = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        own, other = parameter.grad, grads[key].grad
        assert own is not None
        assert other is not None
        assert (own - other).norm() < 20 * bound * other.norm() + bound, key


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_the_authors_names_are_those_diffusers_reads(prefix: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    ours = Autoencoder(decode(AutoencoderConfig, small("kl_f8_flux"), "vae"))
    plan = maps.renaming(maps.vae_to_compvis(ours.state_dict(), 2))
    file = maps.carry_out(plan, ours.state_dict(), "vae")
    assert file["decoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert file["encoder.conv_out.weight"].shape[0] == 32
    theirs = convert_ldm_vae_checkpoint({prefix + k: v for k, v in file.items()}, small("kl_f8_flux"))
    back = maps.carry_out(maps.renaming(maps.vae_to_compvis(ours.state_dict(), 2), back=True), file, "vae")
    assert set(theirs) == set(back) == set(ours.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(back[key], value)
        assert torch.equal(theirs[key].reshape(value.shape), value)
