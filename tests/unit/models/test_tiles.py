"""Tiled decoding against whole decoding; slices; the finite check."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.models.vae.tiles import bands, decode_tiled

CONFIG = AutoencoderConfig(block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5)


def autoencoder() -> Autoencoder:
    """Random weights; of smooth latents they make smooth pictures, in which a seam would stand out."""
    torch.manual_seed(0)
    return Autoencoder(CONFIG).eval().requires_grad_(False)


def smooth(*shape: int) -> Tensor:
    coarse = torch.randn(*shape[:2], 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=shape[2:], mode="bicubic")


@pytest.mark.parametrize(("height", "width", "area"), [(10, 4, 12), (7, 7, 49), (3, 9, 4), (64, 16, 100)])
def test_bands_draw_every_row_once(height: int, width: int, area: int) -> None:
    found = list(bands(height, width, area))
    assert [i for a, b, _, _ in found for i in range(a, b)] == list(range(height))
    assert all((low, high) == (max(0, a - 1), min(height, b + 1)) for a, b, low, high in found)
    assert all((b - a) * width <= max(area, width) for a, b, _, _ in found)


@pytest.mark.parametrize("tile", [1, 5, 24, 48, 1000])
def test_bands_give_the_whole_picture(tile: int) -> None:
    """In levels of 255: the worst pixel, wherever it lies."""
    model, z = autoencoder(), smooth(2, 4, 22, 18)
    whole = model.decode(z)
    apart = float((decode_tiled(model, z, tile) - whole).abs().max() * 255 / (whole.max() - whole.min()))
    print(f"tile {tile}: worst deviation {apart:.1e} of 255 levels")
    assert apart < 0.01


def test_parts_by_themselves_would_have_seams() -> None:
    """Halves that overlap by more than the convolutions reach, each with norms of its own."""
    model, z = autoencoder(), smooth(1, 4, 32, 16)
    whole = model.decode(z)
    halves = torch.cat([model.decode(z[:, :, :26])[:, :, :64], model.decode(z[:, :, 6:])[:, :, 40:]], dim=2)
    assert (halves - whole).abs().max() * 255 / (whole.max() - whole.min()) > 3
    with pytest.raises(ValueError, match="tile must be at least 1"):
        decode_tiled(model, z, 0)


@pytest.mark.gpu
def test_bands_need_little_of_the_gpu() -> None:
    model, z = autoencoder().cuda(), smooth(1, 4, 256, 256).cuda()
    peaks = []
    for draw in (lambda: decode_tiled(model, z, 64), lambda: model.decode(z)):
        torch.cuda.reset_peak_memory_stats()
        draw()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] < 0.3 * peaks[1]


def test_slices_are_the_batch() -> None:
    codec, z = LatentCodec.of(autoencoder()), smooth(3, 4, 8, 8)
    torch.testing.assert_close(codec.draw(z, slices=True), codec.decode(z), rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.draw(z), codec.decode(z), rtol=0, atol=0)


def test_an_overflow_in_half_precision_is_drawn_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    """Activations beyond 65,504, as in SDXL's autoencoder in fp16; bf16 reaches as far as float32."""
    model = autoencoder()
    model.decoder.conv_in.weight *= 1e6
    exact = LatentCodec.of(model).decode(smooth(1, 4, 8, 8))
    half = LatentCodec.of(model.half())
    assert not torch.isfinite(half.decode(smooth(1, 4, 8, 8))).all()
    model.decoder.conv_in.weight.nan_to_num_(posinf=6e4, neginf=-6e4)
    with caplog.at_level("WARNING"):
        drawn = half.draw(smooth(1, 4, 8, 8))
    assert "not finite in torch.float16: it goes on in float32" in caplog.text
    assert torch.isfinite(drawn).all()
    assert drawn.shape == exact.shape
    assert model.decoder.conv_in.weight.dtype == torch.float32


def test_pictures_that_are_not_finite_are_named() -> None:
    z = smooth(3, 4, 8, 8)
    z[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"pictures \[1\] of this batch are not finite"):
        LatentCodec.of(autoencoder()).draw(z)
