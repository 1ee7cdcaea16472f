"""`ldm export`: a run's weights by choice while another process could be training it, loaded again by diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm.cli.__main__ import main
from ldm.train.chosen import choose
from tests import miniature


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped after four of six steps, as far as its folder tells."""
    root = miniature.project(tmp_path_factory.mktemp("project"))
    config = miniature.text_to_image(root)
    config["train"] |= {
        "ema": {"decay": 0.9, "others": [0.25], "power": [0.1, 0.2]},
        "validate": {"split": "heldout", "samples": 5, "every": 2},
    }
    config["train"]["log"] |= {"price": 3600.0}
    path = miniature.write(config, root / "config.yaml")
    assert main(["train", str(path)]) == 0
    return root / "run"


def unet(folder: Path) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()


@pytest.mark.parametrize("name", ["ema", "raw", "0.25", "0.15"])
def test_every_choice_is_written_and_read_by_diffusers(
    run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--ema", name, "--step", "6"]) == 0
    assert "step 6" in capsys.readouterr().out
    expected = choose(run, 6, name).weights
    found = unet(out)
    assert all(torch.equal(found[n], w) for n, w in expected.items())
    same = all(torch.equal(w, unet(run / "export")[n]) for n, w in found.items())
    assert same == (name == "ema")  # what the run itself exports at its end
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_mistakes_are_a_line_and_leave_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ([str(tmp_path / "none"), str(tmp_path / "out")], "no config.yaml"),
        ([str(run), str(run)], "exists already"),
        ([str(run), str(tmp_path / "out"), "--step", "5"], "step: 5 is not one of [4, 6]"),
        ([str(run), str(tmp_path / "out"), "--ema", "best"], "'best' is not raw"),
        ([str(run), str(tmp_path / "out"), "--ema", "0.99"], "no average of decay 0.99 was kept"),
    ):
        assert main(["export", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_log_has_cost_time_left_utilisation_and_validation(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "log" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "loss" in r]
    for row in steps:
        assert row["cost"] == pytest.approx(row["seconds"], rel=0.05, abs=0.5)  # 3600 an hour
        assert row["data_seconds"] >= 0
        assert row["utilisation"] > 0
    assert steps[-1]["seconds_left"] == 0
    assert [r["step"] for r in rows if "validation_loss" in r] == [0, 2, 4, 6]


def test_validate_is_refused_where_it_means_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = miniature.autoencoder(tmp_path)
    config["train"] |= {"validate": {"split": "heldout"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    assert "train.validate" in capsys.readouterr().err
