"""How far long work is: a bar on a terminal, a line now and then where standard error goes to a file or a pipe."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from ldm import dist

FIRST, LONGEST = 15.0, 300.0
"""Seconds between lines: from the first, a twentieth of the time gone so far, up to the last."""

Told = Callable[[str, int, "int | None"], None]
"""(what, done, total)."""
_OWN = threading.local()


@contextmanager
def told_to(tell: Told | None) -> Iterator[None]:
    """Bars of this thread tell their progress to a function too, which may raise to end the work."""
    before, _OWN.tell = getattr(_OWN, "tell", None), tell
    try:
        yield
    finally:
        _OWN.tell = before


class Bar:
    """Progress of one piece of work, on rank 0 alone; on other ranks it says nothing.

    A context manager: its end closes the bar's line. What anybody writes to standard error meanwhile stands on lines
    of its own above the bar. TQDM_DISABLE=1 silences it.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None = None,
        *,
        start: int = 0,
        leave: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.unit, self.total, self.done = what, unit, total, start
        self._clock, self._start, self._note = clock, start, ""
        self._began = self._told = clock()
        self._lines = False
        self._tqdm: Any = None
        self._plain = self._above = None
        if dist.rank() or os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
            return
        if _terminal():
            self._plain = sys.stderr
            wide = _columns(self._plain)
            self._tqdm = tqdm(
                desc=what, unit=f" {unit}", total=total, initial=start, leave=leave, dynamic_ncols=wide > 0,
                ncols=None if wide > 0 else 80, nrows=None if wide > 0 else 24, mininterval=0.2, file=self._plain,
            )  # fmt: skip
            self._above = sys.stderr = _Above(self._plain)
        else:
            self._lines = True

    def update(self, more: int = 1) -> None:
        """So many units more are done."""
        self.done += more
        if self._tqdm is not None:
            self._tqdm.update(more)
        self._line()

    def to(self, done: int, total: int | None = None) -> None:
        """So many units are done, of so many; fewer than before begin anew."""
        if total is not None:
            self.total = total
        if done < self.done:
            self._began, self._start = self._clock(), done
        self.done = done
        if self._tqdm is not None:
            self._tqdm.total = self.total
            if done < self._tqdm.n:
                self._tqdm.n = done
                self._tqdm.refresh()
            self._tqdm.update(done - self._tqdm.n)
        self._line()

    def note(self, text: str) -> None:
        """What stands behind the figures from now on, such as the loss."""
        self._note = text
        if self._tqdm is not None:
            self._tqdm.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """End the bar's line; what comes next begins on one of its own. A second call does nothing."""
        if self._tqdm is not None:
            if sys.stderr is self._above:
                sys.stderr = self._plain
            self._tqdm.close()
            self._tqdm = None
        if self._lines and self._told > self._began and self.done != self._shown:
            self._tell()
        self._lines = False

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    _shown = -1

    def _line(self) -> None:
        if (tell := getattr(_OWN, "tell", None)) is not None:
            tell(self.what, self.done, self.total)
        if not self._lines:
            return
        now = self._clock()
        if now - self._told >= min(max(FIRST, (now - self._began) / 20), LONGEST):
            self._told = now
            self._tell()

    def _tell(self) -> None:
        self._shown = self.done
        gone = max(self._clock() - self._began, 1e-9)
        rate = (self.done - self._start) / gone
        of, left = "", ""
        if self.total:
            of = f" of {self.total}"
            if rate > 0:
                left = f", {tqdm.format_interval(max(0, self.total - self.done) / rate)} left"
        pace = f"{rate:.2f} {self.unit} a second" if rate >= 0.1 or rate == 0 else f"{1 / rate:.1f} s each"
        note = f", {self._note}" if self._note else ""
        sys.stderr.write(
            f"{self.what}: {self.done}{of} {self.unit}, {tqdm.format_interval(gone)} gone{left}, {pace}{note}\n"
        )
        sys.stderr.flush()


def line(text: str, file: TextIO | None = None) -> None:
    """Print a line, to standard output if `file` is None, without breaking into a bar that is being drawn."""
    stream: TextIO = sys.stdout if file is None else file
    if stream is sys.stderr or not isinstance(sys.stderr, _Above):
        stream.write(text + "\n")
        return
    stderr, sys.stderr = sys.stderr, sys.stderr.stream  # tqdm knows the two by what they are
    try:
        tqdm.write(text, file=stream)
    finally:
        sys.stderr = stderr


def _terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _columns(stream: TextIO) -> int:
    """The terminal's width; 0 where it has none, as in a container without a size."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except OSError:
        return 0


class _Above:
    """Standard error while a bar is drawn: each line goes above it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._rest = ""

    def write(self, text: str) -> int:
        whole, end, rest = (self._rest + text).rpartition("\n")
        self._rest = rest
        if end:
            tqdm.write(whole, file=self.stream)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
