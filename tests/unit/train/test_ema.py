"""Power-function averages: their closed form, and any width put together afterwards against one kept along the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.objectives import Objective
from ldm.rng import Rng
from ldm.train import posthoc
from ldm.train.chosen import choose
from ldm.train.ema import WIDEST, Ema, EmaConfig, gamma_of, width_of
from ldm.train.engine_config import EngineConfig
from ldm.train.log import LogConfig
from ldm.train.optim import Optim
from ldm.train.posthoc import Profile, coefficients, overlap
from ldm.train.trainer import CheckpointConfig, TrainConfig, Trainer
from ldm.types import Batch, Metrics

WIDTHS = (0.05, 0.1)


def closed_form(trajectory: list[Tensor], gamma: float) -> Tensor:
    """Weights w_1 ... w_t averaged with the exact integrals of the profile over [s - 1, s], in float64."""
    t = len(trajectory)
    shares = [(s ** (gamma + 1) - (s - 1) ** (gamma + 1)) / t ** (gamma + 1) for s in range(1, t + 1)]
    return torch.stack([p * w.double() for p, w in zip(shares, trajectory, strict=True)]).sum(0)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_gamma_gives_the_width_back_and_is_the_profiles_spread(width: float) -> None:
    gamma = gamma_of(width)
    assert width_of(gamma) == pytest.approx(width, rel=1e-9)
    s = (np.arange(400_000) + 0.5) / 400_000
    p = (gamma + 1) * s**gamma
    mean = (p * s).mean()
    assert np.sqrt((p * (s - mean) ** 2).mean()) == pytest.approx(width, rel=1e-4)
    assert width_of(0.0) == pytest.approx(WIDEST)


@pytest.mark.parametrize("width", [0.05, 0.15])
def test_the_recursion_is_the_closed_form(width: float) -> None:
    ema = Ema(EmaConfig(power=(width,)), [torch.full((3,), 9.0)])
    trajectory = [torch.randn(3) for _ in range(40)]
    for step, weights in enumerate(trajectory, 1):
        ema.update([weights], step)
    (kind,) = ema.powers
    torch.testing.assert_close(
        ema.averages[kind][0].double(), closed_form(trajectory, gamma_of(width)), rtol=1e-5, atol=1e-6
    )


def test_several_decays_are_each_their_own() -> None:
    ema = Ema(EmaConfig(decay=0.9, others=(0.5, 0.99), warmup=False), [torch.zeros(2)])
    weights = [torch.randn(2) for _ in range(10)]
    for step, w in enumerate(weights, 1):
        ema.update([w], step)
    for decay, kind in ((0.9, "ema"), (0.5, "ema.decay.0.5"), (0.99, "ema.decay.0.99")):
        expected = sum((1 - decay) * decay ** (9 - k) * w.double() for k, w in enumerate(weights))
        torch.testing.assert_close(ema.averages[kind][0].double(), expected, rtol=1e-5, atol=1e-6)


def test_overlap_is_the_integral() -> None:
    a, b = Profile(300, 16.97), Profile(1000, 6.94)
    s = (np.arange(1_000_000) + 0.5) / 1000
    pa = np.where(s <= 300, 17.97 * (s / 300) ** 16.97 / 300, 0)
    pb = 7.94 * (s / 1000) ** 6.94 / 1000
    assert overlap(a, b) == pytest.approx(float((pa * pb).sum() / 1000), rel=1e-5)
    assert overlap(a, b) == overlap(b, a)


def test_coefficients_minimise_the_distance_of_the_profiles() -> None:
    """Against least squares on profiles that were sampled densely."""
    have = [Profile(t, gamma_of(w)) for t in (250, 500, 750, 1000) for w in WIDTHS]
    want = Profile(900, gamma_of(0.15))
    s = (np.arange(200_000) + 0.5) / 200
    columns = [np.where(s <= p.step, (p.gamma + 1) * (s / p.step) ** p.gamma / p.step, 0) for p in (*have, want)]
    expected, *_ = np.linalg.lstsq(np.stack(columns[:-1], 1), columns[-1], rcond=None)
    np.testing.assert_allclose(coefficients(have, want), expected, rtol=1e-3, atol=1e-4)
    assert coefficients(have, have[5]) == pytest.approx(np.eye(8)[5], abs=1e-8)  # one of them is itself


class Line(Objective):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(5, 3))

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        return (self.trained(batch["x"]) - batch["x"][:, :3] * 3).square().mean(), {}


class Rows:
    def batches(self, start: int) -> Iterator[Batch]:
        while True:
            x = Rng.of(1, [start]).normal("x", (5,))
            yield {"x": x, "position": torch.tensor([start]), "key": [f"k{start}"]}
            start += 1


class Along:
    """Keeps the weights of every step."""

    every = 1

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def __call__(self, trainer: Trainer, step: int) -> None:
        if step:
            self.weights.append(trainer.weights(averaged=False)["weight"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor], Callable[..., Any]]:
    """A run of 120 steps that is stopped and resumed, a snapshot of two widths every 6 steps, and all weights."""
    out = tmp_path_factory.mktemp("run")
    along = Along()

    def train(steps: int, **changes: Any) -> Trainer:
        config = TrainConfig(
            steps=steps, batch=1, optim=Optim(lr=0.05), engine=EngineConfig(zero_stage=1, precision="fp32"),
            ema=EmaConfig(decay=0.9, others=(0.5,), power=WIDTHS, snapshot=6, **changes),
            checkpoint=CheckpointConfig(every=30, keep=1), log=LogConfig(every=50, tensorboard=False),
        )  # fmt: skip
        trainer = Trainer(config, Line(), Rows(), out, seed=0, settings="")  # type: ignore[arg-type]
        assert trainer.run([along]) == 0
        return trainer

    train(60)
    along.weights = along.weights[:60]
    train(120)
    return out, along.weights, train


@pytest.mark.parametrize("width", [0.07, 0.1, 0.15, 0.2])
def test_any_width_afterwards_equals_the_average_kept_along_the_run(run: Any, width: float) -> None:
    out, weights, _ = run
    assert len(weights) == 120
    expected = closed_form(weights, gamma_of(width))
    chosen = choose(out, ema=str(width))
    assert chosen.step == 120
    spread = float((expected - weights[-1].double()).norm())
    error = float((chosen.weights["weight"].double() - expected).norm())
    assert error < (1e-5 if width in WIDTHS else 0.02) * max(spread, float(expected.norm()) * 0.1)


def test_a_width_at_an_earlier_snapshot(run: Any) -> None:
    out, weights, _ = run
    have = posthoc.snapshots(out, 90)
    assert {s.profile.step for s in have} == set(range(6, 91, 6))
    found, misfit = posthoc.reconstruct(have, 0.12, 90)
    expected = closed_form(weights[:90], gamma_of(0.12))
    assert misfit < 0.05
    assert float((found["trained.weight"].double() - expected).norm()) < 0.02 * float(expected.norm())


def test_raw_and_other_averages_by_name_and_what_there_is_not(run: Any) -> None:
    out, weights, _ = run
    assert torch.equal(choose(out, ema="raw").weights["weight"], weights[-1])
    assert not torch.equal(choose(out, ema="0.5").weights["weight"], choose(out).weights["weight"])
    for ema, said in (("0.95", "no average of decay 0.95"), ("best", "'best' is not raw"), ("-1", "relative width")):
        with pytest.raises(ValueError, match=said):
            choose(out, ema=ema)
    with pytest.raises(ValueError, match=r"step: 7 is not one of \[120\]"):
        choose(out, step=7)


@pytest.mark.parametrize(
    "bad", [{"others": (1.0,)}, {"others": (0.999,)}, {"power": (0.3,)}, {"power": (0.1, 0.1)}, {"snapshot": -1}]
)
def test_bad_values_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)) if "snapshot" not in bad else "snapshot"):
        EmaConfig(**bad)
