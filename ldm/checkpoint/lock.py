"""One run folder, one writer: a lock that survives a crashed owner and stops one that was cut off.

The lock is a lease. The owner proves in `check()`, right before it publishes a file, that the folder is still its own;
whoever takes the folder over from an owner that is not provably dead first replaces the lock, then waits one lease.
So an owner that passed its check has at least a lease's time to publish, and one that comes back after a cut network,
a suspended machine or a slow disk finds another's name in the lock and may not write. Files in the folder:
`lock.json`, replaced by claimants only, and `lock-TOKEN.beat`, rewritten by its owner as a sign of life.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

LEASE = 20.0


class RunLocked(ValueError):
    """Another process is running in this folder."""


class LockLost(RuntimeError):
    """The folder belongs to another process now: nothing may be written any more."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lock, as far as others need to know to tell whether it is dead or superseded."""

    token: str
    job: str  # SLURM's job number, "" without
    start: int  # how often SLURM started the job before
    host: str
    machine: str  # boot id and process namespace: process numbers mean the same within it
    pid: int
    born: str  # the process's start time: process numbers come again

    @staticmethod
    def me() -> Owner:
        """This process."""
        return Owner(
            token=uuid.uuid4().hex,
            job=os.environ.get("SLURM_JOB_ID", ""),
            start=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            born=_born(os.getpid()),
        )

    def is_dead(self) -> bool:
        """Whether its death is certain: seen from the same machine only."""
        return bool(self.machine) and self.machine == _machine() and _born(self.pid) != self.born

    def is_superseded_by(self, other: Owner) -> bool:
        """Whether SLURM started the same job again: it holds the old start for dead, which need not be true."""
        return bool(self.job) and self.job == other.job and self.start < other.start

    @property
    def is_here(self) -> bool:
        """Whether its process number is one of this machine's."""
        return bool(self.machine) and self.machine == _machine()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (SLURM job {self.job})" if self.job else "")


def owner_of(folder: Path) -> Owner | None:
    """Who holds the lock of a run folder, None where nobody does or its death is certain."""
    owner = RunLock(folder)._read()
    return None if owner is None or owner.is_dead() else owner


class RunLock:
    """The lock of a run folder, held between `acquire()` and `release()`; for rank 0 alone.

    `lease` in seconds must be far above the time between `check()` and the end of the rename that it guards, and
    below what one is ready to wait after a crash of another machine.
    """

    def __init__(self, folder: Path | str, lease: float = LEASE) -> None:
        if lease <= 0:
            raise ValueError(f"lease: must be above 0 seconds, got {lease}")
        self.folder = Path(folder)
        self._path = self.folder / "lock.json"
        self._lease = lease
        self._owner: Owner | None = None
        self._lost = False
        self._stop = threading.Event()
        self._beater: threading.Thread | None = None

    @property
    def token(self) -> str:
        """Unique to this holder: put it into temporary names, so that two writers never share one.

        Raises LockLost if the lock is not held.
        """
        if self._owner is None:
            raise LockLost(f"{self.folder}: the lock is not held")
        return self._owner.token

    def acquire(self) -> RunLock:
        """Take the folder, at once if it is free or its owner is known to be dead, else after one lease of silence.

        Raises RunLocked if the owner shows life during that time, or another claimant was first.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        me = Owner.me()
        wait = self._claim(me)
        if wait:  # the owner may have passed a check just before the claim
            time.sleep(self._lease)
        now = self._read()
        if now is None or now.token != me.token:
            raise RunLocked(f"{self.folder}: {now or 'another process'} was faster")
        for old in self.folder.glob("lock-*.beat*"):
            if me.token not in old.name:
                old.unlink(missing_ok=True)
        self._owner, self._lost = me, False
        self._stop.clear()
        self._beat()
        self._beater = threading.Thread(target=self._keep_beating, name="run-lock", daemon=True)
        self._beater.start()
        return self

    def check(self) -> None:
        """Raise LockLost unless the folder is ours, for at least a lease's time from now; call it before publishing."""
        if self._owner is None:
            raise LockLost(f"{self.folder}: the lock is not held")
        if not self._lost:
            self._beat()  # changes the folder, so that a network file system looks at the server again
            now = self._read()
            self._lost = now is None or now.token != self._owner.token
        if self._lost:
            raise LockLost(
                f"{self.folder}: taken over by {self._read() or 'someone'}; this process may not write any more"
            )

    def release(self) -> None:
        """Give the folder up; nothing if it is not held."""
        if self._owner is None:
            return
        self._stop.set()
        if self._beater is not None:
            self._beater.join()
        with contextlib.suppress(OSError), self._guard():
            now = self._read()
            if now is not None and now.token == self._owner.token:
                self._path.unlink()
            self._beat_path(self._owner).unlink(missing_ok=True)
        self._owner = None

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _claim(self, me: Owner) -> bool:
        """Write our name over that of a dead or silent owner; whether it could still be at work."""
        while True:
            found = self._read()
            alive = found is not None and not found.is_dead()
            if found is not None and alive and not found.is_superseded_by(me):
                self._watch(found)
            with self._guard():
                if self._read() != found:  # released, or another claimant's
                    continue
                temporary = self._path.with_name(f"lock-{me.token}.new")
                _write(temporary, json.dumps(asdict(me)) + "\n")
                os.replace(temporary, self._path)
                return alive

    def _watch(self, owner: Owner) -> None:
        """Until it gives up the lock or was silent for one lease; raise RunLocked at the first sign of life.

        By our clock alone: those of hosts differ.
        """
        wait = f"waits up to {2 * self._lease:g} s for a sign of life"
        sys.stderr.write(f"{self.folder}: locked by {owner}, who may be dead; {wait}\n")
        sys.stderr.flush()
        before = self._pulse(owner)
        end = time.monotonic() + self._lease
        while time.monotonic() < end and self._read() == owner:
            if self._pulse(owner) != before:
                raise RunLocked(f"{self.folder}: in use by {owner}")
            time.sleep(min(0.2, self._lease / 8))

    def _read(self) -> Owner | None:
        """The owner written in the lock; None if there is no lock, or one that cannot be understood."""
        try:
            return Owner(**json.loads(self._path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _pulse(self, owner: Owner) -> str:
        try:
            return self._beat_path(owner).read_text()
        except OSError:
            return ""

    def _beat_path(self, owner: Owner) -> Path:
        return self.folder / f"lock-{owner.token}.beat"

    def _beat(self) -> None:
        assert self._owner is not None
        path = self._beat_path(self._owner)
        temporary = path.with_name(f"{path.name}.{threading.get_ident()}")
        _write(temporary, f"{time.time()}\n")
        os.replace(temporary, path)

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._lease / 4):
            with contextlib.suppress(OSError):  # a disk that is away: the next `check` will tell
                now = self._read()
                if now is None or self._owner is None or now.token != self._owner.token:
                    self._lost = True
                    return
                self._beat()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Claimants one after the other, where the file system can lock; elsewhere the last to claim wins."""
        if sys.platform == "win32":
            yield
            return
        import fcntl

        with (self.folder / "lock.guard").open("a") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _machine() -> str:
    """The same for processes that see each other's process numbers; "" where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process started, in ticks since the boot; "" if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
