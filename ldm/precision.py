"""What networks compute in: fp32, bf16 or fp16; `auto` is asked of a GPU and measured on a CPU.

Whether a CPU gains by bfloat16 depends on its instructions and on what the libraries make of them, so a convolution and
a matrix product of the size of a small network's, in the layer that networks have, are timed, forward and backward,
once a process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm import dist
from ldm.models.wide import Linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VARIABLE = "LDM_AUTO_PRECISION"
"""Environment variable: fp32 or bf16 is what `auto` means then, and nothing is measured."""
GAIN = 1.1
"""bf16 keeps 8 bits of 24: it is taken where it is faster by more than the noise of a measurement."""
_ROUNDS, _SECONDS = 6, 0.4
_BATCH, _CHANNELS, _SIDE = 8, 64, 16


@dataclass(frozen=True)
class Measured:
    """Milliseconds of the same work in both, the best of alternating rounds."""

    fp32: float
    bf16: float

    @property
    def choice(self) -> str:
        """bf16 where it is faster."""
        return "bf16" if self.fp32 > GAIN * self.bf16 else "fp32"

    def __str__(self) -> str:
        times = f"{self.fp32:.2f} ms in fp32, {self.bf16:.2f} ms in bf16"
        return f"{self.choice} (measured here: {times}, for a convolution and a product, forward and backward)"


_found: dict[str, tuple[str, bool]] = {}
"""By kind of device what `auto` means, and whether all ranks agreed on it."""
_measured: Measured | None = None


def compute_dtype(precision: str, device: str | torch.device | None = None) -> torch.dtype:
    """The dtype of `chosen(precision, device)`."""
    return DTYPES[chosen(precision, device)]


def chosen(precision: str, device: str | torch.device | None = None) -> str:
    """fp32, bf16 or fp16; `auto` becomes fp32 or bf16, whichever is faster on the device (None: this process's own).

    Where there is a process group, all ranks take what rank 0 found: the first call with `auto` is collective then.
    Raises ValueError for any other word.
    """
    if precision in DTYPES:
        return precision
    if precision != "auto":
        raise ValueError(f"precision: {precision!r} is not one of {['auto', *DTYPES]}")
    asked = _asked()  # on all ranks: none is left waiting for one that refused
    kind = torch.device(dist.device() if device is None else device).type
    choice, agreed = _found.get(kind, ("", False))
    if not choice and (dist.rank() == 0 or not dist.initialized()):
        choice = asked or (_of_gpu() if kind == "cuda" else _of_cpu())
    if dist.initialized() and not agreed:
        choice, agreed = ("fp32", "bf16")[dist.from_first(int(choice == "bf16"))], True
    _found[kind] = choice, agreed
    return choice


def measured() -> Measured | None:
    """What this process measured for `auto`, if it did."""
    return _measured


def _asked() -> str | None:
    told = os.environ.get(VARIABLE)
    if told not in (None, "", "fp32", "bf16"):
        raise ValueError(f"{VARIABLE}: {told!r} is not one of ['fp32', 'bf16']")
    return told or None


def _of_gpu() -> str:
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def _of_cpu() -> str:
    global _measured
    _measured = measure()
    dist.say(f"precision auto: {_measured}")
    return _measured.choice


def measure(clock: Callable[[], float] = time.thread_time) -> Measured:
    """Processor time of both on one thread, so that a busy machine disturbs it little; draws no random number.

    A third of a second, twice that where bf16 is emulated.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = _best(clock)
    finally:
        torch.set_num_threads(threads)
    return Measured(fp32=1e3 * best[0], bf16=1e3 * best[1])


def _best(clock: Callable[[], float]) -> list[float]:
    """Seconds of the work in float32 and in bfloat16."""
    works = _work(torch.float32), _work(torch.bfloat16)
    best = [float("inf"), float("inf")]
    with torch.inference_mode(False), torch.enable_grad():
        for work in works:
            work()  # allocates, and chooses its kernels
        began = clock()
        for done in range(_ROUNDS):
            for i, work in enumerate(works):
                start = clock()
                work()
                best[i] = min(best[i], clock() - start)
            if done and clock() - began > _SECONDS:
                break
    return best


def _work(dtype: torch.dtype) -> Callable[[], object]:
    """A step of training of a convolution and a product, with float32 weights that autocast rounds at every call."""
    half = dtype != torch.float32
    memory = torch.channels_last if half else torch.contiguous_format  # as networks keep theirs

    def values(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        line = torch.linspace(-1, 1, count, dtype=torch.float32, device="cpu") * 0.1
        return line.view(shape)

    x = values(_BATCH, _CHANNELS, _SIDE, _SIDE)
    kernel = values(_CHANNELS, _CHANNELS, 3, 3).contiguous(memory_format=memory).requires_grad_()
    matrix = nn.Parameter(values(4 * _CHANNELS, _CHANNELS))
    linear = nn.utils.skip_init(Linear, _CHANNELS, 4 * _CHANNELS, bias=False)
    linear.weight = matrix
    x.requires_grad_()

    def step() -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            hidden = torch.nn.functional.conv2d(x, kernel, padding=1)
            out = linear(hidden.flatten(2).transpose(1, 2).contiguous())  # as a norm leaves them
            loss = out.float().square().mean()
        return torch.autograd.grad(loss, [x, kernel, matrix])

    return step
