"""What makes the networks quick and small changes nothing: kept activations, products for convolutions, known keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import wide
from ldm.models.frugal import geglu, norm_silu, norm_silu_conv
from ldm.models.layers import Conv3x3, NormSiLU
from ldm.models.presets import UNETS
from ldm.models.unet import UNet
from ldm.models.unet.transformer import FeedForward
from ldm.models.wide import Linear, geglu_linear


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


def plain_convolution(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(plain_norm(x, scale, shift), weight, bias, padding=1)


def test_norm_silu_and_convolution_have_their_gradients_and_second_gradients() -> None:
    def ours(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm_silu_conv(x, (scale, shift), 2, 1e-5, weight, bias)

    inputs = random(1, 4, 3, 2), random(4), random(4), random(3, 4, 3, 3), random(3)
    torch.testing.assert_close(ours(*inputs), plain_convolution(*inputs), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)
    for trained in (0, 1, 3, 4):  # the others frozen
        given = [v if i == trained else v.detach() for i, v in enumerate(inputs)]
        pair = [torch.autograd.grad(f(*given).square().sum(), given[trained])[0] for f in (ours, plain_convolution)]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-11)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_a_norm_before_a_convolution_keeps_its_input_alone(trained: bool, half: bool) -> None:
    """Bit for bit what torch's own three operations give, in float32 and under autocast, for half of the memory."""
    torch.manual_seed(0)
    norm, conv = NormSiLU(4, 64), Conv3x3.of(64, 32)
    nn.init.normal_(norm.weight)
    for p in (*norm.parameters(), *conv.parameters()):
        p.requires_grad_(trained)
    x = torch.randn(2, 64, 16, 16, dtype=torch.bfloat16 if half else torch.float32, requires_grad=True)
    leaves = [x, *(p for p in (*norm.parameters(), *conv.parameters()) if trained)]

    def plainly() -> Tensor:
        return F.conv2d(F.silu(F.group_norm(x, 4, norm.weight, norm.bias, norm.eps)), conv.weight, conv.bias, padding=1)

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out, wanted = norm.before(conv, x), plainly()
        own = x.nbytes + sum(p.nbytes for p in (*norm.parameters(), *conv.parameters()))
        assert kept(lambda: norm.before(conv, x)) < own + 0.1 * x.nbytes
        assert kept(plainly) > 2 * x.nbytes
    assert out.dtype == wanted.dtype == x.dtype
    assert torch.equal(out, wanted)
    weight = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad((f * weight).sum(), leaves) for f in (out, wanted)), strict=True):
        assert torch.equal(a, b)


def test_corrections_beside_a_norm_before_a_convolution_are_seen() -> None:
    norm, conv = NormSiLU(4, 64), Conv3x3.of(64, 32)
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    plain = norm.before(conv, x)
    for module in (norm, conv):
        handle = module.register_forward_hook(lambda _, args, out: 2 * out)
        assert (norm.before(conv, x) - plain).norm() > 0.1 * plain.norm()
        handle.remove()


def test_a_gate_before_a_product_is_not_kept() -> None:
    layer, x = FeedForward(64), torch.randn(2, 32, 64, requires_grad=True)
    weights = sum(p.nbytes for p in layer.parameters())
    assert kept(lambda: layer(x)) - weights < 9.1 * x.nbytes, "x and both halves"
    assert kept(lambda: layer.net[2](layer.net[0](x))) - weights > 12.5 * x.nbytes
    inputs = random(2, 3, 10), random(4, 5), random(4)
    exact = (inputs[0][..., :5] * F.gelu(inputs[0][..., 5:])) @ inputs[1].T + inputs[2]
    torch.testing.assert_close(geglu_linear(*inputs), exact, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(geglu_linear, inputs)
    assert torch.autograd.gradgradcheck(geglu_linear, inputs)


@pytest.mark.parametrize("trained", [False, True])
def test_no_copies_of_weights_are_kept_under_autocast(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what autocast gives, which keeps its half-precision copies to the backward pass."""
    monkeypatch.setattr(wide, "emulates", lambda dtype: False)  # as on a CPU with such products
    torch.manual_seed(0)
    layer, x = Linear(256, 160), torch.randn(256, 256, dtype=torch.bfloat16, requires_grad=True)
    layer.requires_grad_(trained)
    bias = layer.bias
    with torch.autocast("cpu", torch.bfloat16):
        out, wanted = layer(x), F.linear(x, layer.weight, bias)
        copy = layer.weight.numel() * 2
        own = x.nbytes * trained + layer.weight.nbytes + bias.nbytes
        assert kept(lambda: layer(x)) <= own
    with torch.autocast("cpu", torch.bfloat16):  # as the casts are kept until autocast is left
        assert kept(lambda: F.linear(x, layer.weight, bias)) >= copy
    assert torch.equal(out, wanted)
    leaves, weight = [x, *(p for p in layer.parameters() if trained)], torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad((f * weight).sum(), leaves) for f in (out, wanted)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [64, 512])
def test_small_products_under_autocast_are_float32s(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same rounded numbers; large ones are autocast's own, bit for bit."""
    monkeypatch.setattr(wide, "emulates", lambda dtype: False)  # as on a CPU with such products
    torch.manual_seed(0)
    layer, x = Linear(256, 96), torch.randn(rows, 256, requires_grad=True)
    exact = nn.Linear(256, 96).double()
    exact.load_state_dict({k: v.bfloat16() for k, v in layer.state_dict().items()})
    half, double = x.detach().bfloat16().requires_grad_(), x.detach().bfloat16().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, theirs = layer(half), F.linear(half, layer.weight, layer.bias)
    assert out.dtype == torch.bfloat16
    off, usual = ((v.double() - exact(double)).norm() for v in (out, theirs))
    assert off <= 1.01 * usual
    assert rows == 64 or torch.equal(out, theirs)
    weight = torch.randn_like(out)
    found, wanted = (
        torch.autograd.grad((f * weight).sum(), leaves)
        for f, leaves in ((out, (half, *layer.parameters())), (exact(double), (double, *exact.parameters())))
    )
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() < 0.005 * b.norm()


@pytest.mark.parametrize(("batch", "side"), [(1, 4), (2, 5), (1, 8)])
def test_a_convolution_with_few_pixels_is_a_product(batch: int, side: int) -> None:
    layer, x = Conv3x3.of(256, 24), torch.randn(batch, 256, side, side + 1)[..., :side].requires_grad_()
    assert layer.few_pixels(x)
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
    assert not layer.few_pixels(torch.empty(1, 256, 8, 9))
    wide, x = Conv3x3.of(256, 8).double(), torch.randn(1, 256, 4, 4, dtype=torch.float64)
    assert torch.equal(wide(x), F.conv2d(x, wide.weight, wide.bias, padding=1))
    assert not Conv3x3.of(128, 8).few_pixels(torch.empty(1, 128, 2, 2))


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
