"""DeepSpeed's quantisation kernels in PyTorch, for ranks without a GPU: what csrc/quantization of 0.19.8 computes.

As the CUDA kernels do, they take memory for half precision whatever it holds, keep one float32 scale a group, round to
the nearest, and give half precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _half(values: Tensor) -> Tensor:
    """The first values of the memory read as half precision (`(__half*)input_vals.data_ptr()`)."""
    return values.contiguous().view(-1).view(torch.float16)[: values.numel()]


def _quantise(values: Tensor, groups: int, bits: int) -> tuple[Tensor, Tensor]:
    """Integers in int8 (groups, n) and the size of one step (groups, 1)."""
    grouped = values.float().view(groups, -1)
    top = grouped.abs().amax(1, keepdim=True)
    step = torch.where(top == 0, torch.ones(()), 2 * top / 2**bits)
    return (grouped / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8), step


def _pack(values: Tensor) -> Tensor:
    """Two integers of 4 bits in a byte."""
    low, high = values.view(-1, 2).unbind(1)
    return (low & 15) | (high << 4)


def _unpack(packed: Tensor) -> Tensor:
    low, high = packed.view(-1) << 4, packed.view(-1)
    return torch.stack([low >> 4, high >> 4], 1).view(-1)


class Kernels:
    """The module that DeepSpeed's QuantizerBuilder loads."""

    Symmetric = "symmetric"

    def quantize(self, values: Tensor, groups: int, bits: int, kind: Any) -> tuple[Tensor, Tensor]:
        assert bits == 8
        whole, step = _quantise(_half(values), groups, bits)
        return whole.view(values.shape), step.view(-1)  # (groups, 1) there; gloo, unlike NCCL, compares shapes

    def dequantize(self, values: Tensor, step: Tensor, groups: int, bits: int, kind: Any) -> Tensor:
        whole = values if bits == 8 else _unpack(values)
        shape = (*values.shape[:-1], values.shape[-1] * 8 // bits)
        return (whole.float().view(groups, -1) * step.view(groups, 1)).half().view(shape)

    def swizzle_quant(
        self, values: Tensor, groups: int, bits: int, kind: Any, pipelines: int, nodes: int, devices: int
    ) -> tuple[Tensor, Tensor]:
        """Partition p goes to place (p % devices) * nodes + p // devices."""
        assert pipelines == 1
        assert groups % (nodes * devices) == 0
        whole, step = _quantise(_half(values), groups, bits)
        assert whole.shape[1] % 8 == 0  # loads of 16 bytes
        order = [n * devices + d for d in range(devices) for n in range(nodes)]
        parts, steps = whole.view(nodes * devices, -1)[order], step.view(nodes * devices, -1)[order]
        return _pack(parts.reshape(-1)), steps.reshape(-1, 1)

    def quantized_reduction(
        self, values: Tensor, step: Tensor, groups_in: int, groups_out: int, bits: int, kind: Any, devices: int
    ) -> tuple[Tensor, Tensor]:
        """The sum over devices, not the mean."""
        whole = _unpack(values).float().view(groups_in, -1) * step.view(groups_in, 1)
        total = whole.half().view(devices, -1).sum(0, dtype=torch.float16)
        summed, steps = _quantise(total, groups_out, bits)
        return _pack(summed.reshape(-1)), steps


def install() -> None:
    """In this process, instead of what DeepSpeed would compile."""
    from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer

    from ldm.train import zeropp

    CUDAQuantizer.quantizer_cuda_module = Kernels()
    zeropp.gpus = lambda: True
