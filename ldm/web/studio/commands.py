"""Commands of `ldm` as the studio runs them in its own process, where models stay loaded."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from ldm import progress
from ldm.web.studio.words import last_line, shown

Main = Callable[[list[str]], int]


@dataclass(frozen=True)
class Said:
    """What a command printed, and what it said beside (standard error)."""

    out: str
    notes: str

    @property
    def lines(self) -> list[str]:
        """Of `out`."""
        return [line for line in self.out.splitlines() if line.strip()]


class Commands:
    """`main` runs a command in this process: it raises ValueError for users' mistakes."""

    def __init__(self, main: Main) -> None:
        self._main = main

    def here(self, argv: Sequence[str], progress_to: progress.Told | None = None) -> Said:
        """Run in this process. Raises ValueError with what the command says is wrong."""
        with captured() as (out, err), progress.told_to(progress_to):
            code = self._main(list(argv))
        notes = err.getvalue()
        if code not in (0, 130):
            raise ValueError(last_line(notes) or f"{shown(argv)}: ended with exit code {code}")
        return Said(out.getvalue(), notes)


class _ByThread:
    """A standard stream that takes a thread's own text aside while that thread captures it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.own = threading.local()

    def write(self, text: str) -> int:
        own = getattr(self.own, "buffer", None)
        return (self.stream if own is None else own).write(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return getattr(self.own, "buffer", None) is None and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What this thread writes to standard output and standard error; other threads' text goes where it went."""
    out, err = io.StringIO(), io.StringIO()
    if not isinstance(sys.stdout, _ByThread):
        sys.stdout = _ByThread(sys.stdout)  # type: ignore[assignment]
    if not isinstance(sys.stderr, _ByThread):
        sys.stderr = _ByThread(sys.stderr)  # type: ignore[assignment]
    streams = [(sys.stdout, out), (sys.stderr, err)]
    for stream, buffer in streams:
        assert isinstance(stream, _ByThread)
        stream.own.buffer = buffer
    try:
        yield out, err
    finally:
        for stream, _ in streams:
            stream.own.buffer = None  # type: ignore[attr-defined]
