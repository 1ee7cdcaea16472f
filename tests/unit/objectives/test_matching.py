"""Distribution matching: the student's gradient against its closed form, and its zero; who learns when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.objectives.consistency import boundary
from ldm.objectives.matching import MatchingObjective, MatchingOptions
from ldm.objectives.teacher import Estimator
from ldm.types import Cond
from tests import toys


class Critic(nn.Module):
    """The exact denoiser of N(0, spread^2); its parameter changes nothing where it is 0."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.extra, self.spread = nn.Parameter(torch.zeros((), dtype=torch.float64)), spread

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return (toys.gain(t, self.spread).to(x.dtype) + self.extra).view(-1, 1, 1, 1) * x


def objective(scale: float, **options: Any) -> tuple[MatchingObjective, toys.Linear, Critic]:
    """A one-step student that draws N(0, scale^2) from x at time 99, and a critic that knows so."""
    skip, out = (float(v) for v in boundary(torch.tensor([99.0])))
    net = toys.Linear(torch.full((100,), (scale - skip) / out, dtype=torch.float64))
    critic = Critic(scale)
    trained = nn.ModuleDict({"student": net, "critic": critic})
    own, other = Estimator(net, toys.PROCESS), Estimator(critic, toys.PROCESS)
    given = MatchingOptions(w=(0.0, 0.0), steps=1, **options)
    return MatchingObjective(trained, own, other, toys.TEACHER, toys.Normals(), given), net, critic


def gradient(scale: float, count: int = 400) -> float:
    built, net, _ = objective(scale)
    batch, rng = toys.batch(count)
    loss, _ = built(batch, toys.Together(rng.seed, rng.positions))
    loss.backward()
    assert net.gains.grad is not None
    return float(net.gains.grad[99])


def test_the_students_gradient_is_zero_where_it_draws_the_teachers_distribution_and_points_there() -> None:
    assert abs(gradient(toys.SPREAD)) < 1e-6
    assert gradient(1.3 * toys.SPREAD) > 0.05
    assert gradient(0.7 * toys.SPREAD) < -0.05


def test_direction_is_the_difference_of_scores_over_the_teachers_distance() -> None:
    """Per sample in closed form: both denoisers are linear."""
    built, _, _ = objective(0.9)
    _, rng = toys.batch(32)
    fake = 0.9 * rng.normal("anything", (1, 1, 1)).double()
    found = built._direction(fake, {}, torch.zeros(32), rng)
    t = built._noising(toys.PROCESS.times(rng.uniform("score time")))
    assert t.min() >= 1
    assert t.max() <= 97
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in toys.SCHEDULE.alpha_sigma(t, torch.float64))
    x = alpha * fake + sigma * rng.normal("score noise", (1, 1, 1)).double()
    real, own = (toys.gain(t, s).view(-1, 1, 1, 1) * x for s in (toys.SPREAD, 0.9))
    assert torch.allclose(found, (own - real) / (fake - real).abs(), atol=1e-5)


@pytest.mark.parametrize(("step", "learns"), [(0, True), (1, False), (4, False), (5, True)])
def test_the_student_learns_in_its_turns_and_the_critic_always_from_its_own_loss_alone(step: int, learns: bool) -> None:
    built, net, critic = objective(0.9, every=5)
    built.after_step(step)
    batch, rng = toys.batch(64)
    loss, metrics = built(batch, rng)
    loss.backward()
    assert net.gains.grad is not None
    assert critic.extra.grad is not None
    assert bool(net.gains.grad.abs().max() > 0) == learns
    alone = torch.autograd.grad(_critic_loss(built, critic, rng), critic.extra)[0]
    assert float(critic.extra.grad) == pytest.approx(float(alone), rel=1e-5)
    assert metrics["critic"] > 0


def _critic_loss(built: MatchingObjective, critic: Critic, rng: Any) -> Tensor:
    """The denoising loss of the critic on the student's pictures, written out."""
    fake = 0.9 * rng.normal("start", (1, 1, 1)).double()
    t = built._noising(toys.PROCESS.times(rng.uniform("critic time")))
    noise = rng.normal("critic noise", (1, 1, 1)).double()
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in toys.SCHEDULE.alpha_sigma(t, torch.float64))
    return (critic(alpha * fake + sigma * noise, t, {}) - fake).square().mean()
