"""`ldm train` itself on two nodes of two ranks, ZeRO-2: told to stop in the middle, requeued, and alike to the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import until
from conftest import Run

from ldm.cli.__main__ import main
from tests import miniature

pytestmark = pytest.mark.timeout(900)
STEPS = 60


def rows(out: Path) -> list[dict[str, Any]]:
    log = out / "log" / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_a_signal_on_the_cluster_costs_nothing_but_time(run: Run, tmp_path: Path) -> None:
    """The oracle is the same config on one process, never disturbed, without ZeRO's division."""
    root = miniature.project(tmp_path)
    config = miniature.text_to_image(root, cache=str(root / "cache"))
    config["task"]["samples"]["every"] = 1000
    config["train"] = miniature.train(steps=STEPS, checkpoint={"every": 1000, "keep": 2})
    path = miniature.write(config, root / "config.yaml")
    assert main(["train", str(path), f"out={root / 'calm'}", "train.engine.zero_stage=1"]) == 0

    site, out = tmp_path / "site.toml", run.folder / "disturbed"
    site.write_text('[env]\nDS_ACCELERATOR = "cpu"\nTORCHDYNAMO_DISABLE = "1"\n')
    job = run.submit(
        "--site", str(site), "--nodes", "2", "--ranks-per-node", "2", "--no-preflight",
        command=(sys.executable, "-m", "ldm.cli", "train", str(path), f"out={out}"),
    )  # fmt: skip
    until(lambda: len(rows(out)) >= 3, 400, lambda: f"no progress: {run.output(job)}")
    run.cluster.run("scancel", "--batch", "--signal=USR2", job)  # what SLURM sends before the time limit
    end = run.cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", timeout=400)
    said = run.output(job)
    assert end == "COMPLETED", said
    assert run.cluster.details(job)["Restarts"] == "1"
    for line in ("USR2: asking the ranks to save", "asked to stop: saved step", "saved; requeueing", "resuming from"):
        assert said.count(line) == 1, said
    merged = run.merged(job)
    assert {line.split()[1] for line in merged} >= {"0@n1/0", "0@n1/1"}

    ours, calm = rows(out), rows(root / "calm")
    assert [r["step"] for r in ours] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in calm], rel=1e-4)
    assert [r["lr"] for r in ours] == [r["lr"] for r in calm]
    assert json.loads((out / "done.json").read_text())["step"] == STEPS
    exported = [sorted(p.name for p in (folder / "export").iterdir()) for folder in (out, root / "calm")]
    assert exported[0] == exported[1]
    assert not (out / "lock.json").exists()
