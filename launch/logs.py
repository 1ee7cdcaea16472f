"""The logs of all ranks as one, in the order of time."""

from __future__ import annotations

import contextlib
import heapq
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_LABEL = 2  # words before a line's text: its time, and host/start


def find(folder: Path, rank: int | None = None) -> list[Path]:
    """The rank logs of a job's folder. Raises ValueError if there are none."""
    paths = sorted(folder.rglob("rank-*.log")) if rank is None else sorted(folder.rglob(f"rank-{rank:05d}.log"))
    if not paths:
        raise ValueError(f"{folder}: no rank-*.log of `launch slurm` in there")
    return paths


def merge(paths: list[Path]) -> Iterator[str]:
    """Lines `TIME RANK@HOST/START TEXT`, oldest first; equal times by rank."""
    for stamp, rank, place, text in heapq.merge(*(_lines(path) for path in paths), key=lambda entry: entry[:2]):
        yield f"{stamp} {rank}@{place} {text}"


def follow(folder: Path, rank: int | None = None, every: float = 1.0) -> Iterator[str]:
    """What is there, then what comes, forever; lines that come within the same `every` seconds are in order."""
    seen: dict[Path, int] = {}
    while True:
        fresh: list[tuple[str, int, str]] = []
        for path in find(folder, rank):
            with path.open(encoding="utf-8", errors="replace") as file:
                file.seek(seen.get(path, 0))
                block = file.read()
            whole = block[: block.rfind("\n") + 1]
            seen[path] = seen.get(path, 0) + len(whole.encode())
            fresh += [(s, r, f"{s} {r}@{place} {text}") for s, r, place, text in map(_entry(path), whole.splitlines())]
        yield from (line for _, _, line in sorted(fresh))
        time.sleep(every)


def show(folder: Path, rank: int | None, following: bool) -> int:
    """Print the merged view."""
    lines = follow(folder, rank) if following else merge(find(folder, rank))
    with contextlib.suppress(KeyboardInterrupt):  # the usual end of following
        for line in lines:
            sys.stdout.write(line + "\n")
            if following:
                sys.stdout.flush()
    return 0


def _lines(path: Path) -> Iterator[tuple[str, int, str, str]]:
    entry = _entry(path)
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            yield entry(line.rstrip("\n"))


class _entry:
    """Splits a line of one rank's log."""

    def __init__(self, path: Path) -> None:
        self._rank = int(path.stem.split("-")[1])

    def __call__(self, line: str) -> tuple[str, int, str, str]:
        words = line.split(" ", _LABEL)
        stamp, place, text = [*words, "", ""][:3]
        return stamp, self._rank, place, text
