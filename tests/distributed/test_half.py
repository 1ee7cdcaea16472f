"""fp16 with its dynamic loss scale, through DeepSpeed's own scaler, on layers that a CPU computes in half precision.

DeepSpeed refuses fp16 on CPUs as slow; the tests tell it otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm import dist
from ldm.objectives import Objective
from ldm.rng import Rng
from ldm.train.ema import EmaConfig
from ldm.train.engine_config import EngineConfig
from ldm.train.log import LogConfig
from ldm.train.optim import Optim
from ldm.train.trainer import CheckpointConfig, TrainConfig, Trainer
from ldm.types import Batch, Metrics
from tests import ranks

WIDTH, BATCH, STEPS, POWER = 16, 4, 8, 10
OVERFLOWS = (2, 5)
"""Steps (from 0) whose gradients do not fit into half precision; with hysteresis 1 each halves the scale."""


class Layers(Objective):
    """Two layers, the square of their answer; some steps' loss is far too large."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)))

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        out = self.trained(batch["x"].to(next(self.trained.parameters())))
        return ((out.float() - 1).square().mean(1) * batch["weight"].to(out.device)).mean(), {}


class Rows:
    """Batches by step, each rank its part."""

    def batches(self, start: int) -> Iterator[Batch]:
        while True:
            share = BATCH // dist.world_size()
            places = [start * BATCH + dist.rank() * share + i for i in range(share)]
            heavy = 1e7 if start in OVERFLOWS else 1.0
            yield {
                "x": Rng.of(4, places).normal("x", (WIDTH,)),
                "position": torch.tensor(places),
                "weight": torch.full((share,), heavy),
                "key": [str(p) for p in places],
            }
            start += 1


def half(stage: int) -> EngineConfig:
    """Its config on a CPU, which is told that it may."""
    import deepspeed.accelerator

    accelerator = deepspeed.accelerator.get_accelerator()
    accelerator.is_fp16_supported = lambda: True  # type: ignore[method-assign]
    torch.cuda.is_available = lambda: True  # for the config's own check
    engine = EngineConfig(zero_stage=stage, precision="fp16", clip=0.0, loss_scale_power=POWER)
    torch.cuda.is_available = lambda: False
    return engine


def trained(stage: int, folder: str, steps: int, device: str = "cpu") -> dict[str, Any]:
    """A run of the trainer: what it averaged step by step, its log, and the scale it ends with."""
    if device == "cpu":
        engine = half(stage)
    else:
        engine = EngineConfig(zero_stage=stage, precision="fp16", clip=0.0, loss_scale_power=POWER)
    config = TrainConfig(
        steps=steps, batch=BATCH, optim=Optim(lr=1e-2), engine=engine, ema=EmaConfig(decay=0.5, warmup=False),
        checkpoint=CheckpointConfig(every=3, keep=1), log=LogConfig(every=1, tensorboard=False),
    )  # fmt: skip
    rows: Any = Rows()
    run = Trainer(config, Layers().to(device), rows, Path(folder), seed=0, settings="")
    seen: list[tuple[bool, list[Tensor], list[Tensor]]] = []
    step = run.engine.backward_step

    def watched(loss: Tensor) -> bool:
        stepped = step(loss)
        seen.append((stepped, *([v.cpu().clone() for v in held] for held in (run.engine.masters, run.ema.shards))))
        return stepped

    run.engine.backward_step = watched
    assert run.run([]) == 0
    return {
        "stepped": [s for s, _, _ in seen],
        "masters": [torch.cat([t.flatten() for t in m]) for _, m, _ in seen],
        "averages": [
            *(torch.cat([t.flatten() for t in e]) for _, _, e in seen),
            torch.cat([e.cpu() for e in run.ema.shards]),
        ],
        "scale": run.engine.scale()["loss_scale"],
        "skipped": run.skipped,
        "dtypes": sorted({str(m.dtype) for m in run.engine.masters}),
    }


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 2)])
def test_overflowing_steps_are_skipped_and_counted_and_move_no_average(tmp_path: Path, world: int, stage: int) -> None:
    for found in ranks.run(trained, world, stage, str(tmp_path), STEPS):
        assert found["stepped"] == [i not in OVERFLOWS for i in range(STEPS)]
        assert found["skipped"] == len(OVERFLOWS)
        assert found["dtypes"] == ["torch.float32"]
        averages, masters = found["averages"], found["masters"]
        for i in range(STEPS):  # the average before step i, the masters after it, and the average after it
            expected = averages[i] if i in OVERFLOWS else 0.5 * averages[i] + 0.5 * masters[i]
            torch.testing.assert_close(averages[i + 1], expected, rtol=1e-6, atol=1e-7)
            if i in OVERFLOWS:
                assert torch.equal(masters[i], masters[i - 1])
        assert found["scale"] < 2.0**POWER
    rows = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [i + 1 for i in range(STEPS) if i not in OVERFLOWS]
    assert rows[0]["loss_scale"] == 2.0**POWER
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_scale_is_resumed(tmp_path: Path) -> None:
    whole = ranks.run(trained, 1, 1, str(tmp_path / "whole"), STEPS)[0]
    ranks.run(trained, 1, 1, str(tmp_path / "parts"), 6)
    parts = ranks.run(trained, 1, 1, str(tmp_path / "parts"), STEPS)[0]
    assert parts["scale"] == whole["scale"]
    assert parts["skipped"] == whole["skipped"]
    assert torch.equal(parts["masters"][-1], whole["masters"][-1])
