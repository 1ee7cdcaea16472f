"""One run folder, one run: a second start is refused, a crashed owner is followed, a lost lock publishes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoint.lock import LockLost, RunLock
from ldm.objectives import Objective
from ldm.recipes import run as recipe
from ldm.recipes.base import Assembly
from ldm.rng import Rng
from ldm.train.engine_config import EngineConfig
from ldm.train.log import LogConfig
from ldm.train.trainer import CheckpointConfig, TrainConfig, Trainer
from ldm.types import Batch, Metrics

CONFIG = TrainConfig(
    steps=6,
    batch=1,
    engine=EngineConfig(zero_stage=1, precision="fp32"),
    ema=None,
    checkpoint=CheckpointConfig(every=2, keep=0, asynchronous=False),  # so that what is there at a step is known
    log=LogConfig(every=1, tensorboard=False),
)
OWNER = """
import sys, time
from ldm.checkpoint.lock import RunLock
RunLock(sys.argv[1], lease=1).acquire()
print("held", flush=True)
time.sleep(600)
"""


class Line(Objective):
    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        return ((self.trained(batch["x"]) - 1) ** 2).mean(), {}


class Rows:
    def batches(self, start: int) -> Iterator[Batch]:
        while True:
            yield {"x": Rng.of(1, [start]).normal("x", (3,)), "position": torch.tensor([start]), "key": [f"k{start}"]}
            start += 1


class At:
    """A hook that does something at a step."""

    every = 1

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def __call__(self, trainer: Trainer, step: int) -> None:
        if step == self.step:
            self.act()


def start(out: Path, *hooks: At) -> int:
    """A run of six steps that saves every second one."""

    def build() -> Assembly:
        torch.manual_seed(0)
        return Assembly(
            objective=Line(nn.Linear(3, 1)),
            loader=Rows(),  # type: ignore[arg-type]
            hooks=[*hooks],
            export=lambda weights, folder: folder.mkdir(parents=True),
        )

    return recipe.run(build, CONFIG, out, seed=0, resolved="a: 1\n")


def steps(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").glob("*step-*"))


@pytest.fixture(autouse=True)
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "RunLock", partial(RunLock, lease=1))


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "run")],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_start_is_refused_in_a_line_and_a_crashed_owner_is_followed(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=rf"run: in use by process {owner.pid} on \S+$") as caught:
        start(out)
    assert "\n" not in str(caught.value)
    assert not (out / "config.yaml").exists()
    owner.kill()
    owner.wait()
    assert start(out) == 0
    assert json.loads((out / "done.json").read_text())["step"] == 6
    assert [p.name for p in out.glob("lock*")] == ["lock.guard"]


def test_the_lock_is_held_while_training_and_given_up_after_a_failure(tmp_path: Path) -> None:
    def try_again() -> None:
        with pytest.raises(ValueError, match="in use by process"):
            start(tmp_path)
        raise FloatingPointError("of the hook")

    with pytest.raises(FloatingPointError, match="of the hook"):
        start(tmp_path, At(3, try_again))
    assert steps(tmp_path) == ["step-2"]
    assert start(tmp_path) == 0
    assert steps(tmp_path) == ["step-2", "step-4", "step-6"]


def test_nothing_is_published_once_the_folder_is_anothers(tmp_path: Path) -> None:
    """At step 3 another claims the folder, as after a cut cable: step 4 is written but never published."""

    def take_over() -> None:
        lock = tmp_path / "lock.json"
        lock.write_text(json.dumps(json.loads(lock.read_text()) | {"token": "another"}))

    with pytest.raises(LockLost, match="may not write any more"):
        start(tmp_path, At(3, take_over))
    assert [name for name in steps(tmp_path) if name.startswith("step-")] == ["step-2"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-2"
    assert not (tmp_path / "export").exists()
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == "another"  # not released by the old owner
