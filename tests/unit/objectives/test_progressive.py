"""Progressive distillation: the target against the published formula, the optimum of a linear toy, the rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.diffusion.prediction import V, Velocity
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Discrete, Flow
from ldm.objectives import progressive
from ldm.objectives.progressive import ProgressiveObjective, ProgressiveOptions, snr_weight, two_steps
from ldm.objectives.teacher import Estimator, Teacher
from ldm.recipes.distill import DistillTask
from ldm.recipes.rounds import rounds
from ldm.rng import Rng
from ldm.sampling import sample, times
from ldm.sampling.flow_times import flow_times
from ldm.types import Net
from tests import toys

W0 = torch.zeros(1)


@pytest.mark.parametrize("steps", [1, 4, 16, 25])
def test_the_path_holds_the_samplers_times(steps: int) -> None:
    schedule = Discrete(zero_terminal_snr=True)
    path = progressive.Path(schedule, steps)
    t, alpha, sigma = path.at(torch.arange(1, steps + 1) * 2, torch.float64)
    assert t.tolist()[::-1] == times(schedule, steps, "trailing")
    want = schedule.alpha_sigma(t, torch.float64)
    assert torch.equal(alpha, want[0])
    assert torch.equal(sigma, want[1])
    assert [float(v) for v in path.at(torch.tensor([0]), torch.float64)] == [0, 1, 0]


def test_target_is_the_published_formula_in_float64() -> None:
    """google-research's `x_target`, per sample in NumPy, at zero terminal SNR and at i = 0 too."""
    schedule, count = Discrete(zero_terminal_snr=True), 4
    process, rng = Process(schedule=schedule, prediction=V()), Rng(9, tuple(range(8)))
    teacher = Teacher(Estimator(toys.Probe(-0.2), process), toys.Latents.empty)
    x, text = rng.normal("x", (2, 3, 3)).double(), rng.normal("text", (2, 3)).double()
    i, w = torch.arange(8) % count, torch.linspace(0, 3, 8)
    found = two_steps(teacher, progressive.Path(schedule, count), x, i, {"text": text}, w)
    bar = schedule.alpha_bar().numpy()

    def level(u: float) -> tuple[float, float, int]:
        t = round(1000 * u) - 1
        return (1.0, 0.0, 0) if t < 0 else (bar[t] ** 0.5, (1 - bar[t]) ** 0.5, t)

    def both(x: np.ndarray, a: float, s: float, t: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        strength, mean = float(w[k]), float(text[k].mean())
        v = (1 + strength) * (-0.2 * x + 1e-3 * t + mean) - strength * (-0.2 * x + 1e-3 * t + 0.25)
        return a * x - s * v, s * x + a * v

    for k in range(8):
        u = (int(i[k]) + 1) / count
        (a, s, t), (am, sm, tm), (ae, se, _) = level(u), level(u - 0.5 / count), level(u - 1 / count)
        z = x[k].numpy()
        clean, noise = both(z, a, s, t, k)
        middle = am * clean + sm * noise
        clean, noise = both(middle, am, sm, tm, k)
        end = ae * clean + se * noise
        want = clean if i[k] == 0 else (end - se / s * z) / (ae - se / s * a)
        assert np.abs(found[k].numpy() - want).max() < 1e-5, k


def test_the_minimum_of_a_linear_student_draws_in_half_the_steps_what_the_teacher_draws() -> None:
    """Closed form: the gains of `two_steps` for x = 1; the loss there is 0 and DDIM's paths coincide."""
    count = 5
    path = progressive.Path(toys.SCHEDULE, count)
    ones = torch.ones(count, 1, 1, 1, dtype=torch.float64)
    goal = two_steps(toys.TEACHER, path, ones, torch.arange(count), {}, W0.expand(count)).flatten()
    gains = torch.zeros(toys.SCHEDULE.steps, dtype=torch.float64)
    gains[path.at(2 * torch.arange(count) + 2, torch.float64)[0]] = goal
    net = toys.Linear(gains)
    options = ProgressiveOptions(steps=count, until=count, w=(0.0, 0.0))
    objective = ProgressiveObjective(net, Estimator(net, toys.PROCESS), toys.TEACHER, toys.Normals(), options)
    loss, slope = toys.step(objective, net.gains)
    assert loss < 1e-12
    assert slope < 1e-6
    x = torch.randn(7, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def draw(denoise: object, steps: int) -> torch.Tensor:
        return sample("ddim", denoise, x, {}, schedule=toys.SCHEDULE, steps=steps, noise=lambda i: x)  # type: ignore[arg-type]

    few, many = draw(toys.PROCESS.denoiser(net), count), draw(toys.exact, 2 * count)
    late = [int(t) for t in times(toys.SCHEDULE, 2 * count, "trailing")]
    assert torch.allclose(few, many, atol=1e-6)
    assert torch.allclose(many, toys.ddim(x, late, (1.0, 0.0)), atol=1e-6)
    with torch.no_grad():
        net.gains.add_(0.05)
    assert toys.step(objective, net.gains)[0] > 1e-3


def test_weight_is_the_truncated_snr() -> None:
    schedule = Discrete(zero_terminal_snr=True)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0, 200, 999]), torch.float64)
    snr = (alpha / sigma) ** 2
    assert snr_weight(alpha, sigma).tolist() == pytest.approx([float(snr[0]), float(snr[1]), 1.0])


