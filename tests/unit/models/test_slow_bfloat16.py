"""Products of bfloat16 in float32 on CPUs whose own are slower: no further from the exact ones than a rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import wide
from ldm.models.layers import Conv3x3
from ldm.models.wide import Linear


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "slow_bfloat16", lambda: True)


def rounded_once(found: Tensor, exact: Tensor) -> None:
    """Within half a unit in the last place of the sums of float64, up to the rounding of float32's sums."""
    assert found.dtype == torch.bfloat16
    half = 2.0**-8 * exact.abs() * 1.001 + 1e-5 * exact.abs().max()
    assert ((found.double() - exact).abs() <= half).all()


@torch.no_grad()
def test_a_convolution_is_rounded_once() -> None:
    torch.manual_seed(0)
    layer = Conv3x3.of(48, 24).bfloat16()
    x = torch.randn(2, 48, 9, 7).bfloat16()
    assert layer.bias is not None
    rounded_once(layer(x), F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1))
    layer.weight.mul_(2)
    rounded_once(layer(x), F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1))


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_linear_layer_is_rounded_once(bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(64, 40, bias=bias).bfloat16()
    x = torch.randn(2, 80, 64).bfloat16()
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    rounded_once(layer(x), exact)


def test_training_and_other_types_are_left_alone() -> None:
    torch.manual_seed(0)
    layer, x = Conv3x3.of(16, 16).bfloat16(), torch.randn(2, 16, 8, 8).bfloat16()
    assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))
    assert not wide.widens(x)
    with torch.no_grad():
        assert wide.widens(x)
        assert not wide.widens(x.half())
        with torch.autocast("cpu", torch.bfloat16):
            assert not wide.widens(x)
