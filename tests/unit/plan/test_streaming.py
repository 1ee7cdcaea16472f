"""Blocks that come and go in a plan: closed forms, and what a call of a real network moves."""

from __future__ import annotations

import copy

import pytest
import torch

from ldm.models.streaming import resident, stream
from ldm.models.unet import UNet
from ldm.plan.streaming import Streamed, halving, waited
from tests.counting import Counted
from tests.unit.models.test_network import NETS, inputs
from tests.unit.plan.work import WIDE

W = 1024.0


def equal(blocks: int, places: int | None) -> Streamed:
    """Blocks of W bytes, and 100 bytes outside of them."""
    whole = blocks * W
    return Streamed(name="network", total=whole + 100, blocks=(W,) * blocks, exact=whole, places=places)


@pytest.mark.parametrize("blocks", [3, 7, 57])
def test_equal_blocks_have_closed_forms(blocks: int) -> None:
    whole = equal(blocks, None)
    assert (whole.held, whole.host, whole.moved(backward=True)) == (blocks * W + 100, 0, 0)
    assert equal(blocks, blocks).held == whole.held
    for places in range(1, blocks):
        found, turns = equal(blocks, places), blocks - max(0, places - 2)
        assert found.held == places * W + 100
        assert found.host == turns * W
        assert found.moved(backward=False) == turns * W
        there = 2 if places > 1 else 1
        assert found.moved(backward=True) == 2 * (turns - there) * W
        assert len(found.moving) == blocks - len(resident(blocks, places)) == turns


def test_unequal_blocks_hold_the_largest_neighbours() -> None:
    found = Streamed(name="network", total=110, blocks=(10, 20, 40, 30), exact=100, places=2)
    assert found.held == 10 + 40 + 30
    assert found.moved(backward=True) == (40 + 30) + (10 + 20)
    assert Streamed(name="network", total=110, blocks=(10, 20, 40, 30), exact=100, places=1).held == 10 + 40


def test_bytes_are_those_of_a_network() -> None:
    with torch.device("meta"):
        network = UNet(WIDE)
    found = Streamed.of(network, None)
    own = sum(p.numel() * p.element_size() for p in (*network.parameters(), *network.buffers()))
    assert found.held == found.total == own
    rounding = 256 * sum(1 for _ in network.parameters())
    assert found.exact <= sum(found.blocks) <= found.exact + rounding
    assert Streamed.of(network, 1).held < own / 2


def test_what_is_fetched_ahead_hides_behind_computing() -> None:
    assert waited(100, rate=10, busy=4, ahead=True) == 6
    assert waited(100, rate=10, busy=20, ahead=True) == 0
    assert waited(100, rate=10, busy=20, ahead=False) == 10


def test_half_as_many_each_time_down_to_one() -> None:
    assert list(halving(57)) == [29, 15, 8, 4, 2, 1]
    assert list(halving(1)) == []


@pytest.mark.parametrize("name", ["sd3", "flux", "unet"])
@pytest.mark.parametrize("places", [1, 2, 3])
def test_bytes_are_those_that_a_counting_device_is_sent(name: str, places: int) -> None:
    """In a second call, and in a second forward and backward pass."""
    network = NETS[name]().eval().requires_grad_(False)
    places = min(places, len(list(network.blocks())) - 1)
    planned = Streamed.of(copy.deepcopy(network).to("meta"), places)
    x, t, cond = inputs(network)
    counted = Counted()
    stream(network, places, "cpu", counted)
    with torch.no_grad():
        network(x, t, cond)
        before = sum(counted.sizes)
        network(x, t, cond)
    assert sum(counted.sizes) - before == planned.moved(backward=False)
    stay = planned.held - (planned.total - planned.exact + sum(planned.blocks) - sum(planned.moving))
    assert counted.bytes_most <= max(stay, planned.moving[0] + planned.moving[-1])  # the first follows the last
    for _ in range(2):
        before = sum(counted.sizes)
        network(x.clone().requires_grad_(), t, cond).square().sum().backward()
    assert sum(counted.sizes) - before == planned.moved(backward=True)
