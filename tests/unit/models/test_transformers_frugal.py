"""What transformers keep for the backward pass, and the exact gradients of what they compute again; half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import attention as attending
from ldm.models import wide
from ldm.models.attention import attention
from ldm.models.frugal import norm_modulated, rms_norm
from ldm.models.transformers import presets
from ldm.models.transformers.blocks import FeedForward, RMSNorm, norm_and_modulate
from ldm.models.transformers.sd3 import SD3Transformer
from ldm.models.wide import Linear, gelu_linear


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def kept(call: Callable[[], Tensor]) -> int:
    """Bytes that a call keeps for its backward pass, each storage once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    del out
    return sum(storages.values())


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "norm and modulation": (
        lambda x, shift, scale: norm_modulated(x, shift, scale, 1e-6),
        lambda x, shift, scale: F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift,
        ((2, 3, 5), (2, 1, 5), (2, 1, 5)),
    ),
    "one modulation for all rows": (
        lambda x, shift, scale: norm_modulated(x, shift, scale, 1e-6),
        lambda x, shift, scale: F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift,
        ((2, 3, 5), (1, 1, 5), (1, 1, 5)),
    ),
    "RMS norm": (
        lambda x, weight: rms_norm(x, weight, 1e-6),
        lambda x, weight: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight,
        ((2, 3, 2, 5), (5,)),
    ),
    "GELU and product": (
        gelu_linear,
        lambda x, weight, bias: F.gelu(x, approximate="tanh") @ weight.T + bias,
        ((2, 3, 5), (4, 5), (4,)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_second_gradients(case: str) -> None:
    torch.manual_seed(0)
    ours, plain, shapes = CASES[case]
    inputs = tuple(random(*shape) for shape in shapes)
    torch.testing.assert_close(ours(*inputs), plain(*inputs), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)
    frozen = [inputs[0], *(x.detach() for x in inputs[1:])]
    found, wanted = (torch.autograd.grad(f(*frozen).square().sum(), inputs[0])[0] for f in (ours, plain))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_they_keep_their_input_alone() -> None:
    x, part, weight = torch.randn(2, 64, 96, requires_grad=True), torch.randn(2, 1, 96), torch.ones(96)
    size = x.nbytes
    assert size <= kept(lambda: norm_and_modulate(x, part, part)) < 1.1 * size
    assert kept(lambda: torch.addcmul(part, F.layer_norm(x, (96,)), 1 + part.requires_grad_())) > 1.9 * size
    norm = RMSNorm(96)
    assert size <= kept(lambda: norm(x)) < 1.1 * size
    layer = FeedForward(96)
    weights = sum(p.nbytes for p in layer.parameters())
    assert kept(lambda: layer(x)) - weights < 5.1 * size, "x and what comes before GELU"
    assert kept(lambda: layer.net[2](layer.net[0](x))) > 9 * size
    assert weight.requires_grad is False


def test_corrections_of_the_feed_forward_are_seen() -> None:
    """A hook on any of its layers runs, with gradients and without; so does a layer of another kind."""
    layer, x = FeedForward(8).double(), random(2, 3, 8)
    plain = layer(x)
    for module in (layer.net[0], layer.net[0].proj, layer.net[2]):  # type: ignore[union-attr]
        handle = module.register_forward_hook(lambda _, args, out: 2 * out)  # type: ignore[union-attr]
        for on in (True, False):
            with torch.set_grad_enabled(on):
                assert (layer(x) - plain).norm() > 0.1 * plain.norm()
        handle.remove()
    layer.net[2] = nn.Identity()
    assert layer(x).shape == (2, 3, 32)


def emulated(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (wide, attending):
        monkeypatch.setattr(module, "emulates", lambda dtype: on and dtype == torch.bfloat16)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on", [True, False])
def test_half_precision_is_near_with_either_product(
    stored: torch.dtype, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer and of its gradients, for weights in either type; bounds are a few of bfloat16's roundings."""
    emulated(on, monkeypatch)
    torch.manual_seed(0)
    layer = Linear(48, 24).to(stored)
    x = torch.randn(2, 16, 48, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2, 16, 24)
    exact_x, exact = x.detach().double().requires_grad_(), nn.Linear(48, 24).double()
    exact.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    (out.float() * weight).sum().backward()
    (exact(exact_x) * weight).sum().backward()
    pairs = [(out, exact(exact_x)), (x.grad, exact_x.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(layer.parameters(), exact.parameters(), strict=True)]
    for found, wanted in pairs:
        assert found is not None
        assert wanted is not None
        assert (found - wanted).norm() < 0.01 * wanted.norm()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_float32_where_half_precision_is_emulated(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated(True, monkeypatch)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.bfloat16, requires_grad=True) for n in (9, 14, 14))
    mask = torch.arange(14)[None, None, None] < 11 if masked else None
    wide_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(2, 9, 3, 8)
    exact = attention(wide_inputs[0], wide_inputs[1], wide_inputs[2], mask)
    out = attention(q, k, v, mask)
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() < 0.005 * exact.norm()
    (out.float() * weight).sum().backward()
    (exact * weight).sum().backward()
    for ours, theirs in zip((q, k, v), wide_inputs, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() < 0.01 * theirs.grad.norm()
    assert kept(lambda: attention(q, k, v)) == q.nbytes + k.nbytes + v.nbytes
    with torch.no_grad():
        assert torch.equal(attention(q, k, v, mask), out)


@pytest.mark.parametrize("on", [True, False])
def test_a_network_trains_in_half_precision(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated(on, monkeypatch)
    torch.manual_seed(0)
    net = SD3Transformer(presets.SD3_TINY)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 4, 8, 6), torch.tensor([7.0, 801.0])
    cond = {"text": torch.randn(2, 5, 20), "pooled": torch.randn(2, 12)}
    weight, grads = torch.randn(2, 4, 8, 6), []
    for half in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = net(x, t, cond)
        (out.float() * weight).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert (grads[1] - grads[0]).norm() < 0.05 * grads[0].norm()
