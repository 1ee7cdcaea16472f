"""Rows in processes of their own: one that crashes or hangs is a row with its error, and the others go on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.rows import LIMITS, Row

ROOT = Path(__file__).resolve().parents[2]
START = 120.0
"""Seconds that a process may take until its first row."""
PATIENCE = 5.0
"""How many times as long all may take where only whether it runs is asked, on machines that others use too."""
Answer = dict[str, Any]


def child(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """One of our modules in a session of its own, so that it can be ended with all that it started."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and what it started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def missing(row: Row, device: str, packages: dict[str, str | None]) -> str:
    """Why a row cannot be measured here; empty if it can."""
    needs = [*row.needs, *(["triton"] if device == "cuda" and row.mode in ("blocks", "whole") else [])]
    gone = [name for name in needs if packages.get(name) is None]
    return f"{' and '.join(gone)} {'is' if len(gone) == 1 else 'are'} not installed" if gone else ""


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Neighbours of one side, which a process measures one after the other."""
    found: list[list[Row]] = []
    for row in rows:
        if found and found[-1][0].side == row.side:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def measured(
    rows: Sequence[Row], device: str, quick: bool, until: float, packages: dict[str, str | None]
) -> Iterator[tuple[Row, Answer]]:
    """Rows with their answers as they come, until the monotonic clock's `until`; every row has one."""
    reasons = {row.id: missing(row, device, packages) for row in rows}
    yield from ((row, {"status": "left out", "why": gone}) for row in rows if (gone := reasons[row.id]))
    for group in groups([row for row in rows if not reasons[row.id]]):
        left = group
        while left:
            done = 0
            for answer in _served(left, device, quick, until):
                yield left[done], answer
                done += 1
            left = left[done:]


def _served(rows: Sequence[Row], device: str, quick: bool, until: float) -> Iterator[Answer]:
    """Answers of one process, in order; at least one, its last one perhaps of how it ended."""
    if time.monotonic() >= until:
        yield from ({"status": "left out", "why": "no time was left"} for _ in rows)
        return
    with tempfile.TemporaryDirectory(prefix="ldm-gpu-") as folder:
        results, log = Path(folder) / "results", Path(folder) / "log"
        spec = {"device": device, "quick": quick, "end": until, "rows": [row.record() for row in rows]}
        process = child(["-m", "bench.gpu.worker", str(results), json.dumps(spec)], log)
        try:
            yield from _followed(process, rows, _Lines(results), log, until, PATIENCE if quick else 1.0)
        finally:
            end(process)


def _followed(
    process: subprocess.Popen[bytes], rows: Sequence[Row], lines: _Lines, log: Path, until: float, slower: float
) -> Iterator[Answer]:
    done, limit, since = 0, START, time.monotonic()
    while done < len(rows):
        ended = process.poll() is not None  # before reading: what it said last is then there
        for key, value in lines.new():
            if key == "begin":
                limit, since = LIMITS[rows[done].mode], time.monotonic()
            else:
                assert key == rows[done].id
                yield value
                done, limit, since = done + 1, START, time.monotonic()
        if done == len(rows):
            return
        if ended and not (done and process.returncode == 1):
            yield {"status": "failed", "why": why(process.returncode, log)}
            return
        if ended:
            return  # the process told what happened, and is not to go on
        late = time.monotonic() - since > slower * limit or time.monotonic() > until + 5
        if late:
            yield {"status": "failed", "why": f"no end within {time.monotonic() - since:.0f} s"}
            return
        time.sleep(0.05)


def why(code: int, log: Path) -> str:
    """How a process ended: its signal, or the last line that it said."""
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"died of {signal.Signals(-code).name}"
    return (said[-1] if said else f"exit code {code}")[:300]


class _Lines:
    """Whole lines of JSON that were added to a file since it was last asked."""

    def __init__(self, path: Path) -> None:
        self._path, self._place = path, 0

    def new(self) -> list[tuple[str, Any]]:
        """As (key, value)."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._place)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._place += len(whole)
        return [tuple(json.loads(line)) for line in whole.splitlines()]


def to_file(words: Sequence[str], path: Path, limit: float, *, tell: Callable[[str], object]) -> Any:
    """What one of our modules writes to `path`, or None, with the reason told, where it does not end well in time."""
    log = path.with_suffix(".log")
    process = child(words, log)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        tell(f"no end within {limit:.0f} s")
        return None
    finally:
        end(process)
    if code or not path.exists():
        tell(why(code, log))
        return None
    return json.loads(path.read_text(encoding="utf-8"))
