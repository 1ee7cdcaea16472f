"""N processes of one command on this machine, that live and die together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from launch.job import RUN_AGAIN, LocalJob

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_POLL = 0.05
_FAIL_GRACE = 5.0  # seconds from the first failure's SIGTERM to SIGKILL
_SAVE_GRACE = 60.0  # seconds the other ranks get after one has said "saved, run me again"
_PR_SET_PDEATHSIG = 1


def run(job: LocalJob) -> int:
    """Start the job's processes, wait for all, and return the exit code of the first that failed, or 0.

    Signals in FORWARDED reach each process itself, not its children; a second SIGINT or SIGTERM kills.
    Raises ValueError if the command cannot be found or the port is taken, BrokenPipeError when nobody reads our output.
    """
    command = resolve(job.command)
    if job.port and not is_free(job.port, "127.0.0.1"):
        raise ValueError(f"--port: {job.port} is taken by another program; without --port a free one is used")
    port = job.port or _free_port()
    if job.log_dir is not None:
        job.log_dir.mkdir(parents=True, exist_ok=True)
    group = Group()
    group.forward_signals()
    try:
        for rank in range(job.procs):
            group.start(rank, command, _environment(job, rank, port), _output(job, rank, group))
        return group.wait()
    finally:
        group.close()


def resolve(command: Sequence[str]) -> list[str]:
    """The command with its program's full path, looked up on PATH and beside this Python."""
    own = Path(sys.executable).parent
    found = shutil.which(command[0]) or shutil.which(command[0], path=str(own))
    if found is None:
        raise ValueError(f"command: {command[0]!r} is neither on PATH nor in {own}")
    return [found, *command[1:]]


def exit_code(returncode: int) -> int:
    """A subprocess's return code as a shell would show it: 128 + N for a death by signal N."""
    return returncode if returncode >= 0 else 128 - returncode


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def say(message: str) -> None:
    """A line of the launcher's own on standard error."""
    sys.stderr.write(f"launch: {message}\n")
    sys.stderr.flush()


class Group:
    """Processes, each the leader of its own session, of which the first failure ends all."""

    def __init__(self, fail_grace: float = _FAIL_GRACE, save_grace: float = _SAVE_GRACE) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._pumps: list[threading.Thread] = []
        self._signals = 0
        self._interrupts = 0
        self.unread = False  # nobody reads our output any more
        self._all_started = False
        self._early: signal.Signals | None = None  # came before all were started: the rest are not
        self._fail_grace = fail_grace
        self._save_grace = save_grace

    def forward_signals(self) -> None:
        """From now on signals to this process go to the started ones."""
        for number in FORWARDED:
            signal.signal(number, self._forward)

    def start(
        self, rank: int, command: Sequence[str], env: dict[str, str], sink: Callable[[bytes], None] | None
    ) -> None:
        """Start one process; its output goes to `sink` by chunks of whole lines, or where ours goes if None."""
        if self._early is not None:
            return
        pipe = None if sink is None else subprocess.PIPE
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=None if sink is None else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        self._processes[rank] = process
        if sink is not None and process.stdout is not None:
            thread = threading.Thread(target=_pump, args=(process.stdout, sink), daemon=True)
            thread.start()
            self._pumps.append(thread)

    def wait(self) -> int:
        """Until all have ended; the exit code of the first failure, or 0."""
        self._all_started = True
        if self._early is not None and not self._processes:
            return 128 + self._early
        first: int | None = None
        kill_at = float("inf")
        running = dict(self._processes)
        while running:
            for rank, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[rank]
                _kill_group(process)  # what it left behind, such as loader workers
                if code != 0 and first is None:
                    first = exit_code(code)
                    kill_at = time.monotonic() + self._after_first(rank, process.pid, first, list(running.values()))
            if self.unread:
                raise BrokenPipeError
            if time.monotonic() > kill_at or self._signals > 1:
                for process in running.values():
                    _kill_group(process)
            if running:
                time.sleep(_POLL)
        for thread in self._pumps:
            thread.join(timeout=2)
        return 128 + signal.SIGINT if self._interrupts > 1 else first or 0

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._processes.values():
            if process.poll() is None:
                _kill_group(process)
                process.wait()

    def _after_first(self, rank: int, pid: int, code: int, others: list[subprocess.Popen[bytes]]) -> float:
        """Tell the others that one has ended badly; the seconds they have left."""
        if code == RUN_AGAIN:  # the others are saving the same step
            return self._save_grace
        if not self._signals:
            rest = f"; stopping the other {len(others)}" if others else ""
            say(f"rank {rank} (pid {pid}) ended with exit code {code}{rest}")
        for process in others:
            _signal(process, signal.SIGTERM)
        return self._fail_grace

    def _forward(self, number: int, frame: object) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            self._signals += 1
            self._interrupts += number == signal.SIGINT
        if not self._all_started:
            self._early = signal.Signals(number)
        for process in list(self._processes.values()):
            _signal(process, signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number))


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the process alone: children without a handler (loader workers, compilers) would die of it."""
    if process.poll() is None:
        process.send_signal(number)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """In the child before exec: if the launcher is killed with -9, so are the ranks."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(job: LocalJob, rank: int, port: int) -> dict[str, str]:
    env = dict(os.environ)
    env.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.procs),
        LOCAL_WORLD_SIZE=str(job.procs),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if job.threads or "OMP_NUM_THREADS" not in env:
        env["OMP_NUM_THREADS"] = str(job.threads or max(1, cores() // job.procs))
    return env


def is_free(port: int, host: str = "") -> bool:
    """Whether nobody listens on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _output(job: LocalJob, rank: int, group: Group) -> Callable[[bytes], None] | None:
    """Rank 0 keeps the terminal (progress bars); the others' lines carry a prefix; all go to files if asked."""
    if job.log_dir is None and rank == 0:
        return None
    log = None if job.log_dir is None else (job.log_dir / f"rank-{rank}.log").open("ab", buffering=0)
    prefix = b"" if rank == 0 else b"[%d] " % rank

    def sink(lines: bytes) -> None:
        if log is not None:
            log.write(lines)
        shown = b"".join(prefix + line for line in lines.splitlines(keepends=True)) if prefix else lines
        if group.unread:
            return
        try:
            sys.stderr.buffer.write(shown)
            sys.stderr.buffer.flush()
        except BrokenPipeError:
            group.unread = True

    return sink


def _pump(source: IO[bytes], sink: Callable[[bytes], None]) -> None:
    """Copy up to each end of line (or carriage return), so that ranks' lines do not mix."""
    rest = b""
    while chunk := source.read1(65536):  # type: ignore[attr-defined]
        rest += chunk
        end = max(rest.rfind(b"\n"), rest.rfind(b"\r")) + 1
        if end:
            sink(rest[:end])
            rest = rest[end:]
    if rest:
        sink(rest + b"\n")
