"""Alignment and small first at every ZeRO stage on one and two ranks: plain PyTorch's losses; and exact resumes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ldm import dist
from ldm.cli.__main__ import main
from ldm.objectives.align import AlignOptions
from ldm.objectives.denoise import DenoiseObjective
from ldm.objectives.small import SmallOptions
from ldm.rng import Rng
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from tests import miniature, ranks
from tests.distributed import tiny
from tests.unit.objectives.test_align import with_alignment

STEPS = 4
ALIGN = AlignOptions(hidden=9, until=3)


def build() -> DenoiseObjective:
    """Small until step 2, aligned until step 3."""
    return with_alignment(tiny.build(small=SmallOptions(until=2, scale=1.5)), ALIGN)


def batches(step: int, rank: int, world: int) -> list[Any]:
    found = tiny.micro_batches(step, rank, world, 1)
    for batch in found:
        batch["features"] = Rng.of(4, batch["position"]).normal("features", (5, 3, 3))
    return found


def plain() -> list[float]:
    """On one process, with torch alone."""
    objective, losses = build(), []
    groups = [
        {"params": [p for p in objective.parameters() if p.ndim > 1], "weight_decay": tiny.OPTIM.weight_decay},
        {"params": [p for p in objective.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=tiny.OPTIM.betas, eps=tiny.OPTIM.eps, foreach=False)
    for step in range(STEPS):
        objective.after_step(step)
        for group in adam.param_groups:
            group["lr"] = tiny.OPTIM.lr_at(step, tiny.STEPS)
        batch = batches(step, 0, 1)[0]
        loss, _ = objective(batch, Rng.of(tiny.SEED, batch["position"]))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def story(stage: int) -> tuple[list[float], dict[str, Any]]:
    """The same by the engine: mean losses, and the whole weights at the end."""
    objective = build()
    optimizer = tiny.OPTIM.build(objective.parameters())
    config = EngineConfig(zero_stage=stage, precision="fp32", clip=0.0)
    micro = tiny.BATCH // dist.world_size()
    engine = Engine(objective, optimizer, config, micro_batch=micro, accumulate=1)
    losses = []
    for step in range(STEPS):
        objective.after_step(step)
        engine.set_lr(tiny.OPTIM.lr_at(step, tiny.STEPS))
        for batch in batches(step, dist.rank(), dist.world_size()):
            loss, _ = engine.forward(batch, Rng.of(tiny.SEED, batch["position"]))
            assert engine.backward_step(loss)
            losses.append(float(dist.mean(loss)))
    return losses, dict(engine.full(engine.masters))


@pytest.fixture(scope="module")
def oracle() -> list[float]:
    return plain()


@pytest.mark.parametrize(("world", "stage"), itertools.product((1, 2), (0, 1, 2, 3)))
def test_every_stage_gives_the_losses_of_plain_pytorch(oracle: list[float], world: int, stage: int) -> None:
    found = ranks.run(story, world, stage)
    for losses, weights in found:
        assert losses == pytest.approx(oracle, rel=1e-5)
        assert losses == found[0][0]
        assert any(name.startswith("alignment.projector") for name in weights)


def run(root: Path, out: str, *overrides: str) -> None:
    assert main(["train", str(root / "config.yaml"), f"out={root / out}", *overrides]) == 0


def rows(folder: Path, name: str) -> list[Any]:
    return [json.loads(line).get(name) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_both_resumes_exactly_and_exports_the_network_alone(tmp_path: Path, capsys: Any) -> None:
    """Stopped in the middle of alignment and right before the switch; cached features of the pictures."""
    root = miniature.project(tmp_path)
    options = {
        "align": {"target": str(root / "towers"), "hidden": 12, "until": 5},
        "small": {"until": 3, "scale": 1.2},
    }
    config = miniature.text_to_image(root, options=options, cache=str(root / "cache"))
    config["task"]["samples"] = {"prompts": ["a red dot"], "settings": {"steps": 2}}
    config["train"] = miniature.train(steps=7, checkpoint={"every": 1, "keep": 0}, optim={"lr": 2.0e-3})
    miniature.write(config, root / "config.yaml")
    run(root, "whole")
    for steps in (2, 3, 5, 7):
        run(root, "parts", f"train.steps={steps}")
    assert rows(root / "parts", "loss") == rows(root / "whole", "loss")
    shown = rows(root / "whole", "alignment")
    assert [value is not None for value in shown] == [True] * 5 + [False] * 2
    ours, theirs = (load_file(next((root / o / "export" / "unet").glob("*.safetensors"))) for o in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any("projector" in name for name in theirs)
    kept: set[str] = set()
    for path in (root / "whole" / "checkpoints" / "step-7").glob("shard-*.safetensors"):
        with safe_open(path, "pt") as handle:
            kept |= {name for name in handle.keys() if "projector" in name}  # noqa: SIM118 (not a dict)
    assert {name.partition(":")[0] for name in kept} == {"w", "ema", "s.exp_avg", "s.exp_avg_sq"}
    assert main(["train", str(root / "config.yaml"), f"out={root / 'x'}", "task.options.align.target=clip_emoji"]) == 2
    assert "was begun with features='towers:" in capsys.readouterr().err
    bare = ["task.options.align=null", f"task.cache={root / 'bare'}"]
    run(root, "bare", *bare, "train.steps=1")
    refused = ["task.cache=null", f"data.path={root / 'bare'}", "data.cached=true"]
    assert main(["train", str(root / "config.yaml"), f"out={root / 'y'}", *refused]) == 2
    assert "task.options.align needs cached features of 'towers:" in capsys.readouterr().err
