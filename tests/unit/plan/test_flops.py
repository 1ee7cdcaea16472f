"""Operation counts: closed forms of single layers, and the published networks on the meta device."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from ldm.models.attention import attention, using
from ldm.models.presets import AUTOENCODERS, TEXTS, UNETS
from ldm.models.text import TextTower
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder
from ldm.plan.flops import count_flops

META = torch.device("meta")


def test_single_layers_have_their_closed_forms() -> None:
    assert count_flops(nn.Linear(5, 7), torch.randn(3, 4, 5)) == 2 * 3 * 4 * 5 * 7
    assert count_flops(nn.Conv2d(6, 8, 3, padding=1, groups=2), torch.randn(2, 6, 5, 4)) == 2 * 2 * 5 * 4 * 8 * 3 * 9
    assert count_flops(nn.Conv2d(6, 8, 3, stride=2, padding=1), torch.randn(1, 6, 8, 8)) == 2 * 4 * 4 * 8 * 6 * 9
    assert count_flops(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), torch.randn(1, 4, 3, 3)) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_attention_is_counted_whatever_its_kernel(device: str, backend: str) -> None:
    q, k = torch.empty(2, 9, 3, 8, device=device), torch.empty(2, 7, 3, 8, device=device)
    with using(device, backend):
        assert count_flops(attention, q, k, k) == 2 * 2 * 2 * 3 * 9 * 7 * 8
    layer = nn.MultiheadAttention(24, 3, batch_first=True, device=device).eval().requires_grad_(False)
    x = torch.empty(2, 9, 24, device=device)
    assert count_flops(layer, x, x, x) == 2 * 2 * 9 * 4 * 24 * 24 + 2 * 2 * 2 * 9 * 9 * 24
    assert torch.backends.mha.get_fastpath_enabled()


@cache
def unet(name: str) -> UNet:
    with META:
        return UNet(UNETS[name]).eval()


def unet_gflop(name: str, side: int) -> float:
    net = unet(name)
    config = net.config
    with META:
        text = torch.empty(1, 77, config.per_level("cross_attention_dim")[0])
        cond: dict[str, Tensor] = {"text": text}
        if config.addition_embed_type:
            cond |= {"pooled": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        return count_flops(net, torch.empty(1, 4, side, side), torch.zeros(1), cond) / 1e9


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("sd15", 32, 180), ("sd15", 64, 803), ("sd15", 96, 2148), ("sd21", 32, 181), ("sd21", 64, 804),
        ("sdxl", 32, 428), ("sdxl", 64, 1589), ("sdxl", 128, 6761),
    ],
)  # fmt: skip
def test_the_published_unets(name: str, side: int, expected: int) -> None:
    assert round(unet_gflop(name, side)) == expected


@pytest.mark.parametrize(("side", "encoder", "decoder"), [(256, 273, 622), (512, 1117, 2515), (1024, 4879, 10470)])
def test_the_published_autoencoder(side: int, encoder: int, decoder: int) -> None:
    with META:
        model = Autoencoder(AUTOENCODERS["kl_f8"]).eval()
        images, z = torch.empty(1, 3, side, side), torch.empty(1, 4, side // 8, side // 8)
    assert round(count_flops(model.encode, images) / 1e9) == encoder
    assert round(count_flops(model.decode, z) / 1e9) == decoder


@pytest.mark.parametrize(("name", "index", "expected"), [("sd15", 0, 13.3), ("sd21", 0, 47.1), ("sdxl", 1, 97.9)])
def test_the_published_text_towers(name: str, index: int, expected: float) -> None:
    with META:
        tower = TextTower(TEXTS[name][index])
    assert round(count_flops(tower.encode, torch.zeros(1, 77, dtype=torch.int64, device=META)) / 1e9, 1) == expected
