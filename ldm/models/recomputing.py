"""Whether code runs for the first time or again, for the backward pass, where gradient checkpointing runs it twice."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Run(enum.Enum):
    """Which run of code it is that is computed again in the backward pass: PLAIN where it is not."""

    PLAIN = 0
    FIRST = 1
    AGAIN = 2


class _Running(threading.local):
    now = Run.PLAIN


RUN = _Running()


class Twice:
    """A step that tells, by `RUN`, whether it runs for the first time or again."""

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step, self._next = step, Run.FIRST

    def __call__(self, *args: Any) -> Tensor:
        before, RUN.now, self._next = RUN.now, self._next, Run.AGAIN
        try:
            return self._step(*args)
        finally:
            RUN.now = before
