"""The error of velocity at fixed noise levels: closed forms, and the same for every process and prediction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Discrete, Flow
from ldm.evaluate import held_out
from ldm.types import Cond

COMMON = Process(schedule=Discrete())
PROCESSES = {
    "epsilon": COMMON,
    "v to zero SNR": Process(schedule=Discrete(zero_terminal_snr=True), prediction=PREDICTIONS["v"]),
    "x_0, cosine": Process(schedule=Discrete(betas="cosine"), prediction=PREDICTIONS["sample"]),
    "flow": Process(schedule=Flow(shift=3.0), prediction=PREDICTIONS["velocity"]),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_of_normal_data_it_is_the_closed_form(name: str) -> None:
    """The best estimate of x_0 ~ N(0, 1) leaves sigma^2 / (alpha^2 + sigma^2), so the velocity 1 / ((1-u)^2 + u^2)."""
    process = PROCESSES[name]
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 400, 4, 8, 8, generator=g)

    def net(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in process.schedule.alpha_sigma(t))
        best = alpha / (alpha**2 + sigma**2) * x
        return process.prediction.target(best, (x - alpha * best) / sigma, alpha, sigma)

    for level in held_out.LEVELS:
        found = held_out.velocity_error(process, process.denoiser(net), x0, noise, {}, level)
        assert found.mean().item() == pytest.approx(1 / ((1 - level) ** 2 + level**2), rel=0.01)
        same = held_out.velocity_error(COMMON, lambda x, t, cond: _best(x, t), x0, noise, {}, level)
        assert torch.allclose(found, same, rtol=2e-3)  # float32 at u = 1/9, where the error is multiplied by 81


def _best(x: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in COMMON.schedule.alpha_sigma(t))
    return alpha / (alpha**2 + sigma**2) * x


def test_what_is_off_by_a_constant_errs_by_its_square_over_the_level() -> None:
    x0, noise = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    found = held_out.velocity_error(COMMON, lambda x, t, cond: x0 + 0.5, x0, noise, {}, 0.25)
    assert found.tolist() == pytest.approx([4.0, 4.0])


def test_levels_that_a_schedule_lacks_are_refused() -> None:
    """scaled_linear ends at alpha^2 = 0.0047: u = 0.936."""
    assert held_out.time_of(COMMON, 8 / 9) < 999
    with pytest.raises(ValueError, match=r"level 0.95: .* it ends at 0.93"):
        held_out.time_of(COMMON, 0.95)
    with pytest.raises(ValueError, match="level must lie in"):
        held_out.time_of(PROCESSES["flow"], 1.0)
    assert held_out.time_of(PROCESSES["flow"], 0.25) == pytest.approx(250)