def task(**changes: object) -> DistillTask:
    given: dict[str, object] = {"teacher": "first", "method": ProgressiveOptions(steps=8, until=2)} | changes
    return DistillTask(**given)  # type: ignore[arg-type]


def test_rounds_halve_and_hand_the_student_on() -> None:
    planned = rounds(task(), Path("out"), "v")
    assert [r.name for r in planned] == ["round-1-8", "round-2-4", "round-3-2"]
    assert [r.task.teacher for r in planned] == ["first", "out/round-1-8/export", "out/round-2-4/export"]
    assert [r.task.method.steps for r in planned] == [8, 4, 2]  # type: ignore[union-attr]
    assert all(r.task.method.w == (0.0, 4.0) for r in planned)
    with pytest.raises(ValueError, match="steps 12 does not halve to until 2"):
        rounds(task(method=ProgressiveOptions(steps=12, until=2)), Path("out"), "v")


def test_an_epsilon_teacher_is_matched_by_a_v_student_first() -> None:
    planned = rounds(task(), Path("out"), "epsilon")
    assert [r.name for r in planned] == ["round-0-match", "round-1-8", "round-2-4", "round-3-2"]
    assert (planned[0].task.prediction, planned[0].task.method.stage) == ("v", "match")  # type: ignore[union-attr]
    assert {(r.task.prediction, r.task.method.stage) for r in planned[1:]} == {("teacher", "halve")}  # type: ignore[union-attr]


def test_guidance_that_is_folded_in_is_not_added_again() -> None:
    planned = rounds(task(guidance_embedding=None), Path("out"), "v")
    assert [r.task.method.w for r in planned] == [(0.0, 4.0), (0.0, 0.0), (0.0, 0.0)]


FLOW = Flow(shift=3.0)
FLOWING = Process(schedule=FLOW, prediction=Velocity())
GRIDS = (None, "flow_dpm")


