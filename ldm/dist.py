"""Who am I among the processes: the only reader of RANK, WORLD_SIZE, LOCAL_RANK and their SLURM twins."""

from __future__ import annotations

import atexit
import errno
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as torch_dist
from torch import Tensor

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


JOIN_SECONDS = {True: 60.0, False: 300.0}
"""How long the ranks wait for each other at the start, on one machine and on several; LDM_JOIN_SECONDS says otherwise.
"""
_LOST = re.compile(
    r"connection (?:closed|reset)|broken pipe|socket (?:timeout|closed)|timed out|gloo|nccl|remote process exited|"
    r"recvvalue|store",
    re.IGNORECASE,
)
_store: torch_dist.Store | None = None


def _named(name: str) -> tuple[str, str] | None:
    """The variable that says it and its value; an empty one says nothing."""
    names = [name]
    if os.environ.get("LDM_RANKS_FROM_SLURM") == "1" and name in _SLURM:
        names.append(_SLURM[name])
    return next(((n, value) for n in names if (value := os.environ.get(n, "").strip())), None)


def _env(name: str, default: int) -> int:
    found = _named(name)
    if found is None:
        return default
    try:
        return int(found[1])
    except ValueError:
        raise ValueError(f"{found[0]}: {found[1]!r} is not a whole number; {_LEFT_OVER}") from None


_LEFT_OVER = (
    "a launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT together: unset what is left over, "
    "or start with python -m launch"
)


def check(*, meeting: bool = True) -> None:
    """Raise ValueError unless the variables of the process group fit together; names the one that does not.

    Without `meeting` the ranks only share work and need no place to meet.
    """
    world, own, local = world_size(), rank(), local_rank()
    if world < 1:
        raise ValueError(f"WORLD_SIZE: must be at least 1, got {world}; {_LEFT_OVER}")
    for name, value in (("RANK", own), ("LOCAL_RANK", local)):
        if value and _named("WORLD_SIZE") is None:
            raise ValueError(f"{name} is {value}, but WORLD_SIZE is not set; {_LEFT_OVER}")
        if not 0 <= value < world:
            raise ValueError(f"{name}: {value} is not in [0, {world - 1}], as WORLD_SIZE is {world}; {_LEFT_OVER}")
    if torch.cuda.is_available() and local >= torch.cuda.device_count():
        raise ValueError(f"LOCAL_RANK: {local}, but this machine has {torch.cuda.device_count()} GPUs; {_LEFT_OVER}")
    if (beside := local_world_size()) <= local:
        raise ValueError(f"LOCAL_RANK: {local} is not below LOCAL_WORLD_SIZE, {beside}; {_LEFT_OVER}")
    if world == 1:
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if meeting else ("RANK",):
        if _named(name) is None:
            raise ValueError(f"{name} is not set, but WORLD_SIZE is {world}; {_LEFT_OVER}")
    if meeting and not 1 <= (port := _env("MASTER_PORT", 0)) <= 65535:
        raise ValueError(f"MASTER_PORT: {port} is not in [1, 65535]; {_LEFT_OVER}")


def rank() -> int:
    """This process's global rank, 0 without a launcher."""
    return _env("RANK", 0)


