"""Bytes that a rank sends in a step: collectives of the ZeRO stages, and what ZeRO++ saves of them between nodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ZeroPP:
    """ZeRO++ (Wang et al. 2023, arXiv 2306.10209) at stage 3: `part` ranks hold a second copy of the weights (1: none);
    weights are gathered in 8 bits; gradients are reduced in 4. Scales of the groups are not counted.
    """

    part: int = 1
    weights: bool = False
    gradients: bool = False

    def effective(self, world: int) -> ZeroPP:
        """As the engine runs it: no second copy where one group would hold all ranks."""
        part = self.part if self.part < world else 1
        return ZeroPP(part=part, weights=self.weights, gradients=self.gradients) if world > 1 else ZeroPP()

    def copy(self, weights: int, world: int, *, element: int, live: int, accumulate: int) -> tuple[float, float]:
        """Bytes of the second copy at the end of the forward pass, and in the optimizer's step.

        It is made of what the forward pass lets go (all of it, where micro-batches came before), and of the rest when
        the step begins, and goes with the new weights.
        """
        if (part := self.effective(world).part) == 1:
            return 0.0, 0.0
        gone = weights if accumulate > 1 else max(0, weights - live)
        return element * gone / part, element * weights / part


@dataclass(frozen=True, kw_only=True)
class Wire:
    """Bytes that a rank sends in a step. Around a ring over all ranks: what can hide behind the backward pass, and what
    cannot. `inside` its node, and through `ports` that its node shares: what can hide.
    """

    hidden: float
    exposed: float
    inside: float = 0.0
    ports: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.hidden + self.exposed + self.inside + self.ports


def wire(
    weights: int,
    stage: int,
    world: int,
    *,
    element: int = 4,
    micro_steps: int = 1,
    live: int = 1_000_000_000,
    zeropp: ZeroPP | None = None,
    node: int | None = None,
) -> Wire:
    """Collectives of a step: 2 psi elements, and 2 to 3 psi under stage 3 (a micro-step), times (N-1)/N.

    Stage 0 reduces and gathers gradients, 1 and 2 scatter them and gather the new weights when the optimizer is done,
    3 gathers weights before the forward pass, and for the backward pass those beyond `live`, which stayed. Gradients of
    stage 2 and 3 are reduced in each micro-step. `node`: how many of the ranks are in one (None: all).
    """
    if world == 1:
        return Wire(hidden=0.0, exposed=0.0)
    once = weights * element * (world - 1) / world
    if stage == 0:
        return Wire(hidden=2 * once, exposed=0.0)
    if stage == 3:
        again = max(0, weights - live) / weights if weights else 0.0
        return _third(weights, world, element, micro_steps, again, (zeropp or ZeroPP()).effective(world), node or world)
    return Wire(hidden=once * (micro_steps if stage == 2 else 1), exposed=once)


def _third(weights: int, world: int, element: int, micro_steps: int, again: float, zeropp: ZeroPP, node: int) -> Wire:
    """Stage 3. With a second copy only the first gather of a step passes all ranks; `again`: gathered for the backward
    pass, of 1. Gradients in 4 bits are exchanged within nodes, and a node's share of their sums between nodes.
    """
    nodes, others = world // node, (world - 1) / world
    gathered = weights * (1 if zeropp.weights else element)
    first, more = (1.0, (1 + again) * micro_steps - 1) if zeropp.part > 1 else ((1 + again) * micro_steps, 0.0)
    second = more * gathered * (zeropp.part - 1) / zeropp.part
    within = node % zeropp.part == 0  # groups that span nodes use the links between them
    over_all, inside, ports = first * gathered * others + (0.0 if within else second), second if within else 0.0, 0.0
    if zeropp.gradients and nodes > 1:
        inside += micro_steps * weights / 2 * (node - 1) / node
        ports = micro_steps * weights / 2 / node * (nodes - 1) / nodes
    else:
        over_all += micro_steps * weights * element * others
    return Wire(hidden=over_all, exposed=0.0, inside=inside, ports=ports)


def advice(zeropp: ZeroPP, *, weights: int, live: int, accumulate: int, world: int, node: int) -> list[str]:
    """What is wrong with ZeRO++ on so many ranks, `node` in each node, or costs memory for nothing."""
    part, said = zeropp.part, []
    if 1 < part < world and world % part:
        said.append(f"train.engine.hpz_partition: {part} does not divide {world} GPUs, so the run will not start")
    elif 1 < world <= part:
        said.append(f"train.engine.hpz_partition: {part} is off, as {world} GPUs are no more than one group")
    elif part > 1 and node % part:
        said.append(
            f"train.engine.hpz_partition: groups of {part} span nodes of {node}; what they gather leaves the node"
        )
    elif 1 < part < world and accumulate == 1 and live >= weights:
        said.append("train.engine.hpz_partition: nothing is gathered twice, as engine.live keeps all weights; lower it")
    if zeropp.gradients and 1 < world <= node:
        said.append(f"train.engine.quantized_gradients: off, as {world} GPUs are within one node")
    return said
