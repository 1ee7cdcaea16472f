"""Being told to stop: what is said, what is saved, and how a process ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ldm import dist

AGAIN = 75
"""Exit code of a run that was told to stop, saved, and should be started again (EX_TEMPFAIL)."""
INTERRUPTED = 130
"""Exit code of a run that was interrupted and saved nothing."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Stop:
    """Whether a signal asked to stop; the flag is agreed on by all ranks at a step boundary.

    The first says that the step is finished and saved; a second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interrupts = 0
        self._process = os.getpid()

    def listen(self) -> Callable[[], None]:
        """Catch SIGTERM, SIGINT and SIGUSR2; the returned call restores the old handlers."""
        return _handled(SIGNALS, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked worker: its parent says when to end
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            write("ended at once; the steps since the last checkpoint are lost")
            os._exit(INTERRUPTED)
        if not self.asked:
            how = "Ctrl-C again to end at once" if number == signal.SIGINT else signal.Signals(number).name
            write(f"stopping: finishing this step and saving ({how})")
        self.asked = True


@contextmanager
def before_training() -> Iterator[None]:
    """While models and data are made ready SIGTERM and SIGUSR2 end with code 75: nothing is lost, start again."""

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            write(f"asked to stop ({signal.Signals(number).name}) before a step was made; run the same command again")
            os._exit(AGAIN)

    process = os.getpid()
    restore = _handled((signal.SIGTERM, signal.SIGUSR2), handle)
    try:
        yield
    finally:
        restore()


def _handled(numbers: tuple[signal.Signals, ...], handler: Any) -> Callable[[], None]:
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    old = {number: signal.signal(number, handler) for number in numbers}

    def restore() -> None:
        for number, before in old.items():
            signal.signal(number, before)

    return restore


def write(text: str) -> None:
    """A line on standard error on rank 0, from a signal's handler: past Python's buffers, which may be in use."""
    if dist.rank():
        return
    with contextlib.suppress(OSError):
        begin = "\n" if os.isatty(2) else ""  # the terminal shows ^C, perhaps behind a bar
        os.write(2, f"{begin}{text}\n".encode())