def curved(x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
    """A velocity that bends."""
    return torch.sin(3 * x) + 0.3 * x * torch.cos(t / 200).view(-1, 1, 1, 1)


@pytest.mark.parametrize("grid", GRIDS)
def test_on_a_flow_one_step_is_the_teachers_two_euler_steps_in_float64(grid: str | None) -> None:
    """The target as a velocity is the mean of the teacher's two, weighed by their steps in sigma; Euler written out."""
    count = 4
    i = torch.arange(count)
    x = torch.randn(count, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    path = progressive.Path(FLOW, count, grid)
    goal = two_steps(Teacher(Estimator(curved, FLOWING), None), path, x, i, {}, W0.expand(count))
    sigma = [path.at(2 * i + k, torch.float64)[2].view(-1, 1, 1, 1) for k in (2, 1, 0)]
    first = curved(x, 1000 * sigma[0].flatten(), {})
    middle = x + (sigma[1] - sigma[0]) * first
    second = curved(middle, 1000 * sigma[1].flatten(), {})
    end = middle + (sigma[2] - sigma[1]) * second
    velocity = (x - goal) / sigma[0]  # x_0 = x - sigma velocity
    mean = ((sigma[0] - sigma[1]) * first + (sigma[1] - sigma[2]) * second) / (sigma[0] - sigma[2])
    assert float((velocity - mean).abs().max()) < 1e-12
    assert float((x + (sigma[2] - sigma[0]) * velocity - end).abs().max()) < 1e-12
    assert float((mean - first).abs().max()) > 0.1


class Table(torch.nn.Module):
    """A velocity x gain, with a gain of its own at each time of a path."""

    def __init__(self, at: torch.Tensor, gains: torch.Tensor) -> None:
        super().__init__()
        self.at, self.gains = at, torch.nn.Parameter(gains.clone())

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        place = (t.double()[:, None] - self.at).abs().argmin(1)
        return self.gains[place].view(-1, 1, 1, 1) * x


def flowing(x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
    """The exact velocity of data N(0, SPREAD^2): E[noise - x_0 | x]."""
    s = t.double() / 1000
    variance = ((1 - s) * toys.SPREAD) ** 2 + s**2
    return ((s - (1 - s) * toys.SPREAD**2) / variance).view(-1, 1, 1, 1) * x


@pytest.mark.parametrize("grid", GRIDS)
def test_the_minimum_on_a_flow_draws_in_half_the_steps_what_the_teacher_draws(grid: str | None) -> None:
    """Closed form, at the times of the samplers: Euler's 1 ... 1/N, and DPM-Solver's on flow sigmas."""
    count = 4
    path = progressive.Path(FLOW, count, grid)
    late, _, sigma = path.at(2 * torch.arange(count) + 2, torch.float64)
    teacher = Teacher(Estimator(flowing, FLOWING), None)
    ones = torch.ones(count, 1, 1, 1, dtype=torch.float64)
    goal = two_steps(teacher, path, ones, torch.arange(count), {}, W0.expand(count)).flatten()
    net = Table(late, (1 - goal) / sigma)
    options = ProgressiveOptions(steps=count, until=count, w=(0.0, 0.0))
    objective = ProgressiveObjective(net, Estimator(net, FLOWING), teacher, toys.Normals(), options, grid)
    loss, slope = toys.step(objective, net.gains)
    assert loss < 1e-20
    assert slope < 1e-10
    x = torch.randn(7, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def draw(velocity: Net, steps: int) -> torch.Tensor:
        visited = times(FLOW, steps, "trailing") if grid is None else flow_times(FLOW, steps, grid)
        given = {"schedule": FLOW, "steps": steps, "times": visited, "noise": lambda i: x}
        return sample("euler", FLOWING.denoiser(velocity), x, {}, **given)  # type: ignore[arg-type]

    assert torch.allclose(draw(net, count), draw(flowing, 2 * count), atol=1e-7)
    with torch.no_grad():
        net.gains.add_(0.05)
    assert toys.step(objective, net.gains)[0] > 1e-4


def test_a_flow_whose_times_do_not_nest_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shift_terminal 0\.1"):
        progressive.Path(Flow(shift=3.0, terminal=0.1), 4)
    for grid in ("flow", "flow_once"):  # why Euler's own sigmas are not the path's
        few, many = flow_times(FLOW, 4, grid), flow_times(FLOW, 8, grid)
        assert max(min(abs(a - b) for b in many) for a in few) > 1
