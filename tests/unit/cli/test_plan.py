"""`ldm plan`: its text, its JSON, its page, and what it warns of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.cli.__main__ import main
from tests import miniature


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("project"))
    tree = miniature.text_to_image(root, cache=str(root / "cache"))
    tree["train"]["batch"] = 12
    return miniature.write(tree, root / "config.yaml")


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_and_page(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    plan = planned(capsys, str(config), "--gpus-per-node", "4", "--price", "2", "--page", str(page))
    assert [(f["stage"], f["recompute"]) for f in plan["fits"]] == [(s, r) for r in (False, True) for s in range(4)]
    for fit in plan["fits"]:
        parts = fit["parts"]
        assert min(parts.values()) >= 0
        assert fit["largest"] >= 1
    assert plan["point"]["gpus"] == 4
    assert plan["point"]["cost"] == pytest.approx(plan["point"]["days"] * 24 * 4 * 2)
    assert [p["gpus"] for p in plan["sweep"]] == [4]  # 12 images do not divide by 8 GPUs
    assert plan["samples"] == 16
    html = page.read_text()
    assert "<svg" in html or "class='bars'" in html
    assert "ZeRO-2" in html


def test_text_names_what_would_go_wrong(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config), "--gpus-per-node", "8", "train.engine.zero_stage=3", "train.steps=100000"]) == 0
    said = capsys.readouterr().out
    for warning in (
        "train.batch: 12 does not divide by 8 GPUs x accumulate 1; 16 does",
        "zero_stage 3 is not worth it: stage 0 fits, and sends 2 psi a step, no more",
        "nothing in",
        "16 samples are few for 100,000 steps: each is seen 75,000 times",
    ):
        assert warning in said, said
    assert main(["plan", str(config), "task.cache=null", "train.batch=32"]) == 0
    said = capsys.readouterr().out
    assert "no cache: VAE and text tower run for every image" in said
    assert "of frozen networks" in said
    assert "data: 16 samples are fewer than one batch of 32" in said


def test_mistakes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config), "--gpu", "a100"]) == 2
    assert "gpu: 'a100' is not one of ['a100-80g'" in capsys.readouterr().err
    assert main(["plan", str(config), "--nodes", "0"]) == 2
    assert "--nodes must be at least 1, got 0" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import contextlib, sys\nfrom ldm.cli.__main__ import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['plan', '--help'])\n"
        "assert not {'torch', 'ldm.recipes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
