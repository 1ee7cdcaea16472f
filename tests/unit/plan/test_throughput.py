"""Planned throughput against MosaicML's published table of Stable Diffusion 2; bytes on the wire against theory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ldm.models.presets import UNETS
from ldm.models.unet import UNet
from ldm.plan.flops import count_flops
from ldm.plan.hardware import find
from ldm.plan.memory import Layout
from ldm.plan.report import Job, Planner
from ldm.plan.throughput import Cluster, wire

PUBLISHED = {
    256: {1: 1100, 4: 4080, 16: 11600},
    512: {1: 290, 4: 1195, 16: 4590},
}
"""Images a second by pixels and nodes of 8 A100, latents and text cached, global batch 2048."""


def job(pixels: int, stage: int = 2) -> Job:
    side, config = pixels // 8, UNETS["sd21_base"]

    def build(recompute: bool) -> UNet:
        with torch.device("meta"):
            unet = UNet(config).train()
        unet.enable_gradient_checkpointing(recompute)
        return unet

    def inputs(batch: int) -> tuple[Any, ...]:
        text = torch.empty(batch, 77, 1024, device="meta")
        return torch.empty(batch, 4, side, side, device="meta"), torch.empty(batch, device="meta"), {"text": text}

    return Job(
        name="sd2", build=build, inputs=inputs, flops=count_flops(build(False), *inputs(1)), batch=2048, steps=550_000,
        layout=Layout(stage=stage, world=1), recompute=False, precision=torch.bfloat16,
    )  # fmt: skip


@pytest.fixture(scope="module")
def planners() -> dict[int, Planner]:
    cluster = Cluster(nodes=1, per_node=8, hardware=find("a100-80g"))
    return {pixels: Planner(job(pixels), cluster, price=2.0, recomputing=(False,)) for pixels in PUBLISHED}


@pytest.mark.parametrize("pixels", PUBLISHED)
def test_throughput_is_that_of_the_published_table(planners: dict[int, Planner], pixels: int) -> None:
    """One set of constants; their training shards gradients and optimizer, as stage 2 does."""
    for nodes, published in PUBLISHED[pixels].items():
        point = planners[pixels].point(Cluster(nodes=nodes, per_node=8, hardware=find("a100-80g")))
        assert point is not None
        off = point.images_per_second / published - 1
        print(f"{pixels} px, {8 * nodes} GPUs: {point.images_per_second:.0f} ({off:+.1%})")
        assert point.images_per_second == pytest.approx(published, rel=0.15)
        assert point.days * 86400 == pytest.approx(550_000 * 2048 / point.images_per_second)
        assert point.cost == pytest.approx(point.days * 24 * 8 * nodes * 2.0)


def test_what_limits_large_clusters_is_physical(planners: dict[int, Planner]) -> None:
    """Slower links cost small pictures on many GPUs, where they are the limit, and not large ones on few."""

    def left(pixels: int, nodes: int) -> float:
        chip = find("a100-80g")
        fast, slow = (
            planners[pixels].point(Cluster(nodes=nodes, per_node=8, hardware=replace(chip, outside=chip.outside * f)))
            for f in (1, 0.5)
        )
        assert slow is not None
        assert fast is not None
        return slow.images_per_second / fast.images_per_second

    assert left(256, 16) < 0.82
    assert left(512, 4) > 0.95
    small, large = (planners[256].point(Cluster(nodes=n, per_node=8, hardware=find("h100"))) for n in (1, 16))
    assert small is not None
    assert large is not None
    assert small.images_per_second > 1.5 * 1100
    assert large.images_per_second < 16 * small.images_per_second


def test_the_flops_of_an_image_are_the_published_count(planners: dict[int, Planner]) -> None:
    """181 and 804 GFLOP forward at 32 and 64 latent pixels a side; the traced step is three times that."""
    for pixels, forward in ((256, 181e9), (512, 804e9)):
        planner = planners[pixels]
        assert planner.job.flops == pytest.approx(forward, rel=0.01)
        traced = sum(op.flops for op in planner.activations[False].few.ops) / planner.activations[False].few.batch
        assert traced == pytest.approx(3 * forward, rel=0.04)  # fused attention computes its products once more


@pytest.mark.parametrize(
    ("stage", "live", "psi"), [(0, 0, 2), (1, 0, 2), (2, 0, 2), (3, 0, 3), (3, 250_000, 2.75), (3, 10**9, 2)]
)
def test_bytes_on_the_wire(stage: int, live: int, psi: float) -> None:
    """2 psi elements, and one more where stage 3 gathers weights twice, of which (N-1)/N leave a rank."""
    assert wire(1_000_000, stage, 8, live=live).total == pytest.approx(psi * 4e6 * 7 / 8)
    assert wire(1_000_000, stage, 1, live=live).total == 0
