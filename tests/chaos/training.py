"""`ldm train` on two ranks that can be killed at any moment, forked so that a start takes little."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ldm.checkpoint import files
from tests import miniature

WORLD = 2
LIMIT = 800.0
"""Seconds that any one wait may take."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.chaos.preload"])


def _rank(rank: int, store: str, arguments: list[str], said: str) -> None:
    handle = os.open(said, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHDYNAMO_DISABLE": "1"}
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    from ldm.cli.__main__ import main

    code = 1
    try:
        code = main(["train", *arguments])
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a peer that is gone must not hold the end up


class Training:
    """One run folder, started again and again."""

    def __init__(self, config: Path, out: Path, scratch: Path) -> None:
        self.config, self.out, self._scratch = config, out, scratch
        self.starts = 0
        self._ranks: list[BaseProcess] = []
        self._scratch.mkdir(parents=True, exist_ok=True)

    def start(self, *overrides: str) -> None:
        """Begin on all ranks."""
        self.starts += 1
        arguments = [str(self.config), f"out={self.out}", *overrides]
        store = str(self._scratch / f"store-{self.starts}")
        said = str(self._scratch / f"said-{self.starts}")
        self._ranks = [_context.Process(target=_rank, args=(r, store, arguments, said)) for r in range(WORLD)]
        for process in self._ranks:
            process.start()

    def kill(self, victims: Sequence[int]) -> bool:
        """`kill -9` of some ranks at once; whether the others ended by themselves (else they are killed after 20 s)."""
        for rank in victims:
            pid = self._ranks[rank].pid
            assert pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 20
        for process in self._ranks:
            process.join(timeout=max(0.1, end - time.monotonic()))
        stuck = [p for p in self._ranks if p.is_alive()]
        for process in stuck:
            process.kill()
            process.join()
        return not stuck

    def wait(self) -> list[int | None]:
        """Until all ranks have ended; their exit codes."""
        end = time.monotonic() + LIMIT
        for process in self._ranks:
            process.join(timeout=max(0.1, end - time.monotonic()))
        for process in self._ranks:
            if process.is_alive():
                process.kill()
                process.join()
        return [p.exitcode for p in self._ranks]

    def ended(self) -> bool:
        """Whether a rank has."""
        return any(p.exitcode is not None for p in self._ranks)

    def said(self) -> str:
        """What the last start printed."""
        path = self._scratch / f"said-{self.starts}"
        return path.read_text(errors="replace") if path.exists() else ""

    def resumed(self) -> int:
        """The step that the last start went on from."""
        found = re.search(r"resuming from \S+ at step (\d+)", self.said())
        return int(found.group(1)) if found else 0

    def rows(self) -> list[dict[str, Any]]:
        """The log; a line that was cut off is left out."""
        path = self.out / "log" / "metrics.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def step(self) -> int:
        """The last one in the log; only its end is read, as this is asked while the ranks compute."""
        path = self.out / "log" / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            for line in reversed(file.read().decode(errors="replace").splitlines()):
                with contextlib.suppress(ValueError):
                    if isinstance(row := json.loads(line), dict):
                        return int(row["step"])
        return 0

    @property
    def checkpoints(self) -> Path:
        """Their folder."""
        return self.out / "checkpoints"

    def writing(self) -> bool:
        """Whether a checkpoint is being written at this moment."""
        return any(self.checkpoints.glob(".step-*.tmp"))

    def whole(self) -> list[int]:
        """Steps of undamaged checkpoints."""
        return [s for s in files.steps(self.checkpoints) if files.damage(self.checkpoints / f"step-{s}") is None]


def config(root: Path, steps: int, every: int = 1) -> Path:
    """The miniature project below `root` (made if it is not there) and a config that saves every few steps."""
    if not (root / "data").is_dir():
        miniature.project(root)
    tree = miniature.text_to_image(root, cache=str(root / "cache"))
    tree["task"]["samples"] = {"prompts": [], "every": 100000}
    tree["train"] = miniature.train(steps=steps, checkpoint={"every": every, "keep": 3})
    return miniature.write(tree, root / f"config-{steps}.yaml")
