"""One rank inside an srun step: SLURM's variables become torch's, signals reach the rank alone, lines get logged.

Everything is derived from the step's own environment: in the batch script SLURM_NODEID is always 0, and
SLURM_LAUNCH_NODE_IPADDR is the host that submitted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, NamedTuple

from launch import hostlist, local
from launch.job import RUN_AGAIN

_STOP = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
_PORTS = range(10000, 30000)  # below Linux's ephemeral ports
_TAIL = 20
_READ = 0.1  # seconds for its last lines to be read
_SETTLE = 0.5  # seconds in which the first failure may be told after others


def variables(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ... from the environment of an srun step.

    Raises ValueError naming the variables that are missing outside of a step, or that contradict each other.
    """
    world, per_node, node = _checked(env)
    job, step, restart = (
        _whole(f"SLURM_{n}", env.get(f"SLURM_{n}") or "0") for n in ("JOB_ID", "STEP_ID", "RESTART_COUNT")
    )
    port = _PORTS[(job * 31 + step * 7 + restart * 1009) % len(_PORTS)]
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[node]),
        "NODE_RANK": str(node),
        "MASTER_ADDR": hostlist.expand(env["SLURM_STEP_NODELIST"])[0],
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS") or _threads(env, per_node[node]),
    }


def _checked(env: Mapping[str, str]) -> tuple[int, list[int], int]:
    """The number of ranks, how many each node has, and which node this is, of variables that fit together."""
    wanted = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST")
    missing = [name for name in wanted if not env.get(name)]
    either = (("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    chosen = [next((n for n in names if env.get(n)), "") for names in either]
    missing += [names[0] for names, name in zip(either, chosen, strict=True) if not name]
    if missing:
        raise ValueError(f"{', '.join(missing)}: not set; `launch task` runs under srun")
    world, rank, local_rank, node = (
        _whole(n, env[n]) for n in (chosen[0], "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    )
    per_node = hostlist.counts(env[chosen[1]])
    if not rank < world:
        raise ValueError(f"SLURM_PROCID: {rank} is not below {chosen[0]}, {world}; is one of them left over?")
    if not node < len(per_node) or not local_rank < per_node[node]:
        told = f"SLURM_NODEID {node}, SLURM_LOCALID {local_rank}"
        raise ValueError(f"{told}: do not fit {chosen[1]}, {env[chosen[1]]!r}; is one of them left over?")
    return world, per_node, node


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name}: {text!r} is not a whole number")
    return int(text)


def fill(command: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """The command with {job} and {array} replaced by SLURM's job and array task numbers."""
    names = {"{job}": env.get("SLURM_JOB_ID", ""), "{array}": env.get("SLURM_ARRAY_TASK_ID", "")}
    filled = []
    for word in command:
        for name, value in names.items():
            word = word.replace(name, value)
        filled.append(word)
    return filled


def run(command: Sequence[str], log_dir: Path) -> int:
    """Run this rank's command; its exit code, but 0 for "run me again", which leaves a note for the batch script.

    srun would kill the other ranks at the first exit code that is not 0, while they still save.
    """
    own = variables(os.environ)
    rank, restart = int(own["RANK"]), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    log_dir.mkdir(parents=True, exist_ok=True)
    if rank == 0 and not local.is_free(int(own["MASTER_PORT"])):
        local.say(f"port {own['MASTER_PORT']} of {own['MASTER_ADDR']} is taken; asking for another start")
        _note(log_dir / f"again-{restart}", "port")
        return 0
    child = _Child()
    log, here = _Log(log_dir, rank, restart), socket.gethostname()

    def ended(code: int) -> None:
        if code in (0, RUN_AGAIN):
            return
        try:
            _report(log_dir, restart, _Failure(child.since(code), code, rank, here, list(child.tail)))
        except OSError as error:  # a full disk, say: the exit code is still told
            local.say(f"rank {rank} on {here} ended with exit code {code}, which could not be noted: {error}")

    code = child.run(local.resolve(fill(command, os.environ)), {**os.environ, **own}, log, ended)
    if code == RUN_AGAIN:
        _note(log_dir / f"again-{restart}", f"{rank} {here}")
        return 0
    return code


class _Failure(NamedTuple):
    """A rank that ended badly; `since` orders them."""

    since: float
    code: int
    rank: int
    host: str
    tail: list[str]


def _report(log_dir: Path, restart: int, failure: _Failure) -> None:
    """Tell of a failure, and, as the first to do so, of all that others tell within a moment blame one.

    Who takes longer to end may have failed first: its end made the others fail.
    """
    mine = log_dir / f"failed-{restart}.{failure.rank:05d}"
    beside = mine.with_suffix(f"{mine.suffix}.tmp")
    beside.write_text(json.dumps(failure), encoding="utf-8")
    beside.replace(mine)
    if not _note(log_dir / f"failing-{restart}", str(failure.rank)):
        return
    time.sleep(_SETTLE)
    told = sorted(log_dir.glob(f"failed-{restart}.[0-9]*[0-9]"))
    first = min(_Failure(*json.loads(path.read_text(encoding="utf-8"))) for path in told)
    if _note(log_dir / f"failed-{restart}", f"{first.code} {first.rank} {first.host}"):  # or this one is late
        shown = "\n  ".join(first.tail)
        local.say(f"rank {first.rank} on {first.host} ended with exit code {first.code}; its last lines:\n  {shown}")
    for path in (*told, log_dir / f"failing-{restart}"):
        path.unlink(missing_ok=True)


class _Child:
    """The rank: started with the stop signals ignored, so that what it starts itself is safe from them.

    SLURM signals every process of a step. The rank's own handler takes over from the ignored state; this wrapper
    passes SIGTERM to it alone, in place of USR1 and USR2.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = False
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self._spoke = self._ended = 0.0

    def run(self, command: Sequence[str], env: Mapping[str, str], log: _Log, ended: Callable[[int], None]) -> int:
        """Its exit code, which `ended` is told before what it left behind is waited for and killed."""
        for number in _STOP:
            signal.signal(number, self._stop)
        self._process = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_prepare,
        )
        if self._pending:
            self._process.send_signal(signal.SIGTERM)
        assert self._process.stdout is not None
        pump = threading.Thread(target=self._copy, args=(self._process.stdout, log), daemon=True)
        pump.start()
        code = local.exit_code(self._process.wait())
        self._ended = time.time()
        pump.join(timeout=_READ)
        ended(code)
        pump.join(timeout=1)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what it left behind
        pump.join(timeout=5)
        return code

    def since(self, code: int) -> float:
        """When it failed: at its last line, as a program still clears away behind it; by a signal at its end."""
        return self._ended if code > 128 or not self._spoke else min(self._spoke, self._ended)

    def _stop(self, number: int, frame: object) -> None:
        self._pending = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def _copy(self, source: IO[bytes], log: _Log) -> None:
        for raw in source:
            line = raw.decode(errors="replace").rstrip("\r\n").rsplit("\r", 1)[-1]  # the last state of a progress bar
            self.tail.append(line)
            self._spoke = time.time()
            log.write(line)


class _Log:
    """rank-N.log with the time on every line; rank 0's lines also go to the job's output."""

    def __init__(self, folder: Path, rank: int, restart: int) -> None:
        self._file = (folder / f"rank-{rank:05d}.log").open(
            "a", buffering=1, encoding="utf-8", errors="backslashreplace"
        )
        self._label = f"{socket.gethostname()}/{restart}"
        self._shown = rank == 0

    def write(self, line: str) -> None:
        now = datetime.now().isoformat(timespec="milliseconds")
        self._file.write(f"{now} {self._label} {line}\n")
        if self._shown:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


def _prepare() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    local.die_with_parent()


def _note(path: Path, text: str) -> bool:
    """Write a small file unless another rank was first."""
    try:
        with path.open("x") as file:
            file.write(f"{text} {time.time():.3f}\n")
    except FileExistsError:
        return False
    return True


def _threads(env: Mapping[str, str], local_world: int) -> str:
    given = int(env.get("SLURM_CPUS_PER_TASK") or 0)
    return str(given or max(1, local.cores() // local_world))
