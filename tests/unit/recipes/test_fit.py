"""A network that cannot take what its text tower or autoencoder gives is refused by key before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ldm.cli.__main__ import main
from ldm.config.schema import load_run
from ldm.models.presets import UNETS
from ldm.recipes.text_to_image import TextToImageTask, build

ROOT = Path(__file__).parents[3]


def test_a_tower_of_another_width_is_named(tmp_path: Path) -> None:
    run = load_run(ROOT / "configs/train/text_to_image_emoji.yaml", [f"out={tmp_path / 'run'}"])
    assert isinstance(run.task, TextToImageTask)
    task = replace(run.task, network=replace(UNETS["tiny"], cross_attention_dim=48), cache=None)
    with pytest.raises(ValueError, match=r"task\.network\.cross_attention_dim: 48, but task\.text .* of width 192"):
        build(task, run.data, run.train, 0, 0)


def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"out={tmp_path / 'run'}", "task.cache=null", "task.network.cross_attention_dim=48"]
    assert main(["train", str(ROOT / "configs/train/text_to_image_emoji.yaml"), "--dry-run", *overrides]) == 2
    said = capsys.readouterr().err
    assert "cross_attention_dim: 48" in said
    assert "Traceback" not in said
