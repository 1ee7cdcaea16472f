"""Processes that try something on our behalf: each may fail, die or hang, and what it said before stays.

A child appends lines of JSON, `[key, value]`, to a file, so that what others print on its streams is not in the way.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[3]
_GRACE = 2.0
"""Seconds that a process may take to be gone after it was killed; one that waits for a dead disk or driver never is."""
_LOG = 64 * 1024
IMPORTING = "ldm-doctor-importing "
"""What is printed before a package is imported, so that what it says is known to be its own."""


@dataclass(frozen=True)
class Question:
    """A command and the seconds that it may take; `environment` is added to ours."""

    command: tuple[str, ...]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a child reported, how it ended ("" is well), the end of what it printed, and the seconds it took."""

    values: dict[str, Any]
    ended: str
    log: str
    seconds: float


def ours(*words: str, limit: float, module: str = "probes", **environment: str) -> Question:
    """A call of one of our modules, with this interpreter and this source."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = (sys.executable, "-m", f"ldm.cli.doctor.{module}", *words)
    return Question(command, limit, {"PYTHONPATH": path, **environment})


def ask(questions: Sequence[Question]) -> list[Answer]:
    """Run all at once; each ends by itself or at its limit."""
    with tempfile.TemporaryDirectory(prefix="ldm-doctor-") as folder, contextlib.ExitStack() as stack:
        children = [_Child(q, Path(folder) / str(i)) for i, q in enumerate(questions)]
        for child in children:
            stack.callback(child.end)  # also after Ctrl-C
        while any(child.running() for child in children):
            time.sleep(0.01)
        return [child.answer() for child in children]


class _Child:
    def __init__(self, question: Question, place: Path) -> None:
        self._limit, self._began, self._took = question.limit, time.monotonic(), 0.0
        self._out, self._log, self._why = place.with_suffix(".out"), place.with_suffix(".log"), ""
        self._process: subprocess.Popen[bytes] | None = None
        environment = {**os.environ, **question.environment, "LDM_DOCTOR_OUT": str(self._out)}
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    question.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            self._why = f"{question.command[0]}: {error.strerror}"

    def running(self) -> bool:
        """Whether it is; one that is past its limit is killed."""
        if self._process is None or self._took:
            return False
        self._ended_now() if self._process.poll() is not None else None
        if not self._took and time.monotonic() - self._began > self._limit:
            self._why = f"no end within {self._limit:g} s"
            self.end()
        return not self._took

    def _ended_now(self) -> None:
        self._took = max(time.monotonic() - self._began, 1e-3)

    def end(self) -> None:
        """Kill it and what it started."""
        if self._process is None or self._took:
            return
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        self._ended_now()

    def answer(self) -> Answer:
        """Once it has ended."""
        log = self._log.read_bytes()[-_LOG:].decode(errors="replace") if self._log.exists() else ""
        code = self._process.returncode if self._process is not None else 0
        why = self._why
        if not why and code:
            last = ([line.strip() for line in log.splitlines() if line.strip()] or [""])[-1]
            why = f"died of {_signal(-code)}" if code < 0 else last or f"exit code {code}"
        return Answer(_values(self._out), why, log, self._took)


def _signal(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _values(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # the last line of one that was killed
            key, value = json.loads(line)
            found[key] = value
    return found


def say(key: str, value: Any) -> None:
    """Report a value to the process that asked."""
    path = os.environ.get("LDM_DOCTOR_OUT")
    line = json.dumps([key, value])
    if path is None:
        print(line)
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def in_a_line(error: BaseException) -> str:
    """An error's kind and what it says, on one line of at most 300 characters."""
    told = " ".join(str(error).split())
    return f"{type(error).__name__}: {told}"[:300] if told else type(error).__name__
