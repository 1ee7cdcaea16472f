"""The fixed toy network x * t / (t + 1) of diffusers' scheduler tests: sums and means of the sample."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.diffusion import Discrete, Epsilon, Process, V
from ldm.sampling import sample, times

LINEAR = Discrete(betas="linear", beta_start=1e-4, beta_end=0.02)
COARSE = Discrete(betas="linear", beta_start=0.01, beta_end=0.02)
SCALED = Discrete(betas="scaled_linear", beta_start=0.00085, beta_end=0.012)
LONG = Discrete(betas="linear", beta_start=1e-4, beta_end=0.02, steps=1100)


def net(x, t, cond):
    t = t.view(-1, 1, 1, 1)
    return x * t / (t + 1)


def start():
    count = 768
    return (torch.arange(count).reshape(3, 8, 8, 4) / count).permute(3, 0, 1, 2)


CASES = [
    ("ddpm", LINEAR, Epsilon(), 1000, {"clip": 1.0}, 258.9606, 0.3372),
    ("ddpm", LINEAR, V(), 1000, {"clip": 1.0}, 202.0296, 0.2631),
    ("ddim", LINEAR, Epsilon(), 10, {"clip": 1.0, "spacing": "leading"}, 172.0067, 0.223967),
    ("ddim", LINEAR, V(), 10, {"clip": 1.0, "spacing": "leading"}, 52.5302, 0.0684),
    ("ddim", COARSE, Epsilon(), 10, {"clip": 1.0, "spacing": "leading"}, 149.8295, 0.1951),
    ("ddim", COARSE, Epsilon(), 10, {"clip": 1.0, "spacing": "leading", "end": "first"}, 149.0784, 0.1941),
    ("lcm", SCALED, Epsilon(), 1, {}, 18.7097, 0.0244),
    ("lcm", SCALED, Epsilon(), 10, {}, 197.7616, 0.2575),
    ("dpmpp_2m", LINEAR, Epsilon(), 10, {"end": "first"}, 253.5514, 0.3301),
    ("euler", LONG, Epsilon(), 10, {"scaled": True}, 168.0516, 0.2188),
    ("pndm", LINEAR, Epsilon(), 10, {"spacing": "leading"}, 198.1318, 0.2580),
]


@pytest.mark.parametrize(("name", "schedule", "prediction", "steps", "options", "total", "mean"), CASES)
def test_toy_network(name, schedule, prediction, steps, options, total, mean):
    x = start()
    draws = torch.Generator().manual_seed(0)
    options = dict(options)
    if options.pop("scaled", False):
        x = x * schedule.at(schedule.last)[1]
    result = sample(
        name,
        Process(schedule=schedule, prediction=prediction).denoiser(net),
        x,
        {},
        schedule=schedule,
        steps=steps,
        noise=lambda i: torch.randn(x.shape, generator=draws),
        **options,
    )
    print(f"deviation {abs(result.abs().sum().item() - total) / total:.1e}")
    assert result.abs().sum().item() == pytest.approx(total, abs=1e-2)
    assert result.abs().mean().item() == pytest.approx(mean, abs=1e-3)


def test_euler_with_a_state_scaled_in_place():
    """The published 10.0807 comes from a loop that also replaces its state by the network's scaled input.

    The network is linear, so that loop is ours with the output over alpha, times the product of the alphas.
    """
    x = start() * LONG.at(LONG.last)[1]
    path = times(LONG, 10, "even")

    def louder(x, t, cond):
        return net(x, t, cond) / LONG.alpha_sigma(t)[0].view(-1, 1, 1, 1)

    denoise = Process(schedule=LONG).denoiser(louder)
    result = sample("euler", denoise, x, {}, schedule=LONG, steps=10, times=path, noise=lambda i: x)
    result = result * math.prod(LONG.at(t)[0] for t in path)
    assert result.abs().sum().item() == pytest.approx(10.0807, abs=1e-2)
    assert result.abs().mean().item() == pytest.approx(0.0131, abs=1e-3)
