"""Courses of the learning rate against diffusers', transformers' and pytorch-optimizer's own schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from ldm.train.optim import Optim
from ldm.train.schedules import Course

PEAK, STEPS, WARMUP = 0.5, 60, 7


def theirs(make: Any) -> list[float]:
    """Rates that a scheduler gives, one a step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, found = make(optimizer), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def compared(made: Any, warmup: int = WARMUP, **settings: Any) -> None:
    """From the end of the warm-up on, which counts from 1 here and from 0 there."""
    optim = Optim(lr=PEAK, warmup=warmup, **settings)
    rates = [optim.lr_at(i, STEPS) for i in range(STEPS)]
    assert rates[warmup:] == pytest.approx(theirs(made)[warmup:], rel=1e-9, abs=1e-12)
    assert rates[:warmup] == pytest.approx([PEAK * (i + 1) / warmup for i in range(warmup)])


@pytest.mark.parametrize("cycles", [1, 3])
def test_cosine_with_restarts_is_diffusers(cycles: int) -> None:
    optimization = pytest.importorskip("diffusers.optimization")
    make = optimization.get_cosine_with_hard_restarts_schedule_with_warmup
    compared(lambda o: make(o, WARMUP, STEPS, cycles), decay="cosine_restarts", course=Course(cycles=cycles))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.5])
def test_polynomial_is_diffusers(power: float) -> None:
    make = pytest.importorskip("diffusers.optimization").get_polynomial_decay_schedule_with_warmup
    compared(lambda o: make(o, WARMUP, STEPS, lr_end=0.05, power=power), decay="polynomial", final=0.1,
             course=Course(power=power))  # fmt: skip


@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_constant_with_warm_up_is_diffusers(warmup: int) -> None:
    make = pytest.importorskip("diffusers.optimization").get_constant_schedule_with_warmup
    compared(lambda o: make(o, warmup), warmup=warmup)


@pytest.mark.parametrize(("warmup", "scale"), [(0, None), (WARMUP, None), (WARMUP, 20)])
def test_inverse_square_root_is_transformers(warmup: int, scale: int | None) -> None:
    make = pytest.importorskip("transformers.optimization").get_inverse_sqrt_schedule
    compared(lambda o: make(o, warmup, scale), warmup=warmup, decay="inverse_sqrt", course=Course(timescale=scale or 0))


@pytest.mark.parametrize(("shape", "their"), [("cosine", "cosine"), ("linear", "linear"), ("sqrt", "1-sqrt")])
def test_warm_up_stable_decay_is_transformers(shape: Any, their: str) -> None:
    make = pytest.importorskip("transformers.optimization").get_wsd_schedule
    compared(lambda o: make(o, WARMUP, 15, STEPS, decay_type=their, min_lr_ratio=0.1), decay="wsd", final=0.1,
             course=Course(cooldown=15, shape=shape))  # fmt: skip


def test_rex_is_its_formula() -> None:
    """(1 - u) / (1/2 + (1 - u)/2) of Chen et al. 2021 (arXiv 2107.04197), and halfway two thirds."""
    optim = Optim(lr=1.0, decay="rex")
    assert [optim.lr_at(i, 10) for i in range(10)] == pytest.approx(
        [(1 - i / 10) / (0.5 + 0.5 * (1 - i / 10)) for i in range(10)]
    )
    assert optim.lr_at(5, 10) == pytest.approx(2 / 3)
    assert Optim(lr=1.0, decay="rex", final=0.4).lr_at(5, 10) == pytest.approx(0.4 + 0.6 * 2 / 3)


def test_after_the_planned_end_the_rate_stays() -> None:
    for decay in ("cosine_restarts", "polynomial", "rex"):
        optim = Optim(lr=1.0, decay=decay, final=0.2)  # type: ignore[arg-type]
        assert optim.lr_at(100, 10) == pytest.approx(0.2)
    assert Optim(decay="inverse_sqrt", lr=1.0, final=0.2).lr_at(10**9, 10) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"decay": "cosine", "course": Course(cycles=2)}, "course.cycles: 2 is of decay 'cosine_restarts', got"),
        ({"decay": "wsd"}, "course.cooldown: decay 'wsd' needs"),
    ],
)
def test_what_a_course_does_not_take_is_refused(settings: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Optim(**settings)


@pytest.mark.parametrize("bad", [{"cycles": 0}, {"power": 0.0}, {"power": math.nan}, {"cooldown": -1}])
def test_bad_values_are_refused_by_name(bad: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Course(**bad)
