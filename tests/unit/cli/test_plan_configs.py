"""`ldm plan` of every run in `configs/`: steps as written, and figures that can be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ldm.cli.__main__ import main
from ldm.config.load import read
from ldm.recipes.sources import load_network

ROOT = Path(__file__).parents[3]
RUNS = sorted(p for folder in ("train", "finetune", "distill") for p in (ROOT / "configs" / folder).rglob("*.yaml"))
ROUNDS = {"progressive_emoji": 6}
"""Of 32, 16, 8, 4, 2 and 1 steps."""
DRAWN = {"dreambooth": 100, "dreambooth_lora": 100, "dreambooth_pivotal": 100, "sdxl_dreambooth_lora": 100}
LARGE = (
    "sdxl_lora", "sdxl_dreambooth_lora", "sd35_medium_lora", "flux_dev_lora", "pixart_sigma_lora", "sdxl_full",
    "sd35_medium_full", "flux_dev_full", "pixart_sigma_full", "sd35_medium", "flux", "pixart_sigma", "sdxl_controlnet",
    "sd35_medium_sooner", "sd15_inpainting", "sd15_instruct", "lcm_lora_emoji", "tcd_lora_emoji", "dmd_emoji",
)  # fmt: skip
"""Whose counting takes long, and of which another is counted."""
WORLD = {"flux_dev_full": 16, "flux": 64, "sd35_medium": 16}
"""GPUs of those that fit on no single one."""
WEIGHTS = {
    # of the published networks
    "text_to_image_sd2": 865_910_724,
    "sdxl_full": 2_567_463_684,
    "sd35_medium_full": 2_243_171_520,
    "sd35_medium": 2_243_171_520,
    "flux_dev_full": 11_901_408_320,
    "flux": 11_891_178_560,
    "pixart_sigma_full": 610_856_096,
    "pixart_sigma": 610_856_096,
    "sd15_controlnet": 361_279_120,
    "sdxl_controlnet": 1_251_014_160,
    "sd15_ip_adapter": 1024 * 3072 + 3072 + 2 * 768 + 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280),
    "textual_inversion": 2 * 192,  # two vectors of the emoji tower's width
}


def numbers(value: Any) -> list[float]:
    """All of a plan's."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in LARGE)) for p in RUNS]
)
def test_every_run_is_planned(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where there are no caches, runs and pictures
    world = WORLD.get(path.stem, 1)
    assert main(["plan", str(path), "--gpus-per-node", str(world), "--price", "2", "--json"]) == 0
    plan, written = json.loads(capsys.readouterr().out), read(path)
    assert all(math.isfinite(n) for n in numbers(plan))
    assert plan["steps"] == ROUNDS.get(path.stem, 1) * written["train"]["steps"]
    assert sum(r["steps"] for r in plan["rounds"]) == (plan["steps"] if path.stem in ROUNDS else 0)
    assert (plan["drawn"] or {}).get("count", 0) == DRAWN.get(path.stem, 0)
    assert plan["batch"] == written["train"]["batch"]
    assert plan["weights"] == WEIGHTS.get(path.stem, plan["weights"]) > 0
    if path.stem in ("text_to_image_emoji", "dreambooth"):
        assert plan["weights"] == sum(p.numel() for p in load_network("emoji").parameters())
    for fit in plan["fits"]:
        parts = fit["parts"]
        divided = 1 if fit["stage"] == 0 else world
        states = 4 * plan["weights"] * (3 if path.stem not in ROUNDS else 2.9) / divided  # and Adam's two moments
        assert sum(v for k, v in parts.items() if k != "host") > states
        assert parts["activations"] + parts["gradients"] > 0
    point = plan["point"]
    assert point["images_per_second"] * sum(point["step"].values()) == pytest.approx(plan["batch"])
    assert point["days"] * 86400 == pytest.approx(plan["steps"] * sum(point["step"].values()) + point["drawing"])
    assert (point["drawing"] > 0) == (path.stem in DRAWN)
    assert point["cost"] == pytest.approx(48 * world * point["days"])
    data = written["data"].get("path")
    assert plan["samples"] == 2856 if data == "emoji" else plan["samples"] is None
    assert 0 < plan["flops_per_image"] < 1e15
