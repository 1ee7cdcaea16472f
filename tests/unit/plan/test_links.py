"""ZeRO++ in the planner: bytes by closed form and as ZeRO++'s paper counts them, memory, seconds, advice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ldm.plan.hardware import GB, Assumptions, find
from ldm.plan.links import ZeroPP, advice, wire
from ldm.plan.memory import Activations, Layout, Sizes, memory
from ldm.plan.throughput import Cluster

PSI = 1_000_000
A, B = 15 / 16, 7 / 8
"""Of 16 ranks, and of 8 in a node: the share of a collective that leaves a rank."""


@pytest.mark.parametrize(
    ("zeropp", "micro", "live", "over_all", "inside", "ports"),
    [
        (ZeroPP(), 1, 0, 3 * 4 * A, 0, 0),
        (ZeroPP(part=8), 1, 0, 2 * 4 * A, 4 * B, 0),  # the gather of the backward pass stays in the node
        (ZeroPP(part=8), 4, 0, (1 + 4) * 4 * A, 7 * 4 * B, 0),  # and all those of later micro-batches
        (ZeroPP(part=8), 1, PSI, 2 * 4 * A, 0, 0),  # nothing is gathered twice
        (ZeroPP(part=4), 1, PSI // 2, 2 * 4 * A, 0.5 * 4 * 3 / 4, 0),
        (ZeroPP(part=16), 1, 0, 3 * 4 * A, 0, 0),  # one group of all: off
        (ZeroPP(weights=True), 1, 0, (2 * 1 + 4) * A, 0, 0),
        (ZeroPP(gradients=True), 1, 0, 2 * 4 * A, B / 2, 1 / 2 / 8 / 2),
        (ZeroPP(part=8, weights=True, gradients=True), 2, 0, A, 3 * B + 2 * B / 2, 2 / 2 / 8 / 2),
    ],
)
def test_bytes_of_two_nodes_of_eight(
    zeropp: ZeroPP, micro: int, live: int, over_all: float, inside: float, ports: float
) -> None:
    sent = wire(PSI, 3, 16, micro_steps=micro, live=live, zeropp=zeropp, node=8)
    assert (sent.hidden, sent.inside, sent.ports) == pytest.approx((over_all * PSI, inside * PSI, ports * PSI))
    assert sent.exposed == 0
    assert sent.total == pytest.approx(PSI * (over_all + inside + ports))
    for stage in (0, 1, 2):  # which do not have it
        assert wire(PSI, stage, 16, zeropp=zeropp, node=8) == wire(PSI, stage, 16)
    assert wire(PSI, 3, 1, zeropp=zeropp).total == 0


def test_between_nodes_it_is_the_papers_quarter() -> None:
    """Table 1 of arXiv 2306.10209: 3 M become 0.75 M, M the weights in half precision; a node's bytes, many nodes."""
    nodes, node = 1000, 8
    whole = wire(PSI, 3, nodes * node, element=2, live=0, node=node)
    saved = wire(
        PSI, 3, nodes * node, element=2, live=0, node=node, zeropp=ZeroPP(part=node, weights=True, gradients=True)
    )
    assert whole.hidden / (2 * PSI) == pytest.approx(3, rel=0.01)
    assert (saved.hidden + node * saved.ports) / (2 * PSI) == pytest.approx(0.75, rel=0.01)


def test_groups_that_span_nodes_use_the_links_between_them() -> None:
    sent = wire(PSI, 3, 16, live=0, zeropp=ZeroPP(part=8), node=4)
    assert sent.inside == 0
    assert sent.hidden == pytest.approx(PSI * 4 * (2 * A + B))


def test_one_node_reduces_gradients_whole() -> None:
    """As DeepSpeed does: quantising is for what leaves the node."""
    assert wire(PSI, 3, 8, live=0, zeropp=ZeroPP(gradients=True), node=8) == wire(PSI, 3, 8, live=0, node=8)


def test_seconds_are_bytes_over_their_links() -> None:
    chip = replace(find("a100-80g"), inside=100, outside=25)
    cluster = Cluster(nodes=2, per_node=8, hardware=chip, assumptions=Assumptions(link=0.5))
    sent = wire(PSI, 3, 16, live=0, zeropp=ZeroPP(part=8, weights=True, gradients=True), node=8)
    ring, inside, ports = PSI * A / (12.5 * GB), PSI * 1.5 * B / (50 * GB), 8 * PSI / 32 / (12.5 * GB)
    assert cluster.hiding(sent) == pytest.approx(ring + inside + ports)
    assert cluster.hiding(sent) < cluster.hiding(wire(PSI, 3, 16, live=0, node=8)) / 5


def test_the_second_copy_takes_its_share_of_the_weights() -> None:
    """psi / part elements: from the forward pass on where weights are let go, in the optimizer's step always."""
    sizes = Sizes(weights=PSI, small=0, largest=1000)
    none = Activations.count(
        nn.Linear(2, 2).to("meta"), lambda b: (torch.empty(b, 2, device="meta"),), precision=torch.float32, gpu=False
    )

    def held(part: int, **layout: Any) -> float:
        layout = {"bucket": 1, "overlap": False, "copies": 0, "live": 0} | layout
        return memory(sizes, none, 1, Layout(stage=3, world=16, zeropp=ZeroPP(part=part), **layout)).total

    assert held(8) - held(1) == pytest.approx(4 * PSI / 8)
    assert held(2) - held(1) == pytest.approx(4 * PSI / 2)
    assert held(2, half=True) - held(1, half=True) == pytest.approx(2 * PSI / 2, rel=0.01)
    assert held(16) == held(1)
    # With weights that stay whole the forward pass has no copy; the optimizer's step has, without the whole weights.
    assert held(8, live=PSI) == held(1, live=PSI)
    assert held(8, live=PSI, accumulate=2) - held(1, live=PSI, accumulate=2) == pytest.approx(4 * PSI / 8)
    for live, accumulate, forward in ((0, 1, 1.0), (PSI // 4, 1, 0.75), (PSI, 1, 0.0), (PSI, 2, 1.0)):
        found = ZeroPP(part=8).copy(PSI, 16, element=4, live=live, accumulate=accumulate)
        assert found == pytest.approx((forward * 4 * PSI / 8, 4 * PSI / 8))


@pytest.mark.parametrize(
    ("zeropp", "changed", "said"),
    [
        (ZeroPP(part=8), {}, ""),
        (ZeroPP(), {}, ""),
        (ZeroPP(part=3), {}, "hpz_partition: 3 does not divide 16 GPUs, so the run will not start"),
        (ZeroPP(part=16), {}, "hpz_partition: 16 is off, as 16 GPUs are no more than one group"),
        (ZeroPP(part=8), {"node": 4}, "groups of 8 span nodes of 4"),
        (ZeroPP(part=8), {"live": PSI}, "nothing is gathered twice"),
        (ZeroPP(part=8), {"live": PSI, "accumulate": 2}, ""),
        (ZeroPP(gradients=True), {"world": 8}, "quantized_gradients: off, as 8 GPUs are within one node"),
    ],
)
def test_what_is_advised(zeropp: ZeroPP, changed: dict[str, int], said: str) -> None:
    given = {"weights": PSI, "live": 0, "accumulate": 1, "world": 16, "node": 8} | changed
    found = advice(zeropp, **given)
    assert len(found) == bool(said)
    assert said in "".join(found)
