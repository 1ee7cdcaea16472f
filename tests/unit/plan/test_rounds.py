"""Rounds after each other and pictures before the first step, beside the plans of each alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.plan import rounds
from ldm.plan.hardware import find
from ldm.plan.memory import Activations, Layout
from ldm.plan.report import Drawn, Job, Planner, text
from ldm.plan.throughput import Cluster, drawing_time
from ldm.web.plan import page

GPUS = Cluster(nodes=1, per_node=2, hardware=find("a100-80g"))


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, width, bias=False), nn.Linear(width, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def job(width: int, steps: int, **more: Any) -> Job:
    def build(recompute: bool) -> nn.Module:
        with torch.device("meta"):
            return Wide(width)

    return Job(
        name="run", build=build, inputs=lambda b: (torch.empty(b, 64, device="meta"),), flops=None, batch=512,
        steps=steps, layout=Layout(stage=1, world=2), recompute=False, precision=torch.float32, **more,
    )  # fmt: skip


def test_rounds_are_the_sum_of_their_times_and_the_most_of_their_memory() -> None:
    narrow, wide = job(256, 10, round="a", warnings=("one",)), job(4096, 30, round="b", warnings=("one", "two"))
    alone = [Planner(j, GPUS, 3.0).plan() for j in (narrow, wide)]
    found = rounds.plan(replace(narrow, then=(wide,)), GPUS, 3.0)
    points = [p.point for p in alone]
    assert found.point is not None
    assert all(points)
    assert found.steps == 40
    assert found.point.days == pytest.approx(sum(p.days for p in points if p))
    assert found.point.cost == pytest.approx(sum(p.cost or 0 for p in points if p))
    assert found.point.step.total * 40 == pytest.approx(found.point.days * 86400)
    assert [p.gpus for p in found.sweep] == [2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert found.chosen.parts == alone[1].chosen.parts
    assert found.chosen in found.fits
    assert found.weights == 2 * 64 * 4096
    assert (alone[0].flops_per_image * 10 + alone[1].flops_per_image * 30) / 40 == pytest.approx(found.flops_per_image)
    assert [(r.name, r.steps, r.memory) for r in found.rounds] == [
        ("a", 10, alone[0].chosen.parts.total),
        ("b", 30, alone[1].chosen.parts.total),
    ]
    assert found.warnings[1:] == ("one", "two")
    assert "40 steps and their time are of all together" in found.warnings[0]
    said = text(found)
    assert "a:                 10 steps of" in said
    assert "b:                 30 steps of" in said
    assert "One after the other" in page(found).html()


def test_one_round_is_a_plan_as_before() -> None:
    assert rounds.plan(job(256, 10), GPUS) == Planner(job(256, 10), GPUS).plan()
    assert rounds.plan(job(256, 10), GPUS).rounds == ()


def test_where_a_round_cannot_run_there_is_no_time() -> None:
    odd = replace(job(256, 10, round="odd"), batch=511)
    assert rounds.plan(replace(job(256, 10, round="even"), then=(odd,)), GPUS).point is None


def test_pictures_before_the_first_step_take_their_share_of_time() -> None:
    chip = find("a100-80g")
    counted = Activations.count(Wide(4096).to("meta"), job(4096, 1).inputs, precision=torch.float32, gpu=True, batch=64)
    ideal = 1e12 / (156e12 * GPUS.assumptions.matmul)  # seconds of a picture of 10^12 operations on one GPU
    one = Cluster(nodes=1, per_node=1, hardware=chip)
    took = drawing_time(counted, 1e12, 100, 64, one)
    assert took >= 100 * ideal
    assert drawing_time(counted, 1e12, 100, 64, GPUS) == pytest.approx(took / 2)
    assert drawing_time(counted, 1e12, 3, 64, GPUS) == drawing_time(counted, 1e12, 4, 64, GPUS)
    assert drawing_time(counted, 1e12, 100, 8, one) > took  # a small batch leaves the GPU idle

    drawn = Drawn(name="class pictures", count=100, flops=1e12, rows=64)
    found, before = rounds.plan(job(4096, 10, drawn=drawn), GPUS).point, rounds.plan(job(4096, 10), GPUS).point
    assert found is not None
    assert before is not None
    assert found.drawing > 50 * ideal
    assert found.days - before.days == pytest.approx(found.drawing / 86400)
    assert found.step == before.step
    said = rounds.plan(job(4096, 10, drawn=drawn), GPUS)
    assert "100 class pictures are drawn in" in text(said)
    assert "of it for 100 class pictures" in page(said).html()
