"""What is to be started: frozen descriptions of jobs, validated, and the exit codes that they end with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUN_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: the command saved its state and wants to be started again."""


@dataclass(frozen=True, kw_only=True)
class LocalJob:
    """N processes of one command on this machine."""

    command: tuple[str, ...]
    procs: int = 1
    port: int = 0  # of the rendezvous; 0 takes a free one
    threads: int = 0  # OMP_NUM_THREADS of a process; 0 shares the cores out
    log_dir: Path | None = None

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError("command: nothing to start; write it after --, such as -- ldm train CONFIG")
        if self.procs < 1:
            raise ValueError(f"procs: must be at least 1, got {self.procs}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: must be in 0..65535, got {self.port}")
        if self.threads < 0:
            raise ValueError(f"threads: must be at least 0, got {self.threads}")
