"""The loop: what is not finite is skipped and counted, hooks come when they should, and stopping saves."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.objectives import Objective
from ldm.rng import Rng
from ldm.train.ema import EmaConfig
from ldm.train.engine_config import EngineConfig
from ldm.train.log import LogConfig
from ldm.train.optim import Optim
from ldm.train.trainer import AGAIN, CheckpointConfig, TrainConfig, Trainer
from ldm.types import Batch, Metrics


class Line(Objective):
    """Fits y = w . x; a sample whose position is in `bad` has a loss that is not finite."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 1))
        self.bad = bad
        self.seen: list[int] = []

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        factor = torch.tensor([float("nan") if p in self.bad else 1.0 for p in rng.positions])
        error = (self.trained(batch["x"]).squeeze(1) - batch["x"].sum(1)) ** 2
        return (error * factor).mean(), {"twice": 2 * error.mean().detach()}

    def after_step(self, step: int) -> None:
        self.seen.append(step)


class Rows:
    """A loader of one row a micro-batch."""

    def __init__(self, accumulate: int = 1) -> None:
        self.accumulate = accumulate

    def batches(self, start: int) -> Iterator[Batch]:
        position = start * self.accumulate
        while True:
            x = Rng.of(1, [position]).normal("x", (3,))
            yield {"x": x, "position": torch.tensor([position]), "key": [f"k{position}"]}
            position += 1


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Trainer]:
    def build(bad: tuple[int, ...] = (), accumulate: int = 1, out: str = "run", **changes: Any) -> Trainer:
        settings: dict[str, Any] = {
            "steps": 8,
            "batch": accumulate,
            "accumulate": accumulate,
            "optim": Optim(lr=0.05, weight_decay=0.0, warmup=2),
            "engine": EngineConfig(zero_stage=changes.pop("stage", 1), precision="fp32", clip=1.0),
            "ema": EmaConfig(decay=0.5),
            "checkpoint": CheckpointConfig(every=3, keep=0),
            "log": LogConfig(every=1, tensorboard=False),
        }
        config = TrainConfig(**settings | changes)
        return Trainer(config, Line(bad), Rows(accumulate), tmp_path / out, seed=0, settings="")  # type: ignore[arg-type]

    return build


def rows(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trainer.out / "log" / "metrics.jsonl").read_text().splitlines()]


def by_hand(steps: int, accumulate: int, skipped: tuple[int, ...]) -> tuple[Tensor, list[float]]:
    """Weights and losses of plain AdamW that leaves out some steps."""
    objective = Line()
    adam = torch.optim.AdamW(objective.parameters(), lr=0.05, weight_decay=0.0)
    losses = []
    data = Rows(accumulate).batches(0)
    for step in range(steps):
        batch = [next(data) for _ in range(accumulate)]
        if step in skipped:
            continue
        adam.param_groups[0]["lr"] = 0.05 * min(1, (step + 1) / 2)
        loss = torch.stack([objective(b, Rng.of(0, b["position"]))[0] for b in batch]).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        adam.step()
        losses.append(loss.item())
    return objective.trained.weight.detach(), losses  # type: ignore[union-attr,return-value]


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_leaves_no_trace(make: Any, stage: int, accumulate: int) -> None:
    """Its micro-batches are used up, its gradients dropped; weights, moments and data order are as if it were not."""
    bad = (2 * accumulate, 5 * accumulate + accumulate - 1)  # the first micro-batch of step 3, the last of step 6
    trainer = make(bad, accumulate, stage=stage)
    assert trainer.run([]) == 0
    weight, losses = by_hand(8, accumulate, (2, 5))
    torch.testing.assert_close(trainer.weights(averaged=False)["weight"], weight, rtol=1e-5, atol=1e-6)
    assert [r["step"] for r in rows(trainer)] == [1, 2, 4, 5, 7, 8]
    assert [r["loss"] for r in rows(trainer)] == pytest.approx(losses, rel=1e-5)
    assert trainer.skipped == 2
    assert trainer.objective.seen == list(range(9))  # type: ignore[attr-defined]
    assert all(torch.isfinite(t).all() for t in trainer.weights().values())


def test_many_in_a_row_stop_the_run_and_name_samples(make: Any) -> None:
    trainer = make(tuple(range(3, 99)), max_skipped=3)
    with pytest.raises(FloatingPointError, match=r"3 times in a row.*k5"):
        trainer.run([])
    assert trainer.step == 6


def test_skips_are_counted_across_a_resume(make: Any) -> None:
    assert make((1, 4), steps=6).run([]) == 0
    again = make((7,))
    assert again.run([]) == 0
    assert again.skipped == 3


class Hook:
    def __init__(self, every: int) -> None:
        self.every, self.calls = every, []

    def __call__(self, trainer: Trainer, step: int) -> None:
        self.calls.append(step)  # type: ignore[attr-defined]


def test_hooks_come_at_the_start_their_steps_and_the_end(make: Any) -> None:
    hooks = [Hook(3), Hook(0), Hook(8)]
    assert make().run(hooks) == 0
    assert [h.calls for h in hooks] == [[0, 3, 6, 8], [8], [0, 8]]
    late = [Hook(3), Hook(0)]
    assert make().run(late) == 0  # killed after its last step: only what the export needs is done again
    assert [h.calls for h in late] == [[8], [8]]


def test_a_signal_saves_the_step_and_the_next_run_goes_on_alike(make: Any) -> None:
    calm = make(out="calm")
    calm.run([])

    class Kill(Hook):
        def __call__(self, trainer: Trainer, step: int) -> None:
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert make().run([Kill(1)]) == AGAIN
    assert signal.getsignal(signal.SIGTERM) is before
    again = make()
    assert again.run([]) == 0
    assert [r["step"] for r in rows(again)] == list(range(1, 9))
    assert [r["loss"] for r in rows(again)] == [r["loss"] for r in rows(calm)]
    for averaged in (True, False):
        for name, value in calm.weights(averaged).items():
            assert torch.equal(again.weights(averaged)[name], value)
    assert sorted(p.name for p in again.checkpoints.glob("step-*")) == ["step-3", "step-5", "step-6", "step-8"]


def test_another_model_in_the_folder_is_refused(make: Any) -> None:
    make(steps=3).run([])
    other = make()
    wide = Trainer(other.config, _Wide(), Rows(), other.out, seed=0, settings="")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another model"):
        wide.run([])


class _Wide(Line):
    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(3, 2)


def test_metrics_are_means_over_the_micro_batches(make: Any) -> None:
    trainer = make(accumulate=4, steps=2)
    trainer.run([])
    for row in rows(trainer):
        assert row["twice"] == pytest.approx(2 * row["loss"], rel=1e-6)
        assert row["lr"] == 0.05 * min(1, row["step"] / 2)
