"""Seconds of a step: kernels by a roofline, collectives over the links, the optimizer, and waiting for the slowest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from ldm.plan.hardware import GB, Assumptions, Hardware
from ldm.plan.links import Wire, ZeroPP, wire
from ldm.plan.memory import Activations
from ldm.plan.scale import largest_of_normals
from ldm.plan.streaming import Streamed, waited
from ldm.plan.trace import Op


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`nodes` of `per_node` accelerators."""

    nodes: int
    per_node: int
    hardware: Hardware
    assumptions: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        for name in ("nodes", "per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def world(self) -> int:
        """Accelerators in all."""
        return self.nodes * self.per_node

    def link(self) -> float:
        """Bytes a second that every rank of a ring over all of them moves; its slowest hop is between nodes."""
        inside = self.hardware.inside if self.per_node > 1 else float("inf")
        outside = self.hardware.outside if self.nodes > 1 else float("inf")
        return self.assumptions.link * min(inside, outside) * GB

    def hiding(self, sent: Wire) -> float:
        """Seconds of the collectives that can hide; the ranks of a node share its ports."""
        share, chip = self.assumptions.link * GB, self.hardware
        ports = self.per_node * sent.ports / (share * chip.outside)
        return sent.hidden / self.link() + sent.inside / (share * chip.inside) + ports


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one optimizer step by part; what hides behind computing is neither in `links` nor in `moving`, the
    copies between the host's memory and the device.
    """

    compute: float
    frozen: float
    optimizer: float
    links: float
    stragglers: float
    other: float
    moving: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


def kernels(ops: Sequence[tuple[Op, Op]], batch: float, few: int, more: int, cluster: Cluster, half: bool) -> float:
    """Seconds of kernels at `batch` samples, from their counts at two others: each bound by products or by memory."""
    chip, share = cluster.hardware, cluster.assumptions
    rate = (chip.matmul if half else chip.matmul_fp32) * 1e12 * share.matmul
    moved = chip.bandwidth * GB * share.memory
    at = (batch - few) / (more - few) if more != few else 0.0
    total = 0.0
    for low, high in ops:
        flops = low.flops + at * (high.flops - low.flops)
        size = low.bytes + at * (high.bytes - low.bytes)
        total += flops / rate + size / moved if chip.host else max(flops / rate, size / moved)
    return total if chip.host else max(total, len(ops) * share.launch)  # the host runs ahead of the kernels, or behind


def compute(activations: Activations, batch: float, cluster: Cluster, half: bool) -> tuple[float, float]:
    """(forward, backward) seconds of one micro-batch."""
    few, more = activations.few, activations.more
    if few.batch == more.batch:  # one count, to which all is proportional
        few = replace(more, batch=0, ops=tuple(replace(o, flops=0.0, bytes=0.0) for o in more.ops))
    at = few.batch / more.batch
    # A layer may compute in another way at a larger batch (a LoRA does): then all is taken as proportional to it.
    alike = len(few.ops) == len(more.ops)
    low = few.ops if alike else [replace(o, flops=o.flops * at, bytes=o.bytes * at) for o in more.ops]
    pairs = list(zip(low, more.ops, strict=True))
    parts = ([p for p in pairs if not p[0].backward], [p for p in pairs if p[0].backward])
    forward, backward = (kernels(p, batch, few.batch, more.batch, cluster, half) for p in parts)
    return forward, backward


def drawing_time(activations: Activations, flops: float, count: int, rows: int, cluster: Cluster) -> float:
    """Seconds until `count` pictures of `flops` each are drawn in float32 by all ranks, `rows` in a forward pass.

    Networks without gradients are as much bound by memory as the trained one's forward pass.
    """
    ideal = cluster.hardware.matmul_fp32 * 1e12 * cluster.assumptions.matmul
    more = activations.more
    products = sum(o.flops for o in more.ops if not o.backward) / more.batch * rows
    slower = compute(activations, rows, cluster, half=False)[0] * ideal / products if products else 1.0
    return math.ceil(count / cluster.world) * flops / ideal * max(1.0, slower)


def step_time(
    *,
    activations: Activations,
    micro: float,
    accumulate: int,
    weights: int,
    stage: int,
    cluster: Cluster,
    half: bool,
    copies: int = 1,
    frozen_flops: float = 0.0,
    element: int = 4,
    live: int = 1_000_000_000,
    zeropp: ZeroPP | None = None,
    streamed: Streamed | None = None,
    offload: bool = False,
) -> Step:
    """One optimizer step of `accumulate` micro-batches of `micro` samples a rank.

    `streamed`: frozen blocks that come and go; `offload`: the optimizer is in the host's memory.
    """
    share, chip = cluster.assumptions, cluster.hardware
    forward, backward = compute(activations, micro, cluster, half)
    busy = accumulate * (forward + backward)
    rate = (chip.matmul if half else chip.matmul_fp32) * 1e12 * share.matmul
    # Frozen networks are as much bound by memory as the trained one, of which the count knows how much.
    slower = sum(o.flops for o in activations.more.ops if not o.backward) / activations.more.batch / rate
    frozen = accumulate * micro * frozen_flops / rate * (forward / micro / slower if slower else 1.0)
    held = weights / cluster.world if stage else weights
    slot = chip.pcie * GB * share.pcie
    update = share.host * GB if offload else chip.bandwidth * GB * share.stream
    optimizer = held * (28 + 12 * copies) / update  # bytes of Adam and of averages
    moving = 2 * element * held / slot if offload else 0.0  # gradients there, weights back
    if streamed is not None:
        moving += accumulate * waited(streamed.moved(backward=True), slot, busy / accumulate, streamed.ahead)
    sent = wire(
        weights, stage, cluster.world, element=element, micro_steps=accumulate, live=live, zeropp=zeropp,
        node=cluster.per_node,
    )  # fmt: skip
    reducing = cluster.hiding(sent)
    room = (backward if stage < 2 else accumulate * backward) + (accumulate * forward if stage == 3 else 0.0)
    waiting = reducing - min(share.overlap * reducing, room)
    links = waiting + sent.exposed / cluster.link()
    slowest = share.jitter * largest_of_normals(cluster.world) * (busy + frozen)
    return Step(
        compute=busy, frozen=frozen, optimizer=optimizer, links=links, stragglers=slowest, other=share.step,
        moving=moving,
    )  # fmt: skip
