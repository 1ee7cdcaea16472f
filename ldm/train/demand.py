"""Pictures on demand: a file `sample-now` in the run folder makes a running training draw at its next step."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from ldm import dist

NAME = "sample-now"
SECONDS = 1.0
"""How often the file is looked for; a file system that many nodes share is asked no more often."""


class Request:
    """Whether somebody asked: rank 0 looks, at most once a second, and the ranks agree at the end of a step."""

    def __init__(self, out: Path) -> None:
        self._path = out / NAME
        self._next = 0.0

    def there(self) -> bool:
        """Whether the file is there; false on all ranks but the first."""
        if dist.rank() or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + SECONDS
        return self._path.exists()

    def done(self) -> None:
        """Remove the file, which tells that pictures are there."""
        if dist.rank() == 0:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
