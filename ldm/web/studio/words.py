"""Commands of `ldm` as words: how they are typed, started and end; imports nothing."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence


def shown(argv: Sequence[str]) -> str:
    """The command as it is typed."""
    return shlex.join(["ldm", *argv])


def program(argv: Sequence[str]) -> list[str]:
    """The command for a process of its own."""
    return [sys.executable, "-m", "ldm.cli", *argv]


def last_line(text: str) -> str:
    """The last line that says something, without `ldm VERB: ` before it."""
    line = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    head, colon, rest = line.partition(": ")
    return rest if colon and head.startswith(("ldm ", "launch ")) else line
