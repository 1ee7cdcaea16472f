"""Solvers on flows: their order on Gaussian data, whose probability-flow ODE is known exactly, and the way to the data.

With x_t ~ N((1 - s) m, v(s)^2), v(s)^2 = (1 - s)^2 std^2 + s^2 and s = t / T, the ODE keeps (x - (1 - s) m) / v(s).
"""

from __future__ import annotations

import math

import pytest
import torch

from ldm.checkpoint.scheduler_classes import OwnSampler
from ldm.diffusion import Flow
from ldm.sampling import SAMPLERS, sample
from ldm.sampling.run import Node, Run

STD, MEAN = 0.5, 0.3
FLOW = Flow(shift=3.0)
DETERMINISTIC = [name for name, info in SAMPLERS.items() if not info.stochastic]


def exact(x, t, cond):
    """E[x_0 | x_t], float64."""
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in FLOW.alpha_sigma(t.double(), torch.float64))
    return MEAN + alpha * STD**2 * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def spread(sigma):
    return math.hypot((1 - sigma) * STD, sigma)


def carried(x, high, low):
    """The ODE's end at sigma `low` from x at sigma `high`."""
    return (1 - low) * MEAN + (x - (1 - high) * MEAN) * spread(low) / spread(high)


def inner_error(name, steps, high=0.95, low=0.05):
    """Between two noise levels inside, evenly in log(alpha / sigma), in float64 throughout."""
    ends = [math.log((1 - s) / s) for s in (high, low)]
    sigmas = [1 / (1 + math.exp(ends[0] + (ends[1] - ends[0]) * i / steps)) for i in range(steps + 1)]
    path = [Node(1000 * s, 1 - s, s) for s in sigmas]
    x = torch.full((1, 1, 1, 1), 1.2, dtype=torch.float64)
    run = Run(exact, {}, FLOW, path, lambda i: x)
    run.times = lambda x, node: torch.full((x.shape[0],), node.t, dtype=torch.float64)  # theirs is float32
    return abs(float(SAMPLERS[name].solve(run, x, 0.0)) - carried(1.2, high, low))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name):
    """Halving the steps divides the error by 2^order, as the table of samplers says of all schedules."""
    coarse, fine = inner_error(name, 42), inner_error(name, 84)  # groups of 2 and 3
    order = math.log2(coarse / fine)
    print(f"{name}: {order:.2f} measured, {SAMPLERS[name].order} in the table, error {fine:.1e}")
    assert order > SAMPLERS[name].order - 0.5
    assert fine < {1: 2e-2, 2: 1e-3}.get(SAMPLERS[name].order, 1e-4)


def whole_error(name, steps, grid):
    path = OwnSampler(name=name, grid=grid).times(FLOW, steps)
    x = torch.full((1, 1, 1, 1), 1.2, dtype=torch.float64)
    options = {"steps": steps, "times": path, "noise": lambda i: x}
    return abs(float(sample(name, exact, x, {}, schedule=FLOW, **options)) - (MEAN + 1.2 * STD))


PATHS = [(name, "flow") for name in ("euler", "heun", "kdpm2", "lms")]
PATHS += [
    (name, grid)
    for name in ("euler", "heun", "dpmpp_2m", "unipc", "deis", "lms", "kdpm2")
    for grid in ("flow_open", "flow_dpm", "flow_unipc")
]


@pytest.mark.parametrize(("name", "grid"), PATHS)
def test_from_pure_noise_to_the_data(name, grid):
    """On the published grids, also where the first step has no signal: more steps are better, and good at 40.

    Not multistep solvers in lam on SD3's grid, whose last step but one is four times as long in lam as the one before.
    """
    coarse, fine = whole_error(name, 10, grid), whole_error(name, 40, grid)
    print(f"{name} on {grid}: {coarse:.1e} with 10 steps, {fine:.1e} with 40")
    assert fine < coarse / 3
    assert fine < (0.05 if name == "euler" else 0.01)


def test_heun_is_of_second_order_from_pure_noise():
    """In x and sigma nothing is infinite there, so only the last step, an Euler one of first order, is short."""
    errors = [whole_error("heun", steps, "flow_open") for steps in (20, 40, 80)]
    assert math.log2(errors[0] / errors[1]) > 1.7
    assert math.log2(errors[1] / errors[2]) > 1.7


@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "dpmpp_2m", "unipc", "lcm", "dpmpp_2m_sde"])
def test_a_constant_velocity_is_exact(name):
    """Data that are one point make straight paths: every solver lands on it in any number of steps."""
    point = torch.full((2, 1, 2, 2), 0.4, dtype=torch.float64)
    for steps in (1, 3, 9):
        path = OwnSampler(name=name, grid="flow").times(FLOW, steps)
        options = {"steps": steps, "times": path, "noise": lambda i: torch.ones_like(point)}
        got = sample(name, lambda x, t, c: point.expand_as(x), 2 * torch.ones_like(point), {}, schedule=FLOW, **options)
        assert torch.allclose(got, point, atol=1e-12)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "ddpm"])
def test_stochastic_samplers_reach_the_distribution(name):
    """Mean and standard deviation of 20,000 samples."""
    shape = (5, 1, 64, 64)

    def noise(i):
        return torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)

    path = OwnSampler(name=name, grid="flow_dpm").times(FLOW, 400)
    got = sample(name, exact, noise(999), {}, schedule=FLOW, steps=400, times=path, noise=noise)
    print(f"{name}: mean {float(got.mean()):.4f} of {MEAN}, std {float(got.std()):.4f} of {STD}")
    assert float(got.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(got.std()) == pytest.approx(STD, rel=0.04)
