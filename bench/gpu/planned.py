"""What the planner says of the same steps: `python -m bench.gpu.planned RESULT SPEC`, beside the measurement.

Operations an image are those of the networks as they are defined: what either side leaves out by better algebra
counts as done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.gpu import families, training
from bench.gpu.card import hardware_from
from bench.gpu.families import FAMILIES, HALF, Family
from ldm.models.networks import build
from ldm.plan.memory import Activations, Layout, Sizes, memory
from ldm.plan.throughput import Cluster, compute, step_time

GB = 1e9
LAYOUT = Layout(stage=0, world=1, copies=0)
"""As a single card trains, without averages of the weights."""


def network_of(family: Family) -> Any:
    """Ours without memory."""
    with torch.device("meta"):
        return build(family.config).train()


def inputs(family: Family, dtype: torch.dtype = torch.float32) -> Any:
    """Arguments of the network by batch."""

    def made(rows: int) -> tuple[Any, ...]:
        told = families.given(family, rows, "meta", dtype)
        return told.x, told.t, told.cond

    return made


def trained(family: Family, lora: bool, gpu: bool) -> tuple[nn.Module, float]:
    """What trains, and bytes of what does not; plans for a CPU count in float32."""
    network = network_of(family)
    with torch.device("meta"):
        made = training.trained_of(network, lora)
    if not gpu:
        network.float()
    return made, 2.0 * sum(p.numel() for p in network.parameters()) if lora else 0.0


def of_training(family: Family, lora: bool, cluster: Cluster) -> dict[str, Any]:
    """Operations an image, and by batch seconds a step and GB at the fullest moment."""
    gpu = not cluster.hardware.host
    module, frozen = trained(family, lora, gpu)
    counted = Activations.count(module, inputs(family), precision=HALF if gpu else torch.float32, gpu=gpu, one=True)
    sizes = Sizes.of(module)
    found: dict[str, Any] = {"flops": sum(o.flops for o in counted.few.ops) / counted.few.batch, "batches": {}}
    batch = family.batch
    while batch:
        step = step_time(
            activations=counted, micro=batch, accumulate=1, weights=sizes.weights, stage=0, cluster=cluster, half=gpu,
            copies=0,
        )  # fmt: skip
        held = memory(sizes, counted, batch, LAYOUT, frozen).total
        found["batches"][str(batch)] = {"seconds": step.total, "peak_gb": held / GB}
        batch //= 2
    return found


def of_drawing(family: Family, cluster: Cluster) -> dict[str, Any]:
    """Operations of a picture and seconds of a batch: forward passes alone, of both halves of guidance."""
    gpu = not cluster.hardware.host
    network = network_of(family).to(HALF if gpu else torch.float32)
    counted = Activations.count(network, inputs(family), precision=HALF if gpu else torch.float32, gpu=gpu)
    each = 2 if family.guidance != 1 else 1
    forward = sum(o.flops for o in counted.few.ops if not o.backward) / counted.few.batch
    seconds = family.steps * compute(counted, each * family.drawn, cluster, gpu)[0]
    return {
        "flops": each * family.steps * forward,
        "batches": {str(family.drawn): {"seconds": seconds, "peak_gb": None}},
    }


def main(argv: list[str]) -> int:
    """Plan every family of a specification; the file is written anew after each."""
    path, spec = Path(argv[0]), json.loads(argv[1])
    cluster = Cluster(nodes=1, per_node=1, hardware=hardware_from(spec["machine"]))
    found: dict[str, Any] = {}
    for name, what in spec["asked"]:
        family = families.tiny(FAMILIES[name]) if spec["quick"] else FAMILIES[name]
        known = of_drawing(family, cluster) if what == "sampling" else of_training(family, what == "lora", cluster)
        found[f"{name} {what}"] = known
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps(found), encoding="utf-8")
        whole.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
