"""examples/mixture_2d.py: its exact scores, and its bound against the true density."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[3] / "examples" / "mixture_2d.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("mixture_2d", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_exact_estimate_is_the_posterior_mean(example):
    """E[x_0 | x_t] by weighting many data points with the likelihood of x_t."""
    points, label = example.data(200_000, seed=1)
    points = points[:, :, 0, 0].double()
    x, t = torch.tensor([[0.5, 0.4], [-0.3, 0.9]]).view(2, 2, 1, 1), torch.tensor([300.0, 500.0])
    alpha, sigma = example.SCHEDULE.alpha_sigma(t, torch.float64)
    for wanted in (example.NOTHING, 0):
        got = example.exact(x, t, {"class": torch.tensor([wanted] * 2)})[:, :, 0, 0]
        for i in range(2):
            gap = ((x[i, :, 0, 0] - alpha[i] * points) ** 2).sum(1)
            chance = torch.exp(-gap / (2 * sigma[i] ** 2)) * ((label == wanted) | (wanted == example.NOTHING))
            want = (chance[:, None] * points).sum(0) / chance.sum()
            assert torch.allclose(got[i].double(), want, atol=0.02)


def test_true_density_sums_to_1(example):
    axis = torch.linspace(-2, 2, 201)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2, 1, 1)
    assert float(torch.exp(-example.true_nll(grid)).sum() * 0.02**2) == pytest.approx(1, abs=1e-3)


def test_bound_closes_in_from_above(example, capsys):
    found = list(example.show_likelihood({"exact": example.exact}, count=300)["exact"].values())
    truth = float(example.true_nll(example.data(300, seed=9)[0]).mean())
    assert found == sorted(found, reverse=True)
    assert truth < found[-1] < truth + 0.2


def test_it_runs(example, tmp_path, capsys):
    network = example.train(30, batch=32)
    denoise = {"trained": example.PROCESS.denoiser(network)}
    with torch.no_grad():
        assert example.show_guidance(denoise, 50).size == (750, 150)
    assert example.distance(example.draw("heun", example.exact, 20, 1000)) < 0.02
