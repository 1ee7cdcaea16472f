"""One cluster for all tests of this folder; skipped, with the reason, where none can be made."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, missing

ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).parent / "worker.py")


@pytest.fixture(scope="session")
def whole_cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(nodes=3)
    cluster.up()
    yield cluster
    cluster.down()


class Run:
    """One test's run folder, its jobs and what they left."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder / "run"
        self.logs = folder / "logs"
        self.folder.mkdir()

    def submit(self, *options: str, command: tuple[str, ...] = ()) -> str:
        """`launch slurm` on the login host; the job's number."""
        own = [sys.executable, "-m", "launch", "slurm", "--log-dir", str(self.logs), "--time", "30", *options]
        return self.cluster.run(*own, "--", *command, cwd=ROOT, OMP_NUM_THREADS="1").strip()

    def train(self, steps: int, *worker: str, options: tuple[str, ...] = (), ranks: int = 2, nodes: int = 2) -> str:
        """Submit the stand-in for the trainer, without preflight."""
        size = ("--nodes", str(nodes), "--ranks-per-node", str(ranks), "--no-preflight")
        return self.submit(*size, *options, command=("python3", WORKER, str(self.folder), str(steps), *worker))

    def output(self, job: str) -> str:
        path = self.logs / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def merged(self, job: str) -> list[str]:
        return self.cluster.run(sys.executable, "-m", "launch", "logs", str(self.logs / job), cwd=ROOT).splitlines()

    def step(self) -> int:
        path = self.folder / "checkpoint.json"
        return int(json.loads(path.read_text())["step"]) if path.exists() else 0

    def losses(self) -> list[float]:
        return json.loads((self.folder / "checkpoint.json").read_text())["losses"]

    def starts(self, job: str) -> list[int]:
        """The steps that rank 0 began at, over all starts of the job."""
        return [int(n) for n in re.findall(r"^start at step (\d+), rank 0", self.output(job), re.MULTILINE)]

    def writers(self) -> list[str]:
        """The lock tokens of those who published, each once, in order."""
        tokens = [line.split()[1] for line in (self.folder / "published").read_text().splitlines()]
        return [t for i, t in enumerate(tokens) if i == 0 or t != tokens[i - 1]]


@pytest.fixture
def run(whole_cluster: Cluster, tmp_path: Path) -> Iterator[Run]:
    yield Run(whole_cluster, tmp_path)
    whole_cluster.idle()


def undisturbed(steps: int, ranks: int = 4) -> list[float]:
    """The worker's losses, computed in one process."""
    state, losses = 1.0, []
    for step in range(steps):
        state = 0.9 * state + 0.001 * math.fsum((step * 31 % 17) / (rank + 1) * state for rank in range(ranks))
        losses.append(state)
    return losses
