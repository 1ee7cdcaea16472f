"""A simulated cluster: step time against nodes with stragglers, checkpoints and failures, beside the closed forms.

It measures nothing of this machine: every figure is the simulation of the model in docs/scale.md at stated constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.timing import Options
from ldm.plan.hardware import Assumptions, find
from ldm.plan.links import ZeroPP
from ldm.plan.scale import daly, goodput, largest_of_normals, wall_time, young
from ldm.plan.throughput import Cluster, wire

PSI = 865_910_724
"""Weights of the U-Net of Stable Diffusion 2."""
COMPUTE = {256: 6.45e-3, 512: 27.2e-3}
"""Seconds an image on one A100 by `ldm plan` (512 and 64 latent pixels a side / 256 and 32), forward and backward."""
MTBF = 5e4 * 3600.0
"""Seconds between failures of one accelerator with its share of node, link and disk; see docs/scale.md."""


@dataclass(frozen=True, kw_only=True)
class Life:
    """Of a run under failures. Seconds; `failures` is the mean time between those of the whole cluster."""

    interval: float
    cost: float
    restart: float
    failures: float


def straggle(generator: np.random.Generator, ranks: int, steps: int, jitter: float) -> float:
    """Mean of the slowest rank's time over `steps` steps, each rank's normal with mean 1."""
    total, left = 0.0, steps
    while left:
        part = min(left, max(1, 2_000_000 // ranks))
        total += float((1 + jitter * generator.standard_normal((part, ranks))).max(axis=1).sum())
        left -= part
    return total / steps


def live(generator: np.random.Generator, life: Life, work: float) -> float:
    """Wall time until `work` seconds of progress are done; one history."""
    clock = done = 0.0
    until = generator.exponential(life.failures)
    while done < work:
        piece = min(life.interval, work - done)
        need = piece + life.cost
        if until >= need:
            until -= need
            clock += need
            done += piece
            continue
        clock += until  # what was done since the last checkpoint is lost
        until = generator.exponential(life.failures)
        while until < life.restart:  # a failure while restarting
            clock += until
            until = generator.exponential(life.failures)
        clock += life.restart
        until -= life.restart
    return clock


def simulated_goodput(life: Life, work: float, histories: int, seed: int = 0) -> tuple[float, float]:
    """Mean share of time that is progress, and its standard error."""
    generator = np.random.default_rng(seed)
    shares = [work / live(generator, life, work) for _ in range(histories)]
    return float(np.mean(shares)), float(np.std(shares) / math.sqrt(histories))


def step(
    pixels: int, nodes: int, batch: int, stage: int, assumptions: Assumptions, hardware: str = "a100-80g"
) -> float:
    """Seconds of a step on nodes of 8, without stragglers."""
    cluster = Cluster(nodes=nodes, per_node=8, hardware=find(hardware), assumptions=assumptions)
    busy = COMPUTE[pixels] * batch / cluster.world
    sent = wire(PSI, stage, cluster.world, live=0)  # the least memory, for which stage 3 is taken
    reducing = sent.hidden / cluster.link()
    room = busy * (1.0 if stage == 3 else 2 / 3)
    return (
        busy + reducing - min(assumptions.overlap * reducing, room) + sent.exposed / cluster.link() + assumptions.step
    )


def run(options: Options) -> dict[str, Any]:
    """Simulate, print, and give the curves as plain data; the page is written where figures are kept."""
    few = options.quick
    nodes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assumed = Assumptions()
    generator = np.random.default_rng(0)
    rows = []
    for n in nodes[:4] if few else nodes:
        ranks = 8 * n
        slow = straggle(generator, ranks, 200 if few else 4000, assumed.jitter)
        failures = MTBF / ranks
        cost, restart = 20.0, 600.0
        best = daly(cost, failures)
        life = Life(interval=best, cost=cost, restart=restart, failures=failures)
        share, error = simulated_goodput(life, 40 * failures, 4 if few else 60, seed=n)
        rows.append({
            "nodes": n,
            "gpus": ranks,
            "seconds": {p: step(p, n, 2048, 2, assumed) for p in COMPUTE},
            "seconds_weak": {p: step(p, n, 16 * ranks, 2, assumed) for p in COMPUTE},
            "slowest": slow,
            "slowest_closed": 1 + assumed.jitter * largest_of_normals(ranks),
            "interval": best,
            "young": young(cost, failures),
            "goodput": share,
            "goodput_error": error,
            "goodput_closed": goodput(best, cost, restart, failures),
            "goodput_every_2h": 1 / wall_time(1.0, 7200.0, cost, restart, failures),
        })  # fmt: skip
    _print(rows)
    found = points(assumed)
    _print_points(found)
    if not few:
        _page(rows, Path("runs/bench/scale.html"))
    return {"rows": rows, "points": found}


SIZES = {"SD 2": PSI, "SDXL": 2_567_463_684, "12 G": 12_000_000_000}
"""Weights of U-Nets for which ways to divide are compared."""


def points(assumed: Assumptions) -> dict[str, Any]:
    """Where each way to divide pays on 16 nodes of 8: gigabytes of states a GPU, and seconds of links in a step.

    The network is the hardware's own, and one of a single port of 100 Gb/s a node.
    """
    between = Cluster(nodes=16, per_node=8, hardware=find("a100-80g"), assumptions=assumed)
    slow = replace(between, hardware=replace(between.hardware, outside=12.5))
    return {
        name: {
            "gigabytes": {**{f"ZeRO-{s}": per_weight(s, 128) * psi / 1e9 for s in range(4)}}
            | {"hybrid": per_weight(3, 8) * psi / 1e9, "ZeRO++": (per_weight(3, 128) + 4 / 8) * psi / 1e9},
            "seconds": link_seconds(psi, between),
            "seconds, one port": link_seconds(psi, slow),
        }
        for name, psi in SIZES.items()
    }


ALL = ZeroPP(part=8, weights=True, gradients=True)


def link_seconds(psi: float, between: Cluster) -> dict[str, float]:
    """What the links take in a step of one micro-batch, nothing of it hidden.

    Hybrid: stage 3 within a node, and each GPU's share of the gradients reduced between nodes, where the GPUs of a node
    share its ports; it pays where the link within a node is 3 times as fast as that network. ZeRO++ as `ldm.plan.links`
    has it: weights in 8 bits of the 32, gradients in 4, and the gather of the backward pass within the node.
    """
    inside = replace(between, nodes=1).link()
    once, link = 4.0 * psi, between.link()
    return {
        "ZeRO-1, 2": 2 * once / link,
        "ZeRO-3": 3 * once / link,
        "hybrid": 3 * once / inside + 2 * once / link,
        "ZeRO++": between.hiding(wire(int(psi), 3, between.world, live=0, zeropp=ALL, node=between.per_node)),
    }


def per_weight(stage: int, ranks: int, copies: int = 1) -> float:
    """Bytes a weight of states and gradients in float32, with averages."""
    if stage == 0:
        return 16.0 + 4 * copies
    divided = (12.0 + 4 * copies) / ranks
    return {1: 8.0, 2: 4.0 + 4.0 / ranks, 3: 8.0 / ranks}[stage] + divided


def _print(rows: list[dict[str, Any]]) -> None:
    print("simulated: U-Net of Stable Diffusion 2 on nodes of 8 A100, batch 2048, ZeRO-2")
    head = ("GPUs", "256 px s", "512 px s", "slowest", "closed", "save every s", "goodput", "closed")
    print("".join(f"{h:>14}" for h in head))
    for r in rows:
        values = (
            r["gpus"], r["seconds"][256], r["seconds"][512], r["slowest"], r["slowest_closed"], r["interval"],
            r["goodput"], r["goodput_closed"],
        )  # fmt: skip
        print("".join(f"{v:14.4g}" for v in values))


def _print_points(found: dict[str, Any]) -> None:
    print("128 GPUs on 16 nodes; states in GB a GPU, links in seconds a step of one micro-batch")
    for what in found["SD 2"]:
        print(what)
        names = list(found["SD 2"][what])
        print(f"{'':>8}" + "".join(f"{n:>12}" for n in names))
        for name, row in found.items():
            print(f"{name:>8}" + "".join(f"{row[what][n]:12.3g}" for n in names))


def _page(rows: list[dict[str, Any]], path: Path) -> None:
    from ldm.web.chart import Curve
    from ldm.web.gallery import Gallery

    gpus = [float(r["gpus"]) for r in rows]
    page = Gallery(
        "Scaling on paper", "A simulated cluster of nodes of 8 A100; constants in docs/scale.md.", "bench scale"
    )
    section = page.section("Step time", "Batch 2048 whatever the number of GPUs: links stop hiding behind the compute.")
    section.curve(
        [Curve(f"{p} px", gpus, [r["seconds"][p] for r in rows]) for p in COMPUTE], "GPUs", "seconds", log_y=True
    )
    ideal = {p: [rows[0]["seconds"][p] * gpus[0] / g / r["seconds"][p] for g, r in zip(gpus, rows)] for p in COMPUTE}
    page.section("Efficiency", "Share of the speed-up that a perfect cluster would have, from the first size.").curve(
        [Curve(f"{p} px, batch 2048", gpus, ideal[p]) for p in COMPUTE]
        + [Curve(f"{p} px, 16 images a GPU", gpus, [rows[0]["seconds_weak"][p] / r["seconds_weak"][p] for r in rows])
           for p in COMPUTE], "GPUs", "efficiency",
    )  # fmt: skip
    page.section("The slowest rank", "Its time over the mean: simulated, and the Gumbel limit.").curve(
        [Curve("simulated", gpus, [r["slowest"] for r in rows]),
         Curve("closed form", gpus, [r["slowest_closed"] for r in rows])], "GPUs", "slowest / mean",
    )  # fmt: skip
    page.section("Goodput", "Share of the time that is progress, under failures: simulated and Daly's formula.").curve(
        [Curve("simulated, best interval", gpus, [r["goodput"] for r in rows]),
         Curve("closed form", gpus, [r["goodput_closed"] for r in rows]),
         Curve("closed form, every two hours", gpus, [r["goodput_every_2h"] for r in rows])], "GPUs", "goodput",
    )  # fmt: skip
    page.write(path)
    print(f"written: {path}")
