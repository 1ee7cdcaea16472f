"""What makes the networks quick and small changes nothing: kept activations, products for convolutions, known keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.frugal import geglu, norm_silu
from ldm.models.layers import Conv3x3, NormSiLU
from ldm.models.presets import UNETS
from ldm.models.unet import UNet


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


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 2, weight, bias, 1e-5))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_norm_and_silu_have_their_gradients_and_second_gradients() -> None:
    inputs = random(2, 4, 3, 3), random(4), random(4)
    torch.testing.assert_close(norm_silu(*inputs, 2, 1e-5), plain_norm(*inputs), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x, w, b: norm_silu(x, w, b, 2, 1e-5), inputs)
    assert torch.autograd.gradgradcheck(lambda x, w, b: norm_silu(x, w, b, 2, 1e-5), inputs)
    frozen = [inputs[0], inputs[1].detach(), inputs[2].detach()]
    ours, theirs = (f.square().sum() for f in (norm_silu(*frozen, 2, 1e-5), plain_norm(*frozen)))  # type: ignore[arg-type]
    torch.testing.assert_close(*(torch.autograd.grad(f, inputs[0])[0] for f in (ours, theirs)), rtol=0, atol=1e-13)


def test_gated_gelu_has_its_gradients() -> None:
    both = random(3, 10)
    value, gate = both.chunk(2, dim=-1)
    torch.testing.assert_close(geglu(both), value * F.gelu(gate), rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(geglu, (both,))
    assert torch.autograd.gradgradcheck(geglu, (both,))


def test_norm_of_half_precision_computes_in_the_type_of_its_weights() -> None:
    x = torch.randn(2, 8, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.randn(8, requires_grad=True) for _ in range(2))
    wide = x.detach().double().requires_grad_()
    out, exact = norm_silu(x, weight, bias, 2, 1e-5), plain_norm(wide, weight.double(), bias.double())
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 0.01 * exact.abs().max()
    grads, wanted = (torch.autograd.grad(f.double().square().sum(), (v, weight)) for f, v in ((out, x), (exact, wide)))
    for a, b in zip(grads, wanted, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_a_norm_keeps_its_input_alone() -> None:
    layer, x = NormSiLU(4, 64), torch.randn(2, 64, 16, 16, requires_grad=True)
    size = x.numel() * 4
    assert size < kept(lambda: layer(x)) < 1.1 * size
    assert kept(lambda: F.silu(F.group_norm(x, 4, layer.weight, layer.bias))) > 2 * size


@pytest.mark.parametrize(("batch", "side"), [(1, 4), (2, 5), (1, 8)])
def test_a_convolution_with_few_pixels_is_a_product(batch: int, side: int) -> None:
    layer, x = Conv3x3.of(256, 24), torch.randn(batch, 256, side, side + 1)[..., :side].requires_grad_()
    assert layer._few_pixels(x)
    weight = torch.randn(batch, 24, side, side)
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)  # type: ignore[union-attr]
    out = layer(x)
    assert (out - exact).norm() < 1e-6 * exact.norm()
    leaves = (x, *layer.parameters())
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    theirs = torch.autograd.grad((exact * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()


def test_a_convolution_with_many_pixels_stays_one() -> None:
    layer = Conv3x3.of(256, 8)
    assert not layer._few_pixels(torch.empty(1, 256, 8, 9))
    wide, x = Conv3x3.of(256, 8).double(), torch.randn(1, 256, 4, 4, dtype=torch.float64)
    assert torch.equal(wide(x), F.conv2d(x, wide.weight, wide.bias, padding=1))
    assert not Conv3x3.of(128, 8)._few_pixels(torch.empty(1, 128, 2, 2))


def tiny(**changes: object) -> tuple[UNet, Tensor, Tensor, Tensor]:
    net = UNet(replace(UNETS["tiny"], **changes))  # type: ignore[arg-type]
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    return net, torch.randn(3, 4, 8, 8), torch.tensor([5, 500, 999]), torch.randn(3, 7, 32)


@torch.no_grad()
def test_keys_and_values_once_are_those_of_the_layers() -> None:
    net, x, t, text = tiny(transformer_layers_per_block=(2, 1))
    net.eval()
    kv = net.keys_values(text)
    assert kv.shape == (3, 7, net.prepared_numbers(1, 1))
    assert torch.equal(net(x, t, {"kv": kv}), net(x, t, {"text": text}))
    mixed = torch.cat([kv[2:], kv[:1].expand(2, -1, -1)])  # rows are chosen as those of the text would be
    assert torch.equal(net(x, t, {"kv": mixed}), net(x, t, {"text": text[[2, 0, 0]]}))


def test_checkpointing_keeps_less_and_gives_the_same_gradients() -> None:
    net, x, t, text = tiny()
    sizes, grads = {}, {}
    for how in ("none", "transformer", "block"):
        net.enable_gradient_checkpointing(how)  # type: ignore[arg-type]
        sizes[how] = kept(lambda: net(x, t, {"text": text}))
        net.zero_grad()
        net(x, t, {"text": text}).square().sum().backward()
        grads[how] = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    assert sizes["block"] < 0.8 * sizes["transformer"] < 0.8 * sizes["none"], sizes
    for how in ("transformer", "block"):
        assert all(torch.equal(a, b) for a, b in zip(grads[how], grads["none"], strict=True))
    with pytest.raises(ValueError, match=r"gradient_checkpointing 'layer' is not one of"):
        net.enable_gradient_checkpointing("layer")  # type: ignore[arg-type]


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_without_a_break(train: bool) -> None:
    """One graph of the whole network, traced and run as it is (no code is generated)."""
    if torch._dynamo.config.disable:
        pytest.skip("TORCHDYNAMO_DISABLE is set")
    torch._dynamo.reset()
    net, x, t, text = tiny()
    whole = torch.compile(net.train(train), fullgraph=True, backend="aot_eager" if train else "eager")
    with torch.set_grad_enabled(train):
        given = {"text": text} if train else {"kv": net.keys_values(text)}
        out, wanted = whole(x, t, given), net(x, t, {"text": text})
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
        both, copies = {"text": torch.cat([text, text + 1])}, {"copies": torch.empty(2, 0)}
        x, t = torch.cat([x, x]), torch.cat([t, t])
        torch.testing.assert_close(whole(x, t, both | copies), net(x, t, both), rtol=1e-4, atol=1e-5)
    if train:
        parameters = list(net.parameters())
        ours, theirs = (torch.autograd.grad(f.square().sum(), parameters) for f in (out, wanted))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
