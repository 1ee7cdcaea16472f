"""Repeats in a plan: the network's work and activations as often, the encoders' once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm.config.schema import load_run
from ldm.plan.hardware import find
from ldm.plan.memory import memory
from ldm.plan.report import Planner
from ldm.plan.throughput import Cluster
from ldm.recipes import plan_job
from ldm.recipes.planned import Asked
from tests import miniature


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("project"))
    miniature.teacher(root)
    return root


def planner(tree: dict[str, Any], batch: int, **options: Any) -> Planner:
    tree = tree | {"train": miniature.train(batch=batch), "task": tree["task"] | {"options": options}}
    run = load_run(tree)
    job = plan_job(run.task, run.data, run.train, Asked(name="x", world=1, gpu=True))
    return Planner(job, Cluster(nodes=1, per_node=1, hardware=find("a100-80g")), recomputing=(False,))


@pytest.mark.parametrize("kind", ["text_to_image", "finetune"])
def test_repeats_are_a_larger_batch_of_the_network(root: Path, kind: str) -> None:
    """Four samples three times take what twelve take, and a sample's operations are three times those of one."""
    tree = miniature.text_to_image(root)
    if kind == "finetune":
        task = {"kind": "finetune", "base": str(root / "teacher"), "cache": str(root / "cache")}
        tree |= {"task": task | {"adapter": {"kind": "full"}}}
    thrice, once = planner(tree, 4, repeats=3), planner(tree, 12)
    assert thrice.plan().flops_per_image == pytest.approx(3 * once.plan().flops_per_image, rel=1e-3)
    assert thrice.frozen_flops == once.frozen_flops
    ours, theirs = (
        memory(p.sizes, p.activations[False], micro, replace(p.job.layout, stage=0), p.frozen_bytes)
        for p, micro in ((thrice, 4), (once, 12))
    )
    assert ours.activations == pytest.approx(theirs.activations, rel=0.03)
    assert (
        ours.activations
        > 2
        * memory(
            once.sizes, once.activations[False], 4, replace(once.job.layout, stage=0), once.frozen_bytes
        ).activations
    )


def test_all_levers_are_counted(root: Path) -> None:
    """By the loss itself; of micro-batches that would not divide into pairs, too."""
    task = {"kind": "finetune", "base": str(root / "teacher"), "adapter": {"kind": "lora", "text": True}}
    tree = miniature.text_to_image(root) | {"task": task}
    levers = {"contrastive": 0.05, "assign": "optimal", "repeats": 2, "drop": 0.1, "drop_warmup": 10}
    ours, plain = (planner(tree, 4, **options).plan().flops_per_image for options in (levers, {}))
    print(ours / plain)
    assert 1.5 * plain < ours < 2 * plain, "the text encoder that trains runs once"
