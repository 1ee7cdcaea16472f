"""Learning rates against their formulas, what is decayed, and the moving average against its closed form."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from ldm.train.ema import Ema, EmaConfig
from ldm.train.optim import Optim, read_state, write_state


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


def test_lion_is_its_algorithm() -> None:
    """By hand in float64: the sign of b1 m + (1 - b1) g, decoupled decay, m of its own rate."""
    weights = torch.randn(4, 3)
    p = nn.Parameter(weights.clone())
    lion = Optim(algorithm="lion", lr=0.01, betas=(0.9, 0.99), weight_decay=0.1).build([p])
    w, m = weights.double(), torch.zeros(4, 3, dtype=torch.float64)
    for _ in range(5):
        grad = torch.randn(4, 3)
        p.grad = grad.clone()
        lion.step()
        direction = (0.9 * m + 0.1 * grad.double()).sign()
        w = w - 0.01 * (direction + 0.1 * w)
        m = 0.99 * m + 0.01 * grad.double()
    torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_8_bit_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"'adamw8bit' needs the package bitsandbytes: pip install"):
        Optim(algorithm="adamw8bit").build([nn.Parameter(torch.zeros(2, 2))])


def test_8_bit_state_survives_float32() -> None:
    """What a checkpoint keeps gives the state back to the rounding of 8 bits, and so the next step."""
    pytest.importorskip("bitsandbytes")
    options = Optim(algorithm="adamw8bit", lr=0.01)
    a = nn.Parameter(torch.randn(64, 128))
    first = options.build([a])
    for _ in range(3):
        a.grad = torch.randn(64, 128)
        first.step()
    assert first.state[a]["state1"].dtype == torch.uint8
    b = nn.Parameter(a.detach().clone())
    second = options.build([b])
    write_state(second, b, read_state(first, a), 3)
    for name, value in read_state(first, a).items():
        assert float((read_state(second, b)[name] - value).abs().max()) < 0.02 * float(value.abs().max())
    grad = torch.randn(64, 128)
    for p, optimizer in ((a, first), (b, second)):
        p.grad = grad.clone()
        optimizer.step()
    assert float((a - b).abs().max()) < 0.1 * options.lr
