"""Configs with keys by earlier names load as today's, and say so in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm.config.earlier import today
from ldm.config.load import dump, read
from ldm.config.schema import load_run
from ldm.train.changes import compare
from tests import miniature


@pytest.fixture
def old(tmp_path: Path) -> dict[str, Any]:
    """A run's config as it was written before networks were a choice."""
    config = miniature.text_to_image(tmp_path)
    network = config["task"].pop("network")
    del network["kind"]
    config["task"]["unet"] = network
    return config


def written(config: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def test_an_old_config_is_the_new_one_and_says_so(
    old: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(written(old, tmp_path / "old.yaml"))
    told = capsys.readouterr().err
    assert told == "config: task.unet is called task.network now, a choice by `kind`; it is read as such\n"
    assert run == load_run(written(miniature.text_to_image(tmp_path), tmp_path / "new.yaml"))
    assert capsys.readouterr().err == ""
    again = yaml.safe_load(dump(run))
    assert (again["task"]["network"]["kind"], "unet" in again["task"]) == ("unet", False)


def test_overrides_by_either_name_change_files_by_either_name(old: dict[str, Any], tmp_path: Path) -> None:
    files = [written(old, tmp_path / "old.yaml"), written(miniature.text_to_image(tmp_path), tmp_path / "new.yaml")]
    for path in files:
        for name in ("unet", "network"):
            task = load_run(path, [f"task.{name}.layers_per_block=2"]).task
            assert task.network.layers_per_block == 2  # type: ignore[union-attr]
            assert task.network.cross_attention_dim == 16  # type: ignore[union-attr]


def test_a_base_by_the_earlier_name_takes_a_change_by_todays(old: dict[str, Any], tmp_path: Path) -> None:
    written(old, tmp_path / "old.yaml")
    change = {"base": "old.yaml", "task": {"network": {"layers_per_block": 2}}}
    assert load_run(written(change, tmp_path / "x.yaml")).task.network.layers_per_block == 2  # type: ignore[union-attr]


def test_interpolations_and_errors_follow(old: dict[str, Any], tmp_path: Path) -> None:
    old["name"] = "side-${task.unet.sample_size}"
    assert load_run(written(old, tmp_path / "a.yaml")).name == "side-8"
    old["task"]["unet"]["layers_per_block"] = "two"
    with pytest.raises(ValueError, match=r"config\.task\.network\.layers_per_block: .*'two'.*line \d+"):
        load_run(written(old, tmp_path / "b.yaml"))
    old["task"]["network"] = {"kind": "unet"}
    with pytest.raises(ValueError, match=r"task\.unet: is called task\.network now, and the config has both"):
        load_run(written(old, tmp_path / "c.yaml"))


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    tree = {"task": {"kind": "clip", "text": "${out}.unet"}, "unet": 1}
    assert today(tree) == (tree, [])
    assert read(written({"a": 1}, tmp_path / "a.yaml")).earlier == ()


def test_a_checkpoint_of_before_is_compared_by_todays_names(old: dict[str, Any], tmp_path: Path) -> None:
    now = {"config": miniature.text_to_image(tmp_path)}
    assert compare({"config": old}, now) == []
    now["config"]["task"]["network"] = now["config"]["task"]["network"] | {"layers_per_block": 2}
    assert [(c.key, c.makes) for c in compare({"config": old}, now)] == [
        ("task.network.layers_per_block", "another model")
    ]
