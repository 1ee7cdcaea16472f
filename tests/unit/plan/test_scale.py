"""Closed forms of large runs against their definitions, and against the simulation in bench/scale.py."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from bench.scale import PSI, Life, link_seconds, simulated_goodput, straggle
from ldm.plan.hardware import Assumptions, find
from ldm.plan.scale import daly, goodput, largest_of_exponentials, largest_of_normals, ring, wall_time, young
from ldm.plan.throughput import Cluster


@pytest.mark.parametrize("ranks", [8, 64, 1024, 8192])
def test_the_largest_of_normals_is_its_integral(ranks: int) -> None:
    """E[max] = integral of x d(Phi(x)^N), by quadrature; the Gumbel limit is a few percent above it."""
    density = stats.norm.pdf
    exact = integrate.quad(lambda x: x * ranks * density(x) * stats.norm.cdf(x) ** (ranks - 1), -8, 12, limit=400)[0]
    assert largest_of_normals(ranks) == pytest.approx(exact, rel=0.08 if ranks < 64 else 0.03)


@pytest.mark.parametrize("ranks", [1, 2, 10, 500])
def test_the_largest_of_exponentials_is_its_integral(ranks: int) -> None:
    """E[max] = integral of 1 - (1 - e^-x)^N."""
    exact = integrate.quad(lambda x: 1 - (1 - math.exp(-x)) ** ranks, 0, 60, limit=400)[0]
    assert largest_of_exponentials(ranks) == pytest.approx(exact, rel=1e-6)


def test_the_slowest_of_simulated_ranks_is_the_closed_form() -> None:
    generator = np.random.default_rng(1)
    for ranks in (16, 512):
        found = straggle(generator, ranks, 4000, 0.02)
        assert found - 1 == pytest.approx(0.02 * largest_of_normals(ranks), rel=0.05)


@pytest.mark.parametrize(("cost", "failures"), [(5.0, 36000.0), (60.0, 36000.0), (300.0, 7200.0)])
def test_dalys_interval_minimises_the_expected_time(cost: float, failures: float) -> None:
    best = optimize.minimize_scalar(
        lambda t: wall_time(1.0, t, cost, 600.0, failures), bounds=(cost / 10, 20 * failures), method="bounded"
    )
    assert daly(cost, failures) == pytest.approx(best.x, rel=0.02)
    assert young(cost, failures) == pytest.approx(daly(cost, failures) + cost, rel=0.1)
    assert wall_time(1.0, daly(cost, failures), cost, 600.0, failures) <= 1.0001 * best.fun


def test_simulated_goodput_is_dalys() -> None:
    """A work of many failures, so that the mean of shares is the share of means."""
    for cost, restart, failures in ((20.0, 300.0, 20000.0), (120.0, 900.0, 8000.0)):
        interval = daly(cost, failures)
        life = Life(interval=interval, cost=cost, restart=restart, failures=failures)
        share, error = simulated_goodput(life, 200 * failures, 30, seed=3)
        assert share == pytest.approx(goodput(interval, cost, restart, failures), abs=4 * error + 0.004)


def test_without_failures_only_saving_costs() -> None:
    assert goodput(1000.0, 10.0, 600.0, 1e12) == pytest.approx(1000 / 1010, rel=1e-6)


def test_a_ring_sends_all_but_its_own_part() -> None:
    assert ring(8e9, 8, 1e9) == pytest.approx(7.0)
    assert ring(8e9, 1, 1e9) == 0


@pytest.mark.parametrize(("outside", "pays"), [(1.1 / 3, False), (0.9 / 3, True)])
def test_where_hybrid_sharding_and_zero_plus_plus_pay(outside: float, pays: bool) -> None:
    """Hybrid from the network being a third of the link within a node; 8-bit gathers wherever stage 3 crosses nodes."""
    chip = find("a100-80g")
    chip = replace(chip, outside=outside * chip.inside)
    took = link_seconds(PSI, Cluster(nodes=16, per_node=8, hardware=chip, assumptions=Assumptions()))
    assert (took["hybrid"] < took["ZeRO-3"]) == pays
    assert took["ZeRO++"] < took["ZeRO-3"]
    assert took["ZeRO-3"] == pytest.approx(1.5 * took["ZeRO-1, 2"])
