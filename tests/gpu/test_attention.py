"""Attention kernels on a device against float64: values, gradients and masks, at the widths that heads have."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.models import attention as module
from ldm.models.attention import attention, using
from tests.devices import DEVICES

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
CLOSE: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.01, 0.02), torch.float16: (0.002, 0.004),
}  # fmt: skip
"""How far values and gradients may be from float64's, as a share of their norm."""
WIDTHS = (40, 64, 80, 128, 160)
"""Of SD 1.5's heads 40, 80 and 160; of SD 2's, SDXL's and SD3's 64; of FLUX.1's 128."""
ON_CPU = {"math", "flash"}
NOT_HERE = ("No available kernel", "No execution plans", "No valid e", "No operator found", "not supported")
"""What is said where a card has no such kernel for these shapes."""


def runs(kernel: str, device: str, *given: Any) -> Tensor:
    """Our attention by one kernel; skips the test where there is none for this type and width here."""
    backend = "xformers" if kernel == "xformers" else "sdpa"
    if kernel == "xformers" and (reason := module._why_not_xformers(device)):
        pytest.skip(reason)
    try:
        with using(device, backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why each of the others was not taken
            if backend == "xformers":
                return attention(*given)
            with sdpa_kernel(KERNELS[kernel]):
                return attention(*given)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if any(told in str(error) for told in NOT_HERE):
            pytest.skip(f"{kernel} is not on this {device} for this: {str(error).splitlines()[0]}")
        raise


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """In float64 on the CPU."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def cases() -> list[Any]:
    """Kernels, devices and types; the fused kernels of cards take half precision (efficient: all)."""
    found = []
    for kernel in [*KERNELS, "xformers"]:
        for dtype in CLOSE:
            if kernel in ON_CPU and not (kernel == "math" and dtype != torch.float32):
                found.append(pytest.param("cpu", kernel, dtype, id=f"cpu {kernel} {dtype}"))
            if dtype != torch.float32 or kernel in ("math", "efficient", "xformers"):
                found.append(pytest.param("cuda", kernel, dtype, id=f"cuda {kernel} {dtype}", marks=pytest.mark.gpu))
    return found


def made(width: int, dtype: torch.dtype, device: str, queries: int, keys: int) -> tuple[list[Tensor], list[Tensor]]:
    """q, k and v on the device, and the same numbers in float64."""
    g = torch.Generator().manual_seed(0)
    wide = [torch.randn(2, n, 4, width, generator=g) for n in (queries, keys, keys)]
    half = [x.to(device, dtype).requires_grad_() for x in wide]
    return half, [x.detach().double().cpu().requires_grad_() for x in half]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("device", "kernel", "dtype"), cases())
def test_values_and_gradients(device: str, kernel: str, dtype: torch.dtype, width: int) -> None:
    """Over the picture itself, 64 tokens, and over a text of 77."""
    for queries, keys in ((64, 64), (63, 77)):
        half, exact = made(width, dtype, device, queries, keys)
        out, wanted = runs(kernel, device, *half), formula(*exact, None)
        weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (out.double() * weight.to(device)).sum().backward()
        (wanted * weight).sum().backward()
        values, gradients = CLOSE[dtype]
        assert (out.double().cpu() - wanted).norm() < values * wanted.norm()
        for a, b in zip(half, exact, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert (a.grad.double().cpu() - b.grad).norm() < gradients * b.grad.norm()


MASKED = [c for c in cases() if c.values[1] in ("math", "efficient", "xformers")]


@pytest.mark.parametrize("keys", [77, 300])
@pytest.mark.parametrize(("device", "kernel", "dtype"), MASKED)
def test_masks(device: str, kernel: str, dtype: torch.dtype, keys: int) -> None:
    """Of text that is cut off: PixArt's has 300 tokens, which is no multiple of 8."""
    half, exact = made(72, dtype, device, 64, keys)
    mask = torch.arange(keys)[None, None, None] < torch.tensor([5, keys]).view(2, 1, 1, 1)
    with torch.no_grad():
        out = runs(kernel, device, *half, mask.to(device))
        wanted = formula(*exact, mask)
    assert (out.double().cpu() - wanted).norm() < CLOSE[dtype][0] * wanted.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_chosen_by_itself_is_right(device: str) -> None:
    """Whatever kernel torch or xformers takes for half precision here."""
    dtype = torch.bfloat16 if device == "cpu" or torch.cuda.is_bf16_supported() else torch.float16
    half, exact = made(64, dtype, device, 256, 256)
    with using(device, "auto"), torch.no_grad():
        out = attention(*half)
    wanted = formula(*exact, None)
    assert (out.double().cpu() - wanted).norm() < CLOSE[dtype][0] * wanted.norm()
