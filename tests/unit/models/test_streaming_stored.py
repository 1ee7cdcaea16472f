"""Blocks that come and go with weights stored in fewer bits: what is stored is moved, and made whole on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.models.frozen import Storage, store
from ldm.models.streaming import stop, stream
from tests.counting import Counted
from tests.unit.models.test_network import inputs
from tests.unit.models.test_streaming import made, sizes


@pytest.mark.parametrize("name", ["unet", "flux"])
@pytest.mark.parametrize("storage", ["bf16", "int8", "nf4"])
def test_the_same_gradients(name: str, storage: Storage) -> None:
    """With autocast and without, computed again or not; a block's bytes are those of what is stored."""
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    network: Any = made(name).train()
    whole = sum(sizes(network).values())
    store(network, storage)

    def gradient(half: bool) -> Tensor:
        x, t, cond = inputs(network)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = network(x.requires_grad_(), t, cond)
        out.float().square().sum().backward()
        assert x.grad is not None
        return x.grad

    wanted = [gradient(half) for half in (False, True)]
    for count, recompute in ((1, "none"), (2, "none"), (1, "block")):
        network.enable_gradient_checkpointing(recompute)
        device = Counted()
        streaming = stream(network, count, "cpu", device)
        for half in (False, True):
            assert torch.equal(gradient(half), wanted[half])
        assert device.most == count
        moved = sum(size for block, size in sizes(network).items() if block in streaming.moving)
        assert moved < 0.75 * whole, "of small blocks, whose norms, biases and beginnings are rounded up"
        stop(network)
        assert device.now == 0
