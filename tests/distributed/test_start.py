"""Starts on two ranks: a refusal ends all of them, and all go on from the same checkpoint at the same sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm.config.load import dump
from ldm.config.schema import RunConfig, load_run
from ldm.recipes import assemble
from ldm.recipes.run import Start, run
from tests import miniature, ranks


def start(config: RunConfig, **how: bool) -> str:
    """The exit code, or what was refused."""
    try:
        code = run(
            lambda: assemble(config.task, config.data, config.train, config.seed, 0),
            config.train, config.out, seed=config.seed, resolved=dump(config), start=Start(**how),
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return str(code)


def starts(path: str, out: str) -> list[str]:
    """One after the other in the same folder."""

    def made(*changes: str) -> RunConfig:
        return load_run(path, [f"out={out}", *changes])

    return [
        start(made("train.steps=2")),
        start(made("train.steps=3", "seed=1")),
        start(made("train.steps=1")),
        start(made("train.steps=3", "train.batch=8", "train.accumulate=2")),
        start(made("train.steps=4", "seed=1"), allow=True),
        start(made("train.steps=1"), scratch=True),
    ]


def test_two_ranks_agree(tmp_path: Path) -> None:
    config: dict[str, Any] = miniature.text_to_image(miniature.project(tmp_path), samples={"prompts": [], "every": 0})
    config["train"] |= {"checkpoint": {"every": 1, "keep": 0}}
    path, out = miniature.write(config, tmp_path / "config.yaml"), tmp_path / "run"
    first, second = ranks.run(starts, 2, str(path), str(out), timeout=400)
    assert [first[i] for i in (0, 2, 3, 4, 5)] == ["0"] * 5
    assert [second[i] for i in (0, 2, 3, 4, 5)] == ["0"] * 5
    assert "another seed (seed 0 → 1)" in first[1]
    assert second[1] == "stopped; rank 0 tells why"
    told = json.loads((out / "earlier-1" / "checkpoints" / "step-4" / "state.json").read_text())
    assert told["extra"]["batches"] == [[0, 4], [2, 8], [3, 4]]
    assert told["trained_with"]["config"]["seed"] == 1
    assert [h["step"] for h in told["trained_with"]["history"]] == [2, 3]
    assert [p.name for p in (out / "checkpoints").glob("step-*")] == ["step-1"]
