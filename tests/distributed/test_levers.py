"""Levers of the denoising loss in whole runs: the same on one rank and two, and a stopped run goes on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import miniature, ranks
from tests.golden import runs

torch.set_num_threads(1)
LEVERS: dict[str, Any] = {
    "drop": 1.0, "drop_warmup": 4, "contrastive": 0.05, "assign": "optimal", "assign_among": 2, "repeats": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.project(tmp_path_factory.mktemp("levers"))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]


def train(root: Path, tree: dict[str, Any], out: str, world: int, **changes: Any) -> list[float]:
    """The losses of a run; `changes` are of its part `train`."""
    tree = tree | {"name": "levers", "out": str(root / out), "seed": 3, "train": tree["train"] | changes}
    assert ranks.run(runs.run, world, tree, timeout=400) == [0] * world
    return losses(root / out)


def test_text_to_image_on_two_ranks_and_resumed(root: Path) -> None:
    """Stopped in the middle of the ramp, whose later steps drop half of the texts and more."""
    process = {"schedule": {"kind": "flow"}, "prediction": {"kind": "velocity"}}
    tree = miniature.text_to_image(root, process=process, options=LEVERS)
    tree["task"]["samples"] = {"prompts": []}
    tree["train"] = miniature.train(steps=4, checkpoint={"every": 2, "keep": 0}, optim={"lr": 2.0e-3})
    whole = train(root, tree, "whole", 1)
    assert train(root, tree, "two", 2) == pytest.approx(whole, rel=1e-4)
    assert train(root, tree, "halves", 1, accumulate=2) == pytest.approx(whole, rel=1e-4)
    train(root, tree, "parts", 1, steps=2)
    assert train(root, tree, "parts", 1) == whole
    ours, theirs = (load_file(next((root / o / "export" / "unet").glob("*.safetensors"))) for o in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_fine_tuning_with_text_encoders_that_train(root: Path) -> None:
    adapter = {"kind": "lora", "rank": 2, "text": True, "targets": ["attention"]}
    tree = runs.KINDS["finetune, lora"](root, "tuned")
    tree["task"] |= {"adapter": adapter, "options": LEVERS, "weighting": {"kind": "soft_min_snr"}}
    one, two = (train(root, tree, f"tuned-{world}", world) for world in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)
    assert len(one) == 3


def test_a_batch_that_does_not_divide_is_refused_before_anything_else(root: Path) -> None:
    tree = miniature.text_to_image(root, options={"assign": "optimal", "assign_among": 3})
    with pytest.raises(ValueError, match=r"options.assign_among: 3 must divide a micro-batch .* which has 4 samples"):
        runs.run(tree)
