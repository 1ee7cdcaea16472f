"""Latent consistency distillation: times, boundary, solver against diffusers and NumPy; the optimum of a linear toy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor, nn

from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.diffusion.prediction import Epsilon, V
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Discrete, Flow
from ldm.objectives.consistency import ConsistencyObjective, ConsistencyOptions, boundary, distance
from ldm.objectives.teacher import Estimator, Target, Teacher, place, solver_times
from ldm.objectives.trajectory import TrajectoryObjective, TrajectoryOptions
from ldm.rng import Rng
from ldm.sampling import sample
from ldm.types import Cond
from tests import toys

SD = Discrete()
ZERO = Discrete(zero_terminal_snr=True)


def test_solver_times_are_the_published_ones() -> None:
    late, near = solver_times(SD, 50, torch.linspace(0, 0.9999, 5000))
    assert sorted(set(late.tolist())) == list(range(19, 1000, 20))
    assert sorted(set(near.tolist())) == [0, *range(19, 980, 20)]
    assert all(n == max(a - 20, 0) for a, n in zip(late.tolist(), near.tolist(), strict=True))
    counts = np.unique(late.numpy(), return_counts=True)[1]
    assert counts.min() == counts.max() == 100
    late, near = solver_times(Flow(), 50, torch.tensor([0.0, 0.5, 0.999]))
    assert late.tolist() == [20, 520, 1000]
    assert near.tolist() == [0, 500, 980]


def test_boundary_is_that_of_diffusers_sampler() -> None:
    scheduler = LCMScheduler()
    t = torch.tensor([0, 19, 259, 999])
    skip, out = boundary(t)
    for i, value in enumerate(t):
        want = scheduler.get_scalings_for_boundary_condition_discrete(value.double())
        assert (float(skip[i]), float(out[i])) == pytest.approx([float(v) for v in want], rel=1e-6)
    assert (float(skip[0]), float(out[0])) == (1, 0)


@pytest.mark.parametrize(("schedule", "prediction"), [(SD, Epsilon()), (SD, V()), (ZERO, V())])
def test_the_teachers_step_is_diffusers_ddim(schedule: Discrete, prediction: Any) -> None:
    config = scheduler_to_diffusers(schedule, prediction) | {"timestep_spacing": "trailing"}
    scheduler: Any = DDIMScheduler.from_config({k: v for k, v in config.items() if k[0] != "_"})
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -20))
    g = torch.Generator().manual_seed(0)
    x, c, u = torch.randn(3, 4, 2, 3, 3, generator=g)
    w, late = torch.tensor([0.0, 1.0, 2.5, 7.0]), torch.tensor([999, 519, 39, 19])

    def net(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return torch.where(cond["text"][:, :1, :1, None] > 0, c.repeat(2, 1, 1, 1), u.repeat(2, 1, 1, 1))

    empty = {"text": torch.zeros(1, 1, 1)}
    teacher = Teacher(Estimator(net, Process(schedule=schedule, prediction=prediction)), empty)
    moved = place(schedule, *teacher.both(x, late, {"text": torch.ones(4, 1, 1)}, w), (late - 20).clamp(min=0))
    for i in range(4):
        guided = u[i] + (w[i] + 1) * (c[i] - u[i])  # Imagen's form of the same guidance
        want = scheduler.step(guided, late[i], x[i]).prev_sample
        assert torch.allclose(moved[i], want, atol=2e-5, rtol=1e-4), i


@pytest.mark.parametrize("loss", ["huber", "l2"])
@pytest.mark.parametrize(("conditioned", "reach"), [(False, 1), (True, 1), (True, 3), (False, 50)])
def test_loss_is_algorithm_1_in_float64(loss: Any, conditioned: bool, reach: int) -> None:
    process = Process(schedule=ZERO, prediction=V())
    options = ConsistencyOptions(w=(1.0, 5.0), loss=loss, huber=0.05, reach=reach)
    student, goal, teacher = toys.Probe(0.4), toys.Probe(0.3), toys.Probe(-0.2)
    own = Estimator(student, process, conditioned)
    objective = ConsistencyObjective(
        student, own, Estimator(goal, process, conditioned), Teacher(Estimator(teacher, process), toys.Latents.empty),
        toys.Latents(), options, None,
    )  # fmt: skip
    rng = Rng(3, tuple(range(40, 52)))
    weight = torch.rand(12, generator=torch.Generator().manual_seed(1))
    found, metrics = objective({"weight": weight}, rng)

    bar = ZERO.alpha_bar().numpy()
    x0, noise = rng.normal("latents", (2, 3, 3)).double().numpy(), rng.normal("noise", (2, 3, 3)).double().numpy()
    text = rng.normal("text", (2, 3)).double().numpy().mean((1, 2))
    losses = []
    for i in range(12):
        t = 20 * int(50 * float(rng.uniform("time")[i])) + 19
        w = 1 + 4 * float(rng.uniform("guidance")[i])
        x, told = bar[t] ** 0.5 * x0[i] + (1 - bar[t]) ** 0.5 * noise[i], 0.1 * w * conditioned

        def f(scale: float, x: Any, t: int, text: float = text[i], told: float = told) -> Any:
            alpha, sigma = bar[t] ** 0.5, (1 - bar[t]) ** 0.5
            clean = alpha * x - sigma * (scale * x + 1e-3 * t + text + told)
            skip = 0.25 / ((10 * t) ** 2 + 0.25)
            return skip * x + 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5 * clean

        moved, n = x, t
        for _ in range(reach):
            if n > 0:
                v = (1 + w) * (-0.2 * moved + 1e-3 * n + text[i]) - w * (-0.2 * moved + 1e-3 * n + 0.25)
                (a, s), (b, r) = ((bar[k] ** 0.5, (1 - bar[k]) ** 0.5) for k in (n, max(n - 20, 0)))
                moved, n = b * (a * moved - s * v) + r * (s * moved + a * v), max(n - 20, 0)
        gap = (f(0.4, x, t) - (moved if reach == 50 else f(0.3, moved, n))) ** 2
        losses.append((gap if loss == "l2" else np.sqrt(gap + 0.05**2) - 0.05).mean())
    assert found.item() == pytest.approx(float(np.mean(weight.double().numpy() * losses)), rel=1e-5)
    assert metrics["loss_low_noise"] > 0
    found.backward()
    assert goal.scale.grad is None
    assert teacher.scale.grad is None
    assert student.scale.grad is not None


def test_target_is_the_closed_form_average_and_survives_a_checkpoint() -> None:
    net, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(net.state_dict())
    target = Target(dict(twin.named_parameters()), 0.9)
    path = [net.weight.detach().double().clone()]
    target.follow(0, iter(net.named_parameters()))  # before the first step: nothing moves
    assert torch.equal(twin.weight, net.weight)
    for step in (1, 2, 3):
        with torch.no_grad():
            net.weight.add_(step)
        path.append(net.weight.detach().double().clone())
        target.follow(step, iter(net.named_parameters()))
        target.follow(step, iter(net.named_parameters()))  # the same step again: nothing moves
    want = 0.9**3 * path[0] + 0.1 * (0.81 * path[1] + 0.9 * path[2] + path[3])
    assert torch.allclose(twin.weight.double(), want, atol=1e-6)
    other = nn.Linear(3, 2)
    again = Target(dict(other.named_parameters()), 0.9)
    again.load(target.tensors())
    assert torch.equal(other.weight, twin.weight)
    again.follow(3, iter(net.named_parameters()))  # the step of the checkpoint: nothing moves
    assert torch.equal(other.weight, twin.weight)
    with pytest.raises(ValueError, match="no target weights"):
        again.load({})


def _optimum(solver_steps: int) -> Tensor:
    """Gains (T,) whose f carries each solver time's x to where the teacher's path ends, time 0."""
    gains, stride = torch.zeros(toys.SCHEDULE.steps, dtype=torch.float64), toys.SCHEDULE.steps // solver_steps
    for k in range(1, solver_steps + 1):
        t = k * stride - 1
        path = [t - j * stride for j in range(k)]
        end = toys.ddim(torch.ones((), dtype=torch.float64), path, toys.SCHEDULE.at(0.0))
        scaled = 10.0 * t
        gains[t] = (end - 0.25 / (scaled**2 + 0.25)) / (scaled / (scaled**2 + 0.25) ** 0.5)
    return gains


def _consistency(net: toys.Linear, goal: toys.Linear, target: Target | None, steps: int = 20) -> ConsistencyObjective:
    options = ConsistencyOptions(w=(0.0, 0.0), solver_steps=steps, loss="l2")
    own, other = Estimator(net, toys.PROCESS), Estimator(goal, toys.PROCESS)
    return ConsistencyObjective(net, own, other, toys.TEACHER, toys.Normals(), options, target)


def test_the_minimum_of_a_linear_student_is_the_teachers_own_path() -> None:
    best = _optimum(20)
    objective = _consistency(net := toys.Linear(best), net, None)
    loss, slope = toys.step(objective, net.gains, count=400)
    assert loss < 1e-12
    assert slope < 1e-6
    x = torch.randn(6, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoise, late = toys.PROCESS.denoiser(net), list(range(99, 0, -5))
    one = sample("lcm", denoise, x, {}, schedule=toys.SCHEDULE, steps=1, times=[99.0], noise=lambda i: x)
    assert torch.allclose(one, toys.ddim(x, late, toys.SCHEDULE.at(0.0)), atol=1e-6)


def test_gradient_descent_with_an_averaged_target_arrives_there() -> None:
    best = _optimum(10)
    torch.manual_seed(0)
    start = best + 0.3 * torch.randn_like(best)
    net, goal = toys.Linear(start), toys.Linear(start).requires_grad_(False)
    objective = _consistency(net, goal, Target(dict(goal.named_parameters()), 0.8), steps=10)
    objective.after_step(0)
    adam = torch.optim.Adam(net.parameters(), lr=0.03)
    for step in range(300):
        adam.param_groups[0]["lr"] = 0.03 * (1 - step / 300)
        batch, rng = toys.batch(64, step * 64)
        loss, _ = objective(batch, toys.Together(rng.seed, rng.positions))
        adam.zero_grad()
        loss.backward()
        adam.step()
        objective.after_step(step + 1)
    times = torch.arange(9, 100, 10)
    before = float((start - best)[times].abs().max())
    assert float((net.gains.detach() - best)[times].abs().max()) < 0.05 * before


def test_huber_is_the_l1_norm_far_away_and_quadratic_near() -> None:
    a, b = torch.zeros(2, 1, 1, 1), torch.tensor([100.0, 1e-4]).view(2, 1, 1, 1)
    assert distance(a, b, "huber", 0.01).tolist() == pytest.approx([100 - 0.01, 1e-8 / 0.02], rel=1e-3)


def test_a_jump_that_ends_where_the_teacher_arrives_is_compared_with_the_teacher_itself() -> None:
    """At s = t_n the target network cancels out: alpha x_0 + sigma noise at its own time is x."""
    net, odd = toys.Linear(toys.gain(torch.arange(100))), toys.Linear(torch.randn(100, dtype=torch.float64))
    own, other = Estimator(net, toys.PROCESS), Estimator(odd, toys.PROCESS)

    class AtTheNearEnd(Rng):
        def uniform(self, purpose: str, shape: Any = ()) -> Tensor:
            return torch.ones(len(self)) if purpose == "end" else super().uniform(purpose, shape)

    options = TrajectoryOptions(w=(0.0, 0.0), solver_steps=20, loss="l2")
    objective = TrajectoryObjective(net, own, other, toys.TEACHER, toys.Normals(), options, None)
    batch, rng = toys.batch(64)
    exact, _ = objective(batch, AtTheNearEnd(rng.seed, rng.positions))
    elsewhere, _ = objective(batch, rng)
    assert float(exact.detach()) < 1e-12 < 1e-4 < float(elsewhere.detach())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"w": (3.0, 1.0)}, "w must be"),
        ({"solver_steps": 0}, "solver_steps must be"),
        ({"decay": 1.0}, "decay must be"),
        ({"huber": 0.0}, "huber must be"),
    ],
)
def test_mistakes_are_told(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ConsistencyOptions(**wrong)
