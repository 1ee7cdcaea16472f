"""Many pictures over several processes: each rank describes its parts, rank 0 gets the rows of all.

Pictures are known by their global index, and a part is the same pictures in the same batch whoever draws it, so that
the figures do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import dist

Rows = dict[str, Tensor]
"""By name, tensors with one row a picture."""


@dataclass(frozen=True)
class Parts:
    """A folder where finished parts wait, so that a stopped run goes on; shared by all nodes of a job.

    A file is named by the split, the pictures' global indices, and the hash of `settings`: all that the rows depend
    on. So ranks, jobs and other settings never write the same one.
    """

    folder: Path
    split: str
    settings: Mapping[str, Any]

    def path(self, part: range) -> Path:
        """The file of a part's rows."""
        return self.folder / f"{self.split}-{part.start:06d}-{part.stop:06d}-{self._key()}.safetensors"

    def picture(self, index: int) -> Path:
        """The file of one picture."""
        return self.folder / f"{self.split}-{index:06d}-{self._key()}.png"

    def _key(self) -> str:
        told = json.dumps(self.settings, sort_keys=True, default=str).encode()
        return hashlib.blake2b(told, digest_size=8).hexdigest()

    def read(self, part: range) -> Rows | None:
        """Rows of a finished part, or None."""
        path = self.path(part)
        return load_file(path) if path.is_file() else None

    def write(self, part: range, rows: Rows) -> None:
        """Leave a part's rows whole or not at all."""
        path = self.path(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        save_file({k: v.contiguous() for k, v in rows.items()}, beside)
        beside.replace(path)

    def remove(self, total: int, size: int) -> None:
        """Delete the files of all parts of `size` and of their pictures, and the folder if nothing else is in it."""
        for part in split(total, size):
            self.path(part).unlink(missing_ok=True)
            for index in part:
                self.picture(index).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def split(total: int, size: int) -> list[range]:
    """Consecutive parts of `size` pictures; the last may be smaller."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def described(total: int, size: int, describe: Callable[[range], Rows], parts: Parts | None = None) -> Rows:
    """`describe`'s rows of `total` pictures in their order, on every rank's CPU; collective.

    Parts of `size` go round the ranks. A rank that fails ends all: the others wait for it, and its launcher sees it.
    """
    every = split(total, size)
    world, own = dist.world_size() if dist.initialized() else 1, every
    if world > 1:
        own = every[dist.rank() :: world]
    found = [_one(part, describe, parts) for part in own]
    if not found:  # fewer parts than ranks: only the rows' shapes are needed
        found = [describe(every[0])]
    rows = {name: torch.cat([f[name] for f in found]) for name in found[0]}
    counts = [sum(map(len, every[r::world])) for r in range(world)]
    order = torch.tensor([i for r in range(world) for part in every[r::world] for i in part])
    out = {}
    for name in sorted(rows):
        joined = torch.cat(dist.gather_rows(rows[name], counts))
        out[name] = torch.empty_like(joined)
        out[name][order] = joined
    return out


def _one(part: range, describe: Callable[[range], Rows], parts: Parts | None) -> Rows:
    found = None if parts is None else parts.read(part)
    if found is None:
        found = describe(part)
        if parts is not None:
            parts.write(part, found)
    return found


def on_first_told(what: Callable[[], bool]) -> bool:
    """What rank 0 finds, on all ranks; its ValueError ends all of them. Collective."""
    answer, problem = False, None
    if dist.rank() == 0:
        try:
            answer = what()
        except ValueError as error:
            problem = error
    told = dist.from_first(2 if problem is not None else int(answer))
    if told == 2:
        raise problem or ValueError("stopped; rank 0 tells why")
    return bool(told)
