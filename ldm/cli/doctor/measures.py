"""Measured: matrix products, memory, the disk, and an all-reduce; each in processes of its own, for seconds."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.cli.doctor.children import Answer, ask, ours, say

SECONDS = 0.3
"""Of each product and copy."""
DISK = 256 << 20
DISK_SECONDS = 1.5
_CHUNK = 8 << 20
RANKS = 2
"""Processes of the all-reduce on the CPU."""
WAIT = 20
"""Seconds that ranks wait for each other."""


def measure(facts: dict[str, Any], folder: Path, limit: float) -> dict[str, Any]:
    """Rates in GFLOP/s and GB/s; what could not be measured says why under "error"."""
    found: dict[str, Any] = {
        "disk": _of(ask([ours("disk", str(folder.absolute()), limit=min(limit, 20.0), module="measures")])[0])
    }
    if facts["torch"]["state"] != "ok":
        return found
    found |= _of(ask([ours("compute", limit=limit, module="measures")])[0])
    if facts["torch"].get("gloo"):
        found["all_reduce_gloo"] = _reduced("gloo", RANKS, limit)
    gpus = len(facts["torch"].get("gpus", []))
    if gpus and facts["torch"].get("nccl"):
        found["all_reduce_nccl"] = _reduced("nccl", gpus, limit)
    return found


def _of(answer: Answer) -> dict[str, Any]:
    return answer.values | ({"error": answer.ended} if answer.ended else {})


def _reduced(backend: str, ranks: int, limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ldm-doctor-") as meeting:
        words = [(backend, str(rank), str(ranks), str(Path(meeting) / "ranks")) for rank in range(ranks)]
        threads = {"OMP_NUM_THREADS": "1"}
        answers = ask([ours("reduce", *w, limit=min(limit, 2.0 * WAIT), module="measures", **threads) for w in words])
    failed = next((a for a in answers if a.ended), None)
    return {"ranks": ranks} | (answers[0].values if failed is None else {"error": failed.ended})


# --- what runs in a process of its own -------------------------------------------------------------------------------
def main(argv: list[str]) -> int:
    """Run one measurement."""
    {"disk": _disk, "compute": _compute, "reduce": _reduce}[argv[0]](*argv[1:])
    return 0


def _disk(folder: str) -> None:
    """Write a file without a name, to the disk itself, and read it back, past the cache where the system allows."""
    content = os.urandom(_CHUNK)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began, size = time.perf_counter(), 0
        while size < DISK and time.perf_counter() - began < DISK_SECONDS:
            size += file.write(content)
        os.fsync(file.fileno())
        say("write_gb_per_s", _rate(size, time.perf_counter() - began))
        cold = hasattr(os, "posix_fadvise")
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(_CHUNK):
            pass
        say("read_gb_per_s", _rate(size, time.perf_counter() - began))
        say("megabytes", size >> 20)


def _rate(size: float, seconds: float) -> float:
    """GB/s, or GFLOP/s of operations, in three digits."""
    return float(f"{size / max(seconds, 1e-9) / 1e9:.3g}")


def _compute() -> None:
    import torch

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    say("threads", torch.get_num_threads())
    products: dict[str, dict[str, float | str]] = {}
    memory: dict[str, float | str] = {}
    for device in devices:
        products[device] = {}
        for name, dtype, narrow in _kinds(torch, device):
            torch.backends.cuda.matmul.allow_tf32 = narrow
            products[device][name] = _guarded(lambda device=device, dtype=dtype: product(torch, device, dtype))
            say("matrix_product_gflop_per_s", products)
        memory[device] = _guarded(lambda device=device: copies(torch, device, device))
        say("memory_gb_per_s", memory)
    for device in devices[1:]:
        memory[f"cpu -> {device}"] = _guarded(lambda device=device: copies(torch, "cpu", device))
        say("memory_gb_per_s", memory)


def _guarded(call: Callable[[], float]) -> float | str:
    try:
        return call()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return f"fails: {(str(error).splitlines() or [''])[0][:200]}"


def _kinds(torch: Any, device: str) -> list[tuple[str, Any, bool]]:
    """Name, type, and whether float32 products may be narrowed."""
    half = [("bf16", torch.bfloat16, False), ("fp16", torch.float16, False)]
    tf32 = [("tf32", torch.float32, True)] if device != "cpu" else []
    return [("fp32", torch.float32, False), *tf32, *half]


def product(torch: Any, device: str, dtype: Any) -> float:
    """GFLOP/s of square products, whose side grows until one takes a tenth of the time."""
    side = 256 if device == "cpu" else 4096
    while True:
        a = torch.randn(side, side, device=device).to(dtype)
        call = lambda a=a: a @ a  # noqa: E731
        seconds = _repeated(torch, device, call, 0.0)
        if seconds > SECONDS / 10 or side >= (2048 if device == "cpu" else 16384):
            return _rate(2.0 * side**3, _repeated(torch, device, call, SECONDS))
        side *= 2


def copies(torch: Any, source: str, target: str) -> float:
    """GB/s: bytes read and written within a memory, or sent from one to another."""
    size = (64 << 20) if source == target == "cpu" else (256 << 20)
    a = torch.zeros(size, dtype=torch.uint8, device=source)
    a = a.pin_memory() if source != target else a
    b = torch.zeros(size, dtype=torch.uint8, device=target)
    seconds = _repeated(torch, target, lambda: b.copy_(a, non_blocking=True), SECONDS)
    return _rate(size * (2 if source == target else 1), seconds)


def _repeated(torch: Any, device: str, call: Callable[[], Any], seconds: float) -> float:
    """Seconds of one call, the mean of as many as fit into the time after a first one."""
    wait = (lambda: None) if device == "cpu" else (lambda: torch.cuda.synchronize(device))
    call()
    wait()
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < seconds:
        call()
        wait()
        count += 1
    return (time.perf_counter() - began) / count


def _reduce(backend: str, rank: str, ranks: str, meeting: str) -> None:
    """All-reduces of 16 MB and of a number: bus bandwidth as NCCL's tests count it, and microseconds."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    world, device = int(ranks), "cpu" if backend == "gloo" else f"cuda:{rank}"
    if backend == "nccl":
        torch.cuda.set_device(int(rank))
    dist.init_process_group(
        backend, init_method=f"file://{meeting}", rank=int(rank), world_size=world, timeout=timedelta(seconds=WAIT)
    )
    value = torch.full((4 << 20,), float(rank) + 1, device=device)
    dist.all_reduce(value)
    if not bool((value == world * (world + 1) / 2).all()):
        raise RuntimeError(f"the sum over {world} ranks is wrong")
    small = torch.ones(1, device=device)
    large = _each(torch, device, lambda: dist.all_reduce(value), 8)
    say("microseconds", round(1e6 * _each(torch, device, lambda: dist.all_reduce(small), 50), 1))
    if world > 1:
        say("bus_gb_per_s", _rate(2 * (world - 1) / world * value.numel() * 4, large))
    dist.destroy_process_group()


def _each(torch: Any, device: str, call: Callable[[], Any], times: int) -> float:
    """Seconds of one of so many calls, which all ranks make."""
    wait = (lambda: None) if device == "cpu" else (lambda: torch.cuda.synchronize(device))
    call()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - began) / times


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
