"""The log's boards: what TensorBoard's own reader finds, what Weights & Biases is given; the figures by hand."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ldm.train.log import Log, LogConfig

ROWS = [(1, {"loss": 0.5, "lr": 1e-3}), (2, {"loss": 0.25, "lr": 2e-3}), (3, {"loss": float("nan"), "lr": 3e-3})]


def written(config: LogConfig, folder: Path, start: int = 0, **options: Any) -> list[dict[str, Any]]:
    """What `metrics.jsonl` has after the steps above `start`."""
    log = Log(config, folder, start=start, steps=10, settings="name: one", **options)
    for step, row in ROWS:
        if step > start:
            log.step(step, row, images=8, flops=1e-9)
    log.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_what_the_file_has(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = written(LogConfig(), tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("loss", "lr", "images_per_second", "seconds_left", "memory_gib", "utilisation"):
        assert [e.step for e in events.Scalars(name)] == [1, 2, 3]
        for event, row in zip(events.Scalars(name), rows, strict=True):
            assert event.value == pytest.approx(float(row[name]), rel=1e-6, nan_ok=True)
    assert rows[2]["loss"] == "nan"  # JSON has no such number


def test_a_later_start_goes_on_in_the_same_file(tmp_path: Path) -> None:
    written(LogConfig(tensorboard=False), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a crash
    rows = written(LogConfig(tensorboard=False), tmp_path, start=1)
    assert [r["step"] for r in rows] == [1, 2, 3]


def test_the_cost_is_that_of_all_starts(tmp_path: Path) -> None:
    rows = written(LogConfig(tensorboard=False, price=2.0), tmp_path, before=1800.0)
    assert rows[-1]["cost"] == pytest.approx(2.0 * (1800 + rows[-1]["seconds"]) / 3600, abs=1e-3)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A stand-in for the package, and what it was told."""
    told: list[tuple[str, Any]] = []
    run = types.SimpleNamespace(
        log=lambda row, step: told.append(("log", (step, row))), finish=lambda: told.append(("finish", None))
    )
    package = types.ModuleType("wandb")
    package.init = lambda **options: (told.append(("init", options)), run)[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", package)
    return told


def test_wandb_gets_every_row_offline_and_a_resumed_run_is_the_same(tmp_path: Path, wandb: list[Any]) -> None:
    config = LogConfig(tensorboard=False, wandb=True, wandb_mode="offline")
    rows = written(config, tmp_path)
    first, *logged, end = wandb
    assert first[0] == "init"
    options = first[1]
    assert (options["mode"], options["resume"], options["dir"]) == ("offline", "allow", str(tmp_path))
    assert [(step, row["lr"]) for _, (step, row) in logged] == [(r["step"], r["lr"]) for r in rows]
    assert end == ("finish", None)
    wandb.clear()
    written(config, tmp_path, start=1)
    assert wandb[0][1]["id"] == options["id"]
    written(config, tmp_path / "another")
    assert wandb[-5][1]["id"] != options["id"]


def test_wandb_writes_offline_by_itself(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    written(LogConfig(tensorboard=False, wandb=True, wandb_mode="offline"), tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_wandb_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"train.log.wandb: needs the package wandb: pip install"):
        Log(LogConfig(wandb=True), tmp_path, start=0, steps=1, settings="")
