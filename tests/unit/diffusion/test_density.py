"""Training times: distribution functions, unbiased importance weights, state."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from ldm.diffusion import ImportanceTimes, LogitNormal


def test_logit_normal_distribution():
    u = LogitNormal(mean=-0.5, std=1.2).warp(torch.linspace(0, 1, 4001, dtype=torch.float64)[1:-1])
    logit = torch.log(u) - torch.log1p(-u)
    assert stats.kstest(logit.numpy(), stats.norm(-0.5, 1.2).cdf).statistic < 1e-3
    assert bool((LogitNormal().warp(torch.tensor([0.0, 1.0])) < 1).all())
    with pytest.raises(ValueError, match="std must be above 0"):
        LogitNormal(std=0)


def filled():
    times = ImportanceTimes(4, history=2)
    for _ in range(3):
        times.update(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    return times


def test_importance_follows_the_losses():
    empty = ImportanceTimes(4, history=2)
    assert empty.probabilities().tolist() == [0.25] * 4
    times = filled()
    want = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64) * 0.999 + 0.00025
    assert torch.allclose(times.probabilities(), want)
    t, weight = times.sample((torch.arange(100000) + 0.5) / 100000)
    share = torch.bincount(t, minlength=4).double() / 100000
    assert torch.allclose(share, want, atol=1e-4)
    # unbiased: the weighted mean of any function is its plain mean over times
    value = torch.tensor([5.0, -1.0, 2.0, 7.0])
    assert float((weight * value[t]).mean()) == pytest.approx(13 / 4, rel=1e-3)


def test_importance_state_round_trip():
    times, other = filled(), ImportanceTimes(4, history=2)
    other.load_state(times.state())
    assert torch.equal(other.probabilities(), times.probabilities())
    with pytest.raises(ValueError, match="steps and history"):
        ImportanceTimes(0)
