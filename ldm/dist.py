"""Who am I among the processes: the only reader of RANK, WORLD_SIZE, LOCAL_RANK and their SLURM twins."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as torch_dist
from torch import Tensor

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def _env(name: str, default: int) -> int:
    value = os.environ.get(name)
    if value is None and os.environ.get("LDM_RANKS_FROM_SLURM") == "1":
        value = os.environ.get(_SLURM[name])
    return default if value is None else int(value)


def rank() -> int:
    """This process's global rank, 0 without a launcher."""
    return _env("RANK", 0)


def world_size() -> int:
    """How many processes take part, 1 without a launcher."""
    return _env("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's rank on its node, 0 without a launcher."""
    return _env("LOCAL_RANK", 0)


def device() -> torch.device:
    """The device of this process: its GPU if there is one, otherwise the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def initialized() -> bool:
    """Whether a process group exists."""
    return torch_dist.is_available() and torch_dist.is_initialized()


@contextmanager
def group() -> Iterator[None]:
    """A process group for work without an engine, where a launcher has started several processes; nothing for one.

    On the CPU each process takes its share of the cores, unless OMP_NUM_THREADS says how many.
    """
    if world_size() == 1 or initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // _env("LOCAL_WORLD_SIZE", world_size())))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch_dist.init_process_group(backend, rank=rank(), world_size=world_size())
    try:
        yield
    finally:
        torch_dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks; nothing on one process."""
    if initialized() and world_size() > 1:
        torch_dist.barrier()


def mean(value: Tensor) -> Tensor:
    """Mean over ranks of a tensor of the same shape on each; a new tensor."""
    value = value.detach().clone()
    if initialized() and world_size() > 1:
        torch_dist.all_reduce(value)
        value /= world_size()
    return value


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; collective."""
    if not initialized() or world_size() == 1:
        return flag
    value = torch.tensor([int(flag)], device=device())
    torch_dist.all_reduce(value, op=torch_dist.ReduceOp.MAX)
    return bool(value.item())


def sums(values: Sequence[float]) -> list[float]:
    """Sums over ranks of a few numbers in double precision, the same bit by bit on all; collective."""
    if not initialized() or world_size() == 1:
        return list(values)
    held = torch.tensor(values, dtype=torch.float64, device=device())
    torch_dist.all_reduce(held)
    return held.tolist()


def from_first(value: int) -> int:
    """The number that rank 0 has; collective."""
    if not initialized() or world_size() == 1:
        return value
    held = torch.tensor([value], dtype=torch.int64, device=device())
    torch_dist.broadcast(held, 0)
    return int(held.item())


def gather(value: Tensor) -> Tensor:
    """The ranks' tensors of one shape (B, ...) one after the other, (world * B, ...), on every rank."""
    if not initialized() or world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    torch_dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def gather_rows(value: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The ranks' rows, rank r's `counts[r]` of its tensor (at least so many, ...), by rank, on every rank's CPU.

    All ranks' tensors agree in type and in all but the first axis.
    """
    if not initialized() or world_size() == 1:
        return [value[: counts[0]].cpu()]
    padded = value.new_zeros((max(counts), *value.shape[1:]))
    padded[: counts[rank()]] = value[: counts[rank()]]
    parts = gather(padded.to(device())).cpu().chunk(world_size())
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def say(message: str) -> None:
    """Print a line to standard error on rank 0."""
    if rank() == 0:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
