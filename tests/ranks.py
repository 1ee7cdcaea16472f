"""Run a function on several gloo ranks, forked from one server that has imported torch and DeepSpeed: about a second.

The function must be importable (at the top of a test module). What it returns comes back as a list by rank.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def _rank(function: Callable[..., Any], rank: int, world: int, store: str, queue: Any, args: tuple[Any, ...]) -> None:
    import torch.distributed as torch_dist

    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # DeepSpeed reads them; the store is a file
    torch.set_num_threads(1)
    try:
        torch_dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        buffer = io.BytesIO()  # tensors as bytes: a shared-memory handle would die with this process
        torch.save(function(*args), buffer)
        queue.put((rank, buffer.getvalue(), None))
        torch_dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def run(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Results by rank; raises with the traceback of the first rank that failed, or after `timeout` seconds."""
    queue = _context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes = [
            _context.Process(target=_rank, args=(function, r, world, store, queue, args)) for r in range(world)
        ]
        for process in processes:
            process.start()
        try:
            results: dict[int, Any] = {}
            end = time.monotonic() + timeout
            while len(results) < world:
                dead = [f"rank {r}: exit code {p.exitcode}" for r, p in enumerate(processes) if p.exitcode]
                try:
                    rank, value, error = queue.get(timeout=0.5)
                except Empty:
                    if dead or time.monotonic() > end:
                        raise AssertionError("; ".join(dead) or f"no result after {timeout} s") from None
                    continue
                if error is not None:
                    raise AssertionError(f"rank {rank} of {world}:\n{error}")
                results[rank] = torch.load(io.BytesIO(value), weights_only=False)
            return [results[r] for r in range(world)]
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()
