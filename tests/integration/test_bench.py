"""Every measurement of `python -m bench` runs at its smallest size and writes ratios; the figures mean nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import step, timing
from bench.__main__ import NAMES
from ldm.models.presets import UNETS

ROOT = Path(__file__).parents[2]
RATIOS = {
    "step": {"result": ["trainer / bare", "engine / objective", "EMA / trainer", "log row / trainer"]},
    "ranks": {"result": ["ZeRO 2 / DDP"]},
    "unet": {"training": ["ldm / diffusers"], "forward": ["ldm forward / diffusers forward"]},
    "transformers": {},
    "compiling": {},  # with torch.compile switched off, as here, there is nothing to compare
    "finetune": {"lora": ["diffusers script / ldm"], "dreambooth": ["diffusers cached / ldm"]},
    "encoding": {"result": ["online input / cached input", "online step / cached step"]},
    "data": {"result": ["webdataset, 0 workers / loader, 0 workers", "by hand, 1 thread / loader, 0 workers"]},
    "cli": {"result": ["ldm --help / python"]},
    "quality": {},  # what it tells is in a table
    "scale": {},  # simulates, measures nothing
    "memory": {},  # plans, measures nothing
}


FIGURES = {
    "step": ("overhead_percent", "ema_percent", "log_percent"),
    "ranks": ("deepspeed_over_ddp_percent", "pause 1", "resume 1", "resume 2", "resume 4"),
}
"""What a measurement tells beside its ratios."""


def test_all_are_covered() -> None:
    assert set(RATIOS) == set(NAMES)


SLOW = {"ranks", "finetune", "unet", "transformers", "quality"}  # quality: test_bench_quality.py runs it


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES])
def test_runs_quickly(name: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    argv = [sys.executable, "-m", "bench", name, "--quick", "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        argv, cwd=ROOT, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["machine"]["threads"] == 1
    if name in ("unet", "transformers"):
        parts = written["result"]["as they come"] if name == "unet" else written["result"]["tiny"]
        for case in ("forward", "sampling", "training", "sampling bf16", "training bf16"):
            own = parts[case]
            assert 0 < own["ratios"]["processor, ldm / diffusers"]["median"] < math.inf
            assert set(own["faults"]) == {"ldm", "diffusers"}
    for part, names in RATIOS[name].items():
        measured = written["result"] if part == "result" else written["result"][part]
        for ratio in names:
            assert ratio in done.stdout
            assert 0 < measured["ratios"][ratio]["median"] < math.inf
    for figure in FIGURES.get(name, ()):
        assert figure in written["result"]
    if name == "finetune":
        assert written["result"]["merged_difference"] < 1e-6
        for kind in ("lora", "dreambooth"):
            calls = written["result"][kind]["text_calls"]
            assert calls == {"ldm": 0, "diffusers script": 3, "diffusers cached": 0}


def test_the_peer_of_a_step_has_our_loss() -> None:
    assert step.loss_difference(UNETS["tiny"], 64) < 1e-5


def test_cases_take_turns() -> None:
    """Rounds alternate their order, so that neither case always follows the other; ratios are within a round."""
    calls: list[str] = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = timing.interleaved(cases, rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    spread = timing.ratio({"a": [2.0, 3.0, 8.0], "b": [1.0, 1.0, 2.0]}, "a", "b")
    assert (spread.median, spread.low, spread.high) == (3.0, 2.5, 3.5)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="threads: 999"):
        timing.pin(999)
    done = subprocess.run([sys.executable, "-m", "bench", "speed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "speed" in done.stderr
