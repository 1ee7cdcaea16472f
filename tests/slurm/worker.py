"""A stand-in for the trainer, without torch so that it starts at once, with the trainer's manners.

Steps are a sum over all ranks of numbers that depend on (step, rank); SIGTERM, SIGUSR1 or SIGUSR2 at any rank makes
all save the same step and end with exit code 75; the same command resumes. Rank 0 writes, under the run's lock.

    worker.py FOLDER STEPS [--pause SECONDS] [--every N] [--fail RANK:STEP:CODE] [--stubborn] [--child]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from ldm.checkpoint.lock import LockLost, RunLock


class Peers:
    """Sum and maximum over ranks by a star of sockets, on the rendezvous that the launcher gave."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self._files: list[Any] = []
        if self.rank == 0:
            server = socket.create_server(("", address[1]), backlog=self.world)
            self._files = [server.accept()[0].makefile("rw") for _ in range(self.world - 1)]
            return
        end = time.monotonic() + 120
        while not self._files:
            try:
                self._files = [socket.create_connection(address, timeout=None).makefile("rw")]
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def reduce(self, value: float, flag: int) -> tuple[float, int]:
        if self.rank:
            self._send(self._files[0], [value, flag])
            total, stop = self._receive(self._files[0])
            return total, stop
        values = [(value, flag), *(self._receive(file) for file in self._files)]
        answer = [math.fsum(v for v, _ in values), max(f for _, f in values)]
        for file in self._files:
            self._send(file, answer)
        return answer[0], int(answer[1])

    @staticmethod
    def _send(file: Any, message: object) -> None:
        file.write(json.dumps(message) + "\n")
        file.flush()

    @staticmethod
    def _receive(file: Any) -> Any:
        line = file.readline()
        if not line:
            raise ConnectionError("a peer is gone")
        return json.loads(line)


def say(*words: object) -> None:
    print(*words, flush=True)


def publish(folder: Path, lock: RunLock, step: int, state: float, losses: list[float]) -> None:
    temporary = folder / f"checkpoint-{lock.token}"
    temporary.write_text(json.dumps({"step": step, "state": state, "losses": losses}))
    lock.check()
    os.replace(temporary, folder / "checkpoint.json")
    with (folder / "published").open("a") as file:
        file.write(f"{time.time()} {lock.token} {step}\n")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--fail", default="")
    parser.add_argument("--stubborn", action="store_true", help="rank 0 goes on to write when its peers are gone")
    parser.add_argument("--child", action="store_true", help="every rank has a child that signals would kill")
    options = parser.parse_args()
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:  # the launcher sends SIGTERM in its place
            signal.signal(number, lambda n, _: stop.append(n))
    child = subprocess.Popen(["sleep", "1000"]) if options.child else None
    return train(options, stop, child)


def train(options: argparse.Namespace, stop: list[int], child: subprocess.Popen[bytes] | None) -> int:
    peers = Peers()
    lock = RunLock(options.folder, lease=3).acquire() if peers.rank == 0 else None
    checkpoint = options.folder / "checkpoint.json"
    peers.reduce(0, 0)
    saved = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "state": 1.0, "losses": []}
    step, state, losses = saved["step"], saved["state"], saved["losses"]
    fail_rank, fail_step, fail_code = map(int, (options.fail or "-1:-1:0").split(":"))
    say(f"start at step {step}, rank {peers.rank} of {peers.world}")
    while step < options.steps:
        time.sleep(options.pause)
        if (fail_rank, fail_step) == (peers.rank, step):
            say("something is wrong here")
            return fail_code
        try:
            total, stopping = peers.reduce((step * 31 % 17) / (peers.rank + 1) * state, len(stop))
        except (ConnectionError, OSError):
            if not options.stubborn or lock is None:
                raise
            return haunt(options.folder, lock, step, state, losses)
        state = 0.9 * state + 0.001 * total
        losses.append(state)
        step += 1
        if lock is not None and (stopping or step % options.every == 0 or step == options.steps):
            publish(options.folder, lock, step, state, losses)
        if stopping:
            alive = child is None or child.poll() is None
            say(f"saved step {step} after {[signal.Signals(n).name for n in stop]}, child alive {alive}")
            if lock is not None:
                lock.release()
            return 75
    say(f"done at step {step}")
    if lock is not None:
        lock.release()
    return 0


def haunt(folder: Path, lock: RunLock, step: int, state: float, losses: list[float]) -> int:
    """What a rank on a cut-off node would do at its worst: write on, as fast as it can."""
    while True:
        try:
            publish(folder, lock, step, state, losses)
        except LockLost as error:
            (folder / "stopped").write_text(f"{time.time()} {error}")
            return 1
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
