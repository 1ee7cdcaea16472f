"""Blocks that come and go on a GPU: streams, pinned memory, and less of the GPU's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.models.attention import using
from ldm.models.moving import PAGE, mover
from ldm.models.networks import build
from ldm.models.streaming import stop, stream
from ldm.models.transformers import presets
from ldm.types import Cond
from tests.unit.models.test_network import inputs
from tests.unit.models.test_streaming import equal


def cond_on(cond: Cond, device: str) -> Cond:
    return {name: value.to(device) for name, value in cond.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 4])
def test_on_a_gpu(count: int) -> None:
    """The same bits with streams and pinned memory, in less memory, and nothing that waits for the device."""
    torch.manual_seed(0)
    config = presets.FLUX_TINY.__class__(
        **{**vars(presets.FLUX_TINY), "num_layers": 6, "num_single_layers": 6, "num_attention_heads": 64}
    )
    network = build(config)
    for p in network.parameters():
        nn.init.normal_(p, std=0.02)
    network.eval().requires_grad_(False).cuda()
    x, t, cond = inputs(network)
    x, t, cond = x.cuda(), t.cuda(), cond_on(cond, "cuda")

    def grads() -> Tensor:
        own = x.clone().requires_grad_()
        network(own, t, cond).square().sum().backward()
        assert own.grad is not None
        return own.grad

    def peak() -> tuple[int, list[Tensor]]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            found = [network(x, t, cond) for _ in range(4)]
        found += [grads() for _ in range(3)]
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), found

    with using("cuda", "reference"):  # whose backward pass adds up in one order
        whole, wanted = peak()
    blocks = sum(p.numel() * p.element_size() for _, b in network.blocks() for p in b.parameters())
    streaming = stream(network.cpu(), count, "cuda")
    torch.cuda.empty_cache()
    away = network.get_submodule(streaming.moving[0]).get_submodule("attn.to_q").get_parameter("weight")
    assert away.device.type == "cpu"
    assert away.is_pinned()
    with pytest.raises(RuntimeError, match="device"):
        torch.nn.functional.linear(torch.ones(1, away.shape[1], device="cuda"), away)
    with using("cuda", "reference"):
        few, found = peak()
    assert equal(found, wanted)
    assert few < whole - 0.8 * blocks * (12 - count) / 12
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _, block in network.blocks():
            network.fetch(block)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stop(network)
    with torch.no_grad(), using("cuda", "reference"):
        assert torch.equal(network.cuda()(x, t, cond), wanted[0])


@pytest.mark.gpu
def test_pinned_memory_is_exact_and_given_back() -> None:
    """Not rounded up to a power of two, and unpinned when the last tensor in it goes."""
    device = mover(torch.device("cuda"))
    memory = device.host(3 * 2**20 + 512)
    assert memory.is_pinned()
    assert memory.untyped_storage().nbytes() <= 3 * 2**20 + 3 * PAGE
    part = memory[256:512]
    del memory
    assert part.is_pinned()
    arriving = device.fetch(part)
    device.wait(arriving)
    assert torch.equal(arriving.flat.cpu(), part)
