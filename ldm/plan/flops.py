"""Floating-point operations of a forward pass, counted as it runs: two a multiply-add, attention included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.models import onednn


def count_flops(module: Callable[..., Any], *inputs: Any) -> int:
    """Operations of the matrix products, convolutions and attentions of `module(*inputs)`, 2 a multiply-add.

    Norms, activations and sums are left out: they are bound by memory. Build the module under `torch.device("meta")`
    and give it meta tensors, and nothing is computed or allocated; a training step is about three times the count.
    """
    counter = FlopCounterMode(display=False, custom_mapping=onednn.formulas())
    with torch.no_grad(), _attention_in_parts(), counter:
        module(*inputs)
    return counter.get_total_flops()


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Attention as products that are counted: fused kernels of some devices are operators that the counter passes."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
