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


def _options(**changed: Any) -> MatchingOptions:
    """A student of one step that learns in every step, without guidance."""
    plain: dict[str, Any] = {"w": (0.0, 0.0), "steps": (1,), "every": 1}
    return MatchingOptions(**plain | changed)


def objective(scale: float, **options: Any) -> tuple[MatchingObjective, toys.Linear, Critic]:
    """A one-step student that draws N(0, scale^2) from x at time 99, and a critic that knows so."""
    skip, out = (float(v) for v in boundary(torch.tensor([99.0])))
    net = toys.Linear(torch.full((100,), (scale - skip) / out, dtype=torch.float64))
    critic = Critic(scale)
    trained = nn.ModuleDict({"student": net, "critic": critic})
    own, other = Estimator(net, toys.PROCESS), Estimator(critic, toys.PROCESS)
    given = _options(**options)
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
    t = built._noising(toys.PROCESS.times(rng.uniform("score time")), built.options.span)
    assert t.min() >= 1
    assert t.max() <= 97
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in toys.SCHEDULE.alpha_sigma(t, torch.float64))
    x = alpha * fake + sigma * rng.normal("score noise", (1, 1, 1)).double()
    real, own = (toys.gain(t, s).view(-1, 1, 1, 1) * x for s in (toys.SPREAD, 0.9))
    assert torch.allclose(found, (own - real) / (fake - real).abs(), atol=1e-5)


@pytest.mark.parametrize(("step", "learns"), [(0, False), (4, False), (5, True), (6, False), (8, True)])
def test_the_student_learns_in_its_turns_and_the_critic_always_from_its_own_loss_alone(step: int, learns: bool) -> None:
    built, net, critic = objective(0.9, every=3, alone=5)
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
    assert ("direction" in metrics) == learns


def test_pictures_begin_where_the_sampler_is_after_any_of_its_steps_each_path_as_often() -> None:
    """With a student of one gain, x after k steps is Gaussian: its variance by the sampler's recursion, written out."""
    built, net, _ = objective(0.9, steps=(1, 2, 4), solver_steps=8)
    net.gains.data[:] = 0.8
    count = 40_000
    _, rng = toys.batch(count)
    x, t = built._starts(torch.Size((1, 1, 1)), {}, toys.Together(rng.seed, rng.positions))
    asked = {1: [95], 2: [95, 47], 4: [95, 71, 47, 23]}  # every 8 // n-th of 95, 83, 71, ..., 11
    expected: dict[int, list[tuple[float, float]]] = {}
    for n, path in asked.items():
        variance = 1.0
        for k, now in enumerate(path):
            expected.setdefault(now, []).append((1 / (3 * n), variance))
            skip, out = (float(v) for v in boundary(torch.tensor([float(now)])))
            if k + 1 < n:
                alpha, sigma = toys.SCHEDULE.at(float(path[k + 1]))
                variance = (alpha * (skip + out * 0.8)) ** 2 * variance + sigma**2
    assert {int(v) for v in t.unique()} == set(expected)
    for now, parts in expected.items():
        share = sum(p for p, _ in parts)
        here = x[t == now].double()
        assert len(here) / count == pytest.approx(share, abs=0.01)
        assert float(here.square().mean()) == pytest.approx(sum(p * v for p, v in parts) / share, rel=0.06)


def test_a_batch_of_first_steps_alone_is_left_as_it_is() -> None:
    built, _, _ = objective(0.9, steps=(1, 4), solver_steps=8)
    _, rng = toys.batch(8)
    given = _Low(rng.seed, rng.positions)
    x, t = built._starts(torch.Size((1, 1, 1)), {}, given)
    assert torch.equal(x, given.normal("start", (1, 1, 1)))
    assert (t == 95).all()


class _Low(toys.Together):
    """Uniform numbers near 0."""

    def uniform(self, purpose: str, shape: Any = ()) -> Tensor:
        return super().uniform(purpose, shape) * 1e-3


def _critic_loss(built: MatchingObjective, critic: Critic, rng: Any) -> Tensor:
    """The denoising loss of the critic on the student's pictures, written out."""
    fake = 0.9 * rng.normal("start", (1, 1, 1)).double()
    t = built._noising(toys.PROCESS.times(rng.uniform("critic time")), built.options.span)
    noise = rng.normal("critic noise", (1, 1, 1)).double()
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in toys.SCHEDULE.alpha_sigma(t, torch.float64))
    return (critic(alpha * fake + sigma * noise, t, {}) - fake).square().mean()


