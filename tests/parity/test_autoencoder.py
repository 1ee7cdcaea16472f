"""The autoencoder against diffusers' AutoencoderKL with the same weights: outputs, gradients, keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec

torch.set_num_threads(1)
CASES = {
    "four_levels": {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8},
    "no_attention": {
        "block_out_channels": (48, 96),
        "layers_per_block": 2,
        "norm_num_groups": 16,
        "mid_block_add_attention": False,
    },
    "bare": {
        "block_out_channels": (16, 32, 48),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 8,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


def deviation(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_diffusers(name: str, dtype: torch.dtype, bound: float) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    config = AutoencoderConfig(**CASES[name])
    ours = Autoencoder(config).to(dtype)
    levels = len(config.block_out_channels)
    theirs = AutoencoderKL(
        **CASES[name], down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels
    ).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 40, dtype=dtype)
    moments = ours.encode(images)
    expected = theirs.encode(images).latent_dist
    assert deviation(moments, torch.cat([expected.mean, expected.logvar], dim=1)) < bound
    z = torch.randn(2, config.latent_channels, 4, 5, dtype=dtype)
    decoded, wanted = ours.decode(z), theirs.decode(z).sample
    assert decoded.shape[-1] == 5 * ours.factor
    assert deviation(decoded, wanted) < bound
    (decoded.square().mean() + moments.square().mean()).backward()
    (wanted.square().mean() + torch.cat([expected.mean, expected.logvar], 1).square().mean()).backward()
    grads = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None
        wanted_grad = grads[key].grad
        assert wanted_grad is not None
        # a bias before a norm, or of the keys in a softmax, has a gradient that is zero but for rounding
        assert (parameter.grad - wanted_grad).norm() < 20 * bound * wanted_grad.norm() + bound, key


def test_parameter_count_of_the_real_shape() -> None:
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig())
    assert sum(p.numel() for p in model.parameters()) == 83_653_863


def test_codec_scales_once() -> None:
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4)).double()
    codec = LatentCodec(model, scale=0.5, shift=0.25)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    mean, logvar = model.encode(images).chunk(2, dim=1)
    z = mean + logvar.mul(0.5).exp() * noise
    assert torch.allclose(codec.encode(images, noise), (z - 0.25) * 0.5, rtol=0, atol=1e-12)
    assert torch.allclose(codec.decode((z - 0.25) * 0.5), model.decode(z), rtol=0, atol=1e-12)
    assert torch.equal(codec.encode(images), (mean - 0.25) * 0.5)