def world_size() -> int:
    """How many processes take part, 1 without a launcher."""
    return _env("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's rank on its node, 0 without a launcher."""
    return _env("LOCAL_RANK", 0)


def local_world_size() -> int:
    """How many processes this node has, all of them without a launcher that tells."""
    return _env("LOCAL_WORLD_SIZE", world_size())


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
        torch.set_num_threads(max(1, cores // local_world_size()))
    join()
    try:
        yield
    finally:
        torch_dist.destroy_process_group()


def join() -> None:
    """Make the process group, of one process or of all that a launcher started.

    Raises ValueError that names the variable, the port or the ranks that did not come in time.
    """
    global _store
    check()
    world, backend = world_size(), "nccl" if torch.cuda.is_available() else "gloo"
    if world == 1:  # no port: nothing can be in the way of a run on a laptop
        torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1)
        return
    host, port = os.environ["MASTER_ADDR"].strip(), _env("MASTER_PORT", 0)
    seconds = _patience(host)
    end = time.monotonic() + seconds
    _store = store = _meet(host, port, seconds)
    store.set(f"here/{rank()}", socket.gethostname())
    told = time.monotonic() + 15
    while missing := [r for r in range(world) if not store.check([f"here/{r}"])]:
        if time.monotonic() > end:
            raise ValueError(
                f"{_ranks(missing)} of {world} did not come to {host}:{port} within {seconds:g} s; {_LONGER}"
            )
        if time.monotonic() > told and rank() == 0:
            told = float("inf")
            say(f"waiting for {_ranks(missing)} of {world} at {host}:{port}, up to {seconds:g} s")
        time.sleep(0.05)
    torch_dist.init_process_group(backend, store=torch_dist.PrefixStore("group", store), rank=rank(), world_size=world)
    if backend == "gloo":
        atexit.register(_leave)


def _leave() -> None:
    """End gloo's threads before the interpreter ends: now and then they end the process with an abort otherwise."""
    if initialized():
        torch_dist.destroy_process_group()


_LONGER = "LDM_JOIN_SECONDS is how long the ranks wait for each other; are RANK, WORLD_SIZE and the others left over?"


def _patience(host: str) -> float:
    given = os.environ.get("LDM_JOIN_SECONDS", "")
    if not given:
        return JOIN_SECONDS[host in ("127.0.0.1", "localhost", "::1")]
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(f"LDM_JOIN_SECONDS: expected seconds above 0, got {given!r}")
    return seconds


def _meet(host: str, port: int, seconds: float) -> torch_dist.Store:
    """The store of rank 0, which all reach at the port of the host; under torchrun that of its agent."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    first = rank() == 0 and not agent
    if first:
        with socket.socket() as probe:  # before torch, whose own complaint is long
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                why = (
                    "is taken by another program"
                    if error.errno == errno.EADDRINUSE
                    else f"cannot be used: {error.strerror}"
                )
                raise ValueError(f"MASTER_PORT: {port} {why}; give another") from None
    else:
        _reach(host, port, seconds)
    try:
        store = torch_dist.TCPStore(
            host, port, world_size(), is_master=first, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
        return torch_dist.PrefixStore(f"ldm {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0]
        raise ValueError(f"MASTER_ADDR {host!r}, MASTER_PORT {port}: no rendezvous: {text}") from error


def _reach(host: str, port: int, seconds: float) -> None:
    """Wait until something listens there. Raises ValueError."""
    end, why = time.monotonic() + seconds, ""
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(0.1)
    raise ValueError(
        f"rank 0 does not answer at {host}:{port} (MASTER_ADDR, MASTER_PORT) within {seconds:g} s: {why}; {_LONGER}"
    )


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"


def lost(error: BaseException, seconds: float = 5.0) -> str | None:
    """A sentence about the ranks that do not answer any more, if that is what a collective's error is about.

    Every rank that still lives asks so; who has not asked within some seconds is named.
    """
    if not isinstance(error, RuntimeError) or world_size() == 1 or not _LOST.search(str(error)):
        return None
    gone = _silent(seconds)
    if not gone:
        return None
    verb = "do" if len(gone) > 1 else "does"
    return f"rank {rank()}: {_ranks(gone)} {verb} not answer any more ({str(error).splitlines()[0][:120]})"


def _silent(seconds: float) -> list[int]:
    others = [r for r in range(world_size()) if r != rank()]
    try:
        if _store is None:
            return []
        _store.set(f"lives/{rank()}", "1")
        end = time.monotonic() + seconds
        while (gone := [r for r in others if not _store.check([f"lives/{r}"])]) and time.monotonic() < end:
            time.sleep(0.05)
        _store.set(f"told/{rank()}", "1")
        asking = [f"told/{r}" for r in others if r not in gone]
        if rank() == 0 and asking:  # the store is here: until the others have asked it too
            end += seconds
            while time.monotonic() < end and not _store.check(asking):
                time.sleep(0.05)
        return gone
    except RuntimeError:  # the store died with rank 0
        return [0] if rank() else others


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