class Head(nn.Module):
    """A logit that is not linear in the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x = x.flatten(1).mean(1)
        return self.weight[0] * x.square() + self.weight[1] * (x + 1e-2 * t)


def judged(gains: Tensor, **options: Any) -> tuple[MatchingObjective, toys.Linear, Head]:
    """A one-step student of these gains, its critic, and a head."""
    net, critic, head = toys.Linear(gains), Critic(0.9), Head()
    trained = nn.ModuleDict({"student": net, "critic": critic, "head": head})
    own, other = Estimator(net, toys.PROCESS), Estimator(critic, toys.PROCESS)
    given = _options(adversarial=0.5, head=0.2, **options)
    return MatchingObjective(trained, own, other, toys.TEACHER, toys.Normals(), given, head), net, head


def _generated(gains: Tensor, rng: Any) -> Tensor:
    skip, out = (float(v) for v in boundary(torch.tensor([99.0])))
    start = rng.normal("start", (1, 1, 1))
    return (skip + out * gains[99]) * start.double()


def _noised(built: MatchingObjective, x: Tensor, purpose: str, rng: Any) -> tuple[Tensor, Tensor]:
    t = built._noising(toys.PROCESS.times(rng.uniform("head time")), built.options.judged)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in toys.SCHEDULE.alpha_sigma(t, torch.float64))
    return alpha * x + sigma * rng.normal(purpose, (1, 1, 1)).double(), t


@torch.no_grad()
def _students_loss(built: MatchingObjective, head: Head, gains: Tensor, rng: Any) -> float:
    made = _noised(built, _generated(gains, rng), "head noise, generated", rng)
    return 0.5 * float(nn.functional.softplus(-head(*made, {})).mean())


def test_the_adversarial_gradients_are_those_of_the_two_losses_written_out() -> None:
    """In one backward pass: the head's of its own loss; the student's of softplus(-logit), by finite differences."""
    gains = torch.full((100,), 0.8, dtype=torch.float64)
    batch, rng = toys.batch(24)
    built, net, head = judged(gains)
    built(batch, rng)[0].backward()
    plain, alone, _ = objective(1.0)
    alone.gains.data.copy_(gains)
    plain._critic.net.spread = 0.9  # type: ignore[attr-defined]
    plain(batch, rng)[0].backward()
    assert net.gains.grad is not None
    assert alone.gains.grad is not None
    assert head.weight.grad is not None

    expected = (_students_loss(built, head, gains + 1e-5, rng) - _students_loss(built, head, gains - 1e-5, rng)) / 2e-5
    assert abs(expected) > 1e-3
    assert float(net.gains.grad[99] - alone.gains.grad[99]) == pytest.approx(expected, rel=1e-4)
    real = toys.Normals().latents(batch, rng, torch.device("cpu"))
    made = _generated(gains, rng)
    own, other = (
        head(*_noised(built, x, f"head noise, {n}", rng), {}) for x, n in ((real, "real"), (made, "generated"))
    )
    loss = 0.2 * (nn.functional.softplus(-own) + nn.functional.softplus(other)).mean()
    assert torch.allclose(head.weight.grad, torch.autograd.grad(loss, head.weight)[0], rtol=1e-5)


def test_between_its_turns_the_student_is_not_pulled_and_the_head_still_learns() -> None:
    built, net, head = judged(torch.full((100,), 0.8, dtype=torch.float64), every=3)
    built.after_step(1)
    loss, metrics = built(*toys.batch(16))
    loss.backward()
    assert net.gains.grad is not None
    assert head.weight.grad is not None
    assert net.gains.grad.abs().max() == 0
    assert head.weight.grad.abs().max() > 0
    assert 0 <= metrics["head_right"] <= 1


def test_a_weight_and_a_head_belong_together() -> None:
    with pytest.raises(ValueError, match="belong together"):
        objective(1.0, adversarial=0.1)
    with pytest.raises(ValueError, match="adversarial must be at least 0"):
        MatchingOptions(adversarial=-1.0)
    with pytest.raises(ValueError, match=r"steps must lie in \[1, 4\] \(solver_steps\), got \[8\]"):
        MatchingOptions(steps=(8,), solver_steps=4)
    with pytest.raises(ValueError, match="alone must be at least 0"):
        MatchingOptions(alone=-1)
    with pytest.raises(ValueError, match="judged must be"):
        MatchingOptions(judged=(0.5, 0.5))
