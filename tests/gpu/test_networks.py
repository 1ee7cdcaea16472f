"""Every network on a device: half precision, channels_last and CUDA graphs against float64 and against plain calls."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from bench.gpu.graphs import Graphed
from ldm.models.network import Network
from ldm.types import Cond
from tests.devices import DEVICES
from tests.unit.models.test_network import NETS, inputs

HALF = {torch.bfloat16: 0.02, torch.float16: 0.0025}
"""How far an answer in half precision may be from float64's, as a share of its norm: 5 steps of the type."""
UNETS = [name for name in NETS if name.startswith("unet")]


def made(name: str) -> tuple[Network, Tensor, Tensor, Cond]:
    """A network whose every weight matters, and what it is given."""
    torch.manual_seed(0)
    network = NETS[name]().requires_grad_(False).eval()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return network, *inputs(network)


@torch.no_grad()
def exact(network: Network, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The answer in float64 on the CPU."""
    wide = {k: v.double() for k, v in cond.items()}
    return copy.deepcopy(network).double()(x.double(), t.double(), wide)


def apart(a: Tensor, b: Tensor) -> float:
    """Relative to the second."""
    return float((a.double().cpu() - b).norm() / b.norm())


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = on
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def moved(device: str, network: Network, x: Tensor, t: Tensor, cond: Cond) -> tuple[Network, Tensor, Tensor, Cond]:
    """Copies on the device."""
    return (
        copy.deepcopy(network).to(device), x.to(device), t.to(device), {k: v.to(device) for k, v in cond.items()}
    )  # fmt: skip


@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_is_near_float64(device: str, name: str, dtype: torch.dtype) -> None:
    """Weights held in it, and float32 weights under autocast."""
    given = made(name)
    expected = exact(*given)
    network, x, t, cond = moved(device, *given)
    with torch.no_grad():
        with torch.autocast(device, dtype=dtype):
            assert apart(network(x, t, cond), expected) < HALF[dtype]
        out = network.to(dtype)(x, t, cond)
    assert out.dtype == dtype
    assert apart(out, expected) < HALF[dtype]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("device", DEVICES)
def test_float32_is_near_float64(device: str, name: str) -> None:
    given = made(name)
    expected = exact(*given)
    network, x, t, cond = moved(device, *given)
    with torch.no_grad(), tf32(False):
        assert apart(network(x, t, cond), expected) < 1e-5
    if device == "cuda":
        with torch.no_grad(), tf32(True):
            assert apart(network(x, t, cond), expected) < HALF[torch.float16]  # as many bits of mantissa


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_is_the_same(device: str, name: str) -> None:
    """Answers, and gradients of all weights."""
    network, x, t, cond = moved(device, *made(name))
    network.requires_grad_(True)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        network.to(memory_format=layout)
        with tf32(False):
            out = network(x.contiguous(memory_format=layout), t, cond)
            loss = (out * weight).sum()
            grads = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        found.append((out.detach().double().cpu(), [g for g in grads if g is not None]))
    assert network.get_submodule("conv_in").weight.is_contiguous(memory_format=torch.channels_last)
    assert apart(found[1][0], found[0][0]) < 1e-5
    top = max(float(g.abs().max()) for g in found[0][1])
    assert len(found[0][1]) == len(found[1][1])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert float((a - b).abs().max()) < 1e-4 * top


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("device", DEVICES)
def test_graphs_give_what_calls_give(device: str, name: str) -> None:
    """A replay with other values than those of the capture, and after the weights have changed in place."""
    network, x, t, cond = moved(device, *made(name))
    with torch.no_grad():
        cond = network.prepared(cond)
        graphed = Graphed(network)
        first = graphed(x, t, cond)
        kept = first.clone()
        for _ in range(2):
            for p in network.parameters():
                p.mul_(1.01)
            x, t = x.flip(0) * 1.1, t.flip(0)
            expected = network(x, t, cond).double().cpu()
            assert apart(graphed(x, t, cond), expected) < 1e-5
            assert torch.equal(first, kept), "an earlier answer is not written over"
    assert len(graphed._kept) == 1
    assert (next(iter(graphed._kept.values()))[0] is not None) == (device == "cuda")
