"""Learning rates against their formulas, what is decayed, and the moving average against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ldm.train.ema import Ema, EmaConfig
from ldm.train.optim import Optim


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_learning_rate_formulas(decay: str) -> None:
    optim = Optim(lr=0.5, warmup=10, decay=decay, final=0.1)  # type: ignore[arg-type]
    rates = [optim.lr_at(i, 110) for i in range(111)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    shape = {
        "constant": lambda u: 1.0,
        "linear": lambda u: 1.0 + (0.1 - 1.0) * u,
        "cosine": lambda u: 0.1 + 0.45 * (1 + math.cos(math.pi * u)),
    }[decay]
    assert rates[10:] == pytest.approx([0.5 * shape((i - 10) / 100) for i in range(10, 111)])
    assert optim.lr_at(5000, 110) == pytest.approx(rates[-1])  # a run made longer than planned


def test_no_warmup_and_a_warmup_longer_than_the_run() -> None:
    assert Optim(lr=1.0, decay="cosine").lr_at(0, 10) == 1.0
    assert [Optim(lr=1.0, warmup=4).lr_at(i, 2) for i in range(2)] == [0.25, 0.5]


def test_biases_and_norms_are_not_decayed_and_frozen_weights_not_trained() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.GroupNorm(1, 2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    optimizer = Optim(weight_decay=0.3).build(model.parameters())
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
    plain = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert decayed == {id(model[0].weight)}
    assert plain == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": math.nan}, {"betas": (0.9, 1.0)}, {"warmup": -1}, {"final": 1.5}])
def test_bad_values_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Optim(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("warmup", [True, False])
def test_moving_average_is_the_weighted_sum_of_the_trajectory(warmup: bool) -> None:
    torch.manual_seed(0)
    path = [torch.randn(50) for _ in range(40)]
    ema = Ema(EmaConfig(decay=0.9, warmup=warmup), [path[0]])
    for n, weights in enumerate(path[1:], start=1):
        ema.update([weights], n)
    decays = [min(0.9, n / (9 + n)) if warmup else 0.9 for n in range(1, 40)]
    expected = math.prod(decays) * path[0].double()
    for k, weights in enumerate(path[1:]):
        expected += (1 - decays[k]) * math.prod(decays[k + 1 :]) * weights.double()
    torch.testing.assert_close(ema.shards[0].double(), expected, rtol=0, atol=3e-7)
    assert ema.shards[0] is not path[0]
