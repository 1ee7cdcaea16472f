"""Products by oneDNN are those of PyTorch, in value and gradient, and are taken where nothing has to see them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm.models import onednn
from ldm.models.layers import Conv3x3, unchanging
from ldm.models.transformers.blocks import FeedForward
from ldm.models.wide import Linear

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """As on a processor where oneDNN wins; the shapes of what it was given."""
    asked: list[tuple[int, ...]] = []
    own = onednn.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        asked.append(tuple(x.shape))
        return own(x, weight, bias)

    monkeypatch.setattr(onednn, "wins", lambda: True)
    monkeypatch.setattr(onednn, "LEAST", 0)
    monkeypatch.setattr(onednn, "linear", linear)
    return asked


def cases() -> dict[str, Tensor]:
    torch.manual_seed(1)
    picture = torch.randn(2, 20, 5, 7)
    return {
        "matrix": torch.randn(6, 20),
        "tokens": torch.randn(2, 7, 20),
        "pixels": picture.flatten(2).transpose(1, 2),
        "channels last": picture.to(memory_format=torch.channels_last).flatten(2).transpose(1, 2),
        "every other": torch.randn(2, 14, 20)[:, ::2],
        "one": torch.randn(20),
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", list(cases()))
def test_values_and_gradients_are_those_of_float64(counted: list[tuple[int, ...]], name: str, bias: bool) -> None:
    x, layer = cases()[name], Linear(20, 30, bias=bias)
    exact, wide = Linear(20, 30, bias=bias).double(), x.double().requires_grad_()
    exact.load_state_dict(layer.state_dict())
    given = x.clone().requires_grad_()
    out, expected = layer(given), exact(wide)
    assert counted
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    pairs = [(given, wide), *zip(layer.parameters(), exact.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients() -> None:
    torch.manual_seed(2)
    layer, x = Linear(5, 4), torch.randn(3, 5, requires_grad=True)
    exact = Linear(5, 4).double()
    exact.load_state_dict(layer.state_dict())
    found = []
    for own, given in ((layer, x), (exact, x.detach().double().requires_grad_())):
        (slope,) = torch.autograd.grad(own(given).pow(3).sum(), [given], create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [own.weight])[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-4, atol=1e-5)


def test_others_are_left_to_pytorch(counted: list[tuple[int, ...]]) -> None:
    layer, x = Linear(8, 8), torch.randn(3, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    counted.clear()  # where bfloat16 is emulated its products are float32's
    layer(torch.randn(0, 8))
    layer.double()(x.double())
    layer.float()
    torch.func.jvp(lambda v: F.linear(v, layer.weight) + layer(v), (x,), (x,))
    torch.func.vmap(layer)(x)
    assert not counted
    layer(x)
    assert counted == [(3, 8)]


def test_a_counter_changes_nothing_and_counts(counted: list[tuple[int, ...]]) -> None:
    """The first step of a run is counted: it must be the step that it would be after a checkpoint, bit by bit."""
    torch.manual_seed(6)
    layer, x = Linear(96, 40), torch.randn(7, 5, 96, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    asked = len(counted)
    with FlopCounterMode(display=False, custom_mapping=onednn.formulas()) as counter:
        out = layer(x)
        assert counter.get_total_flops() == 2 * 35 * 96 * 40
        out.square().sum().backward()
    again = x.grad, layer.weight.grad
    assert len(counted) == 2 * asked
    assert all(b is not None and torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert counter.get_total_flops() == 3 * 2 * 35 * 96 * 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feed_forward_in_one_pass(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    layers, x = FeedForward(32).to(dtype), torch.randn(2, 9, 32).to(dtype)
    asked = []
    own = onednn.linear_gelu
    monkeypatch.setattr(onednn, "linear_gelu", lambda *args: asked.append(own(*args)) or asked[-1])
    with torch.no_grad():
        out = layers(x)
        wide = layers.double()
        exact = wide.net[2](F.gelu(wide.net[0].proj(x.double()), approximate="tanh"))
    assert len(asked) == 1
    assert (asked[0] is not None) == (dtype == torch.float32 or onednn._has_bfloat16())
    limit = 1e-6 if dtype == torch.float32 else 0.01
    assert (out.double() - exact).norm() < limit * exact.norm()


def test_hooks_see_the_layer(counted: list[tuple[int, ...]]) -> None:
    layers, seen = FeedForward(8), []
    layers.net[0].proj.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    with torch.no_grad():
        layers(torch.randn(1, 3, 8))
    assert seen == [(1, 3, 32)]


def test_products_of_matrices(counted: list[tuple[int, ...]]) -> None:
    torch.manual_seed(4)
    a, b = torch.randn(3, 6, 20), torch.randn(3, 20, 7)
    torch.testing.assert_close(onednn.product(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(onednn.product(a[0].T, b[0, :6]), (a[0].T.double() @ b[0, :6].double()).float())
    assert len(counted) == 4
    onednn.product(a[0].requires_grad_(), b[0]).sum().backward()
    assert len(counted) == 4


def test_convolutions_of_few_pixels_and_by_winograd(counted: list[tuple[int, ...]]) -> None:
    torch.manual_seed(5)
    layer = Conv3x3.of(512, 448)
    for side, products in ((2, 1), (16, 16)):
        x = torch.randn(2, 512, side, side)
        exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)  # type: ignore[union-attr]
        with torch.no_grad(), unchanging(layer, 20):
            out = layer(x)
        assert len(counted) == products
        counted.clear()
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_one_of_the_weights_trains_alone(counted: list[tuple[int, ...]], trained: str) -> None:
    layer, x = Linear(20, 30).requires_grad_(False), torch.randn(6, 20)
    one = layer.get_parameter(trained).requires_grad_()
    (found,) = torch.autograd.grad(layer(x).square().sum(), [one])
    assert counted
    (wanted,) = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), [one])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_small_products_stay_with_torch(counted: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2^23 multiplications on, of one of the products where there are several."""
    monkeypatch.undo()
    monkeypatch.setattr(onednn, "wins", lambda: True)
    for x, weight, taken in (
        ((128, 256), (256, 256), True),
        ((127, 256), (256, 256), False),
        ((2, 64, 256), (256, 256), True),
        ((4, 128, 256), (4, 256, 256), True),
        ((4, 127, 256), (4, 256, 256), False),
    ):
        assert onednn.takes(torch.zeros(x), torch.zeros(weight)) is taken, (x, weight)
