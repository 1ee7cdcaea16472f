"""The queue of trainings: files in the runs folder, and a process of its own that works them off one by one.

`python -m ldm.web.studio.queue RUNS` is that process. It starts each as `python -m launch local -- ldm ...` and writes
how it ended, so that nothing depends on the page: a studio that is started again reads the same files. A job is
`.studio/jobs/NUMBER.STATE.json`; a state follows another by renaming.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from ldm.web.studio.words import last_line, program, shown

if TYPE_CHECKING:
    from ldm.checkpoint.lock import Owner

State = Literal["waiting", "running", "ended"]
AGAIN = 75
"""Exit code of a run that was told to stop and saved."""
STOPPED = (AGAIN, 130, 143, 128 + signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command of `ldm`, the run folder that it trains in, and what became of it.

    `pid` and `born` are the launcher's; `code` is its exit code.
    """

    number: int
    state: State
    argv: tuple[str, ...]
    run: str
    added: float
    cwd: str = "."
    pid: int = 0
    born: str = ""
    code: int | None = None

    @property
    def command(self) -> str:
        """As it is typed."""
        return shown(self.argv)

    @property
    def alive(self) -> bool:
        """Whether its launcher runs."""
        return self.state == "running" and self.pid > 0 and _born(self.pid) == self.born != ""

    @property
    def told(self) -> str:
        """What became of it, in a word or two."""
        if self.state == "waiting":
            return "waiting"
        if self.state == "running":
            return "running" if self.alive or not self.pid else "ended"
        return "finished" if self.code == 0 else "stopped" if self.code in STOPPED else "failed"


class Queue:
    """The jobs of a runs folder."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.folder = runs / ".studio"
        self._workers: list[subprocess.Popen[bytes]] = []

    # --- files --------------------------------------------------------------------------------------------------------
    def _path(self, number: int, state: str) -> Path:
        return self.folder / "jobs" / f"{number:04d}.{state}.json"

    def log(self, job: Job) -> Path:
        """What its processes printed."""
        return self.folder / "jobs" / f"{job.number:04d}.log"

    def jobs(self) -> list[Job]:
        """All, the oldest first."""
        found = {}
        for path in sorted((self.folder / "jobs").glob("*.json")):
            number, state, *_ = path.name.split(".")
            with contextlib.suppress(OSError, ValueError, TypeError):  # renamed meanwhile, or another program's
                told = json.loads(path.read_text(encoding="utf-8"))
                found[int(number)] = Job(**{**told, "state": state, "argv": tuple(told["argv"])})
        return [found[number] for number in sorted(found)]

    def of(self, run: Path) -> Job | None:
        """The newest job of a run folder."""
        return next((job for job in reversed(self.jobs()) if Path(job.run) == run), None)

    def _put(self, job: Job) -> None:
        path = self._path(job.number, job.state)
        part = path.with_suffix(f".tmp-{os.getpid()}")
        part.write_text(json.dumps(asdict(job)) + "\n", encoding="utf-8")
        os.replace(part, path)

    # --- what the page does -------------------------------------------------------------------------------------------
    def add(self, argv: Sequence[str], run: Path) -> Job:
        """Queue a command, and see that somebody works. Raises ValueError where the run waits or runs already."""
        for job in self.jobs():
            if Path(job.run) == run and (job.state == "waiting" or job.alive):
                raise ValueError(f"{run.name}: is {job.told} already; take another name")
        (self.folder / "jobs").mkdir(parents=True, exist_ok=True)
        number = max((job.number for job in self.jobs()), default=0)
        while True:
            number += 1
            mark = self.folder / "jobs" / f"{number:04d}.log"
            with contextlib.suppress(FileExistsError):
                mark.touch(exist_ok=False)
                break
        job = Job(number=number, state="waiting", argv=tuple(argv), run=str(run), added=time.time(), cwd=os.getcwd())
        self._put(job)
        self.work()
        return job

    def remove(self, number: int) -> None:
        """Take a waiting job out. Raises ValueError where it does not wait any more."""
        try:
            self._path(number, "waiting").rename(self._path(number, "waiting").with_suffix(".removed"))
        except FileNotFoundError:
            raise ValueError(f"job {number}: does not wait any more") from None

    def stop(self, run: Path, owner: Owner | None) -> str:
        """Tell what trains in a run folder to save and end. Raises ValueError where nothing does.

        `owner`: who holds the folder's lock, for a run that was started otherwise.
        """
        job = self.of(run)
        if job is not None and job.alive:
            os.kill(job.pid, signal.SIGTERM)
            return f"kill -TERM {job.pid}"
        if owner is not None and owner.is_here:
            os.kill(owner.pid, signal.SIGTERM)
            return f"kill -TERM {owner.pid}"
        if owner is not None:
            raise ValueError(f"{run.name}: trains as {owner}, not on this machine; stop it there")
        raise ValueError(f"{run.name}: does not train now")

    def problem(self, job: Job) -> str:
        """The last line that a failed job said."""
        with contextlib.suppress(OSError):
            text = self.log(job).read_text(encoding="utf-8", errors="replace")[-4000:]
            return last_line("\n".join(line for line in text.splitlines() if not line.startswith("launch: ")))
        return ""

    def work(self) -> None:
        """Start the worker where jobs wait and none works."""
        self._workers = [worker for worker in self._workers if worker.poll() is None]
        if not any(job.state == "waiting" for job in self.jobs()):
            return
        with self._only() as mine:
            if not mine:
                return
        with (self.folder / "worker.log").open("ab") as log:
            command = [sys.executable, "-m", "ldm.web.studio.queue", str(self.runs)]
            how = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            self._workers.append(subprocess.Popen(command, **how))  # type: ignore[call-overload]

    # --- what the worker does -----------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _only(self) -> Iterator[bool]:
        """Whether nobody else works; if so nobody else does inside."""
        import fcntl

        with (self.folder / "worker.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True

    def drain(self) -> None:
        """Work off all that waits, unless somebody else does."""
        while any(job.state == "waiting" for job in self.jobs()):
            with self._only() as mine:
                if not mine:
                    return
                while any(job.alive for job in self.jobs()):  # of a worker that was killed
                    time.sleep(1)
                while (job := next((j for j in self.jobs() if j.state == "waiting"), None)) is not None:
                    self._run(job)

    def _run(self, job: Job) -> None:
        try:
            self._path(job.number, "waiting").rename(self._path(job.number, "running"))
        except FileNotFoundError:  # removed
            return
        command = [sys.executable, "-m", "launch", "local", "--", *program(job.argv)]
        with self.log(job).open("ab") as log:
            log.write(f"$ {job.command}\n".encode())
            log.flush()
            process = subprocess.Popen(command, cwd=job.cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        told = {**asdict(job), "pid": process.pid, "born": _born(process.pid)}
        self._put(Job(**{**told, "state": "running"}))
        code = process.wait()
        self._put(Job(**{**told, "state": "ended", "code": code if code >= 0 else 128 - code}))
        self._path(job.number, "running").unlink(missing_ok=True)


def _born(pid: int) -> str:
    """When a process started, "" where there is none: process numbers come again."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return str(process.create_time())
    return ""


def main() -> None:
    """Work off the queue of the runs folder that the command line names."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal that closes ends the studio, not what trains
    Queue(Path(sys.argv[1])).drain()


if __name__ == "__main__":
    main()
