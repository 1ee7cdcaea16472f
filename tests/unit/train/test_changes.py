"""What a start has otherwise: named by key with both values, and told apart from what may change."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm.config.load import dump
from ldm.config.schema import load_run
from ldm.data.manifest import Manifest
from ldm.recipes import record
from ldm.train.changes import Change, compare, told
from tests import miniature


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.project(tmp_path_factory.mktemp("changes"))


@pytest.fixture
def config(root: Path) -> dict[str, Any]:
    return miniature.text_to_image(root)


def made(config: dict[str, Any], path: Path) -> dict[str, Any]:
    return record.make(dump(load_run(miniature.write(config, path))))


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    other: dict[str, Any] = copy.deepcopy(config)
    *above, last = key.split(".")
    place = other
    for name in above:
        place = place.setdefault(name, {})
    place[last] = value
    return other


@pytest.mark.parametrize(
    ("key", "value", "said", "makes"),
    [
        ("seed", 7, "seed 0 → 7", "another seed"),
        ("seed", -(2**70), f"seed 0 → {-(2**70)}", "another seed"),
        ("data.captions", "first", "data.captions weighted → first", "other data"),
        ("data.flip", True, "data.flip false → true", "other data"),
        ("task.process.prediction", {"kind": "epsilon"}, "task.process.prediction v → epsilon", "another objective"),
        (
            "task.process.weighting",
            {"kind": "uniform"},
            "task.process.weighting min_snr → uniform",
            "another objective",
        ),
        (
            "task.process.schedule",
            {"kind": "discrete", "zero_terminal_snr": True},
            "task.process.schedule.zero_terminal_snr false → true",
            "another objective",
        ),
        ("task.options.drop", 0.5, "task.options.drop 0.1 → 0.5", "another objective"),
        ("task.network.norm_num_groups", 8, "task.network.norm_num_groups 4 → 8", "another model"),
        ("train.optim.algorithm", "lion", "train.optim.algorithm adamw → lion", "another optimizer"),
        ("train.batch", 64, "train.batch 4 → 64", ""),
        ("train.steps", 9, "train.steps 6 → 9", ""),
        ("train.optim.lr", 3e-4, "train.optim.lr 0.002 → 0.0003", ""),
        ("train.optim.decay", "constant", "train.optim.decay cosine → constant", ""),
        ("train.ema", None, "train.ema on (decay 0.9, warmup true) → none", ""),
        ("train.engine.zero_stage", 3, "train.engine.zero_stage 2 → 3", ""),
        ("train.engine.precision", "bf16", "train.engine.precision fp32 → bf16", ""),
        ("train.accumulate", 2, "train.accumulate 1 → 2", ""),
        ("train.checkpoint.every", 3, "train.checkpoint.every 2 → 3", ""),
        ("task.cache", "cache", "task.cache none → cache", ""),
    ],
)
def test_a_key_is_named_with_both_values(
    config: dict[str, Any], tmp_path: Path, key: str, value: Any, said: str, makes: str
) -> None:
    before = made(config, tmp_path / "a.yaml")
    found = compare(before, made(changed(config, key, value), tmp_path / "b.yaml"))
    assert len(found) == 1
    assert said in str(found[0])
    assert found[0].makes == makes


@pytest.mark.parametrize("key", ["name", "out", "workers", "data.memory", "data.quarantine", "task.samples"])
def test_what_changes_nothing_of_the_learning_is_not_said(config: dict[str, Any], tmp_path: Path, key: str) -> None:
    value: Any = {"workers": 3, "data.memory": 5, "task.samples": {"prompts": ["a red dot"]}}.get(key, "other")
    before = made(config, tmp_path / "a.yaml")
    assert compare(before, made(changed(config, key, value), tmp_path / "b.yaml")) == []


def test_data_and_models_are_known_by_content_and_not_by_place(
    config: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    """A copy elsewhere is the same; one picture less or another bit of a weight is not."""
    import shutil

    before = made(config, tmp_path / "a.yaml")
    for name in ("data", "autoencoder", "towers"):
        shutil.copytree(root / name, tmp_path / "moved" / name)
    moved = miniature.text_to_image(tmp_path / "moved") | {"out": config["out"]}
    assert compare(before, made(moved, tmp_path / "b.yaml")) == []
    manifest = Manifest.read(tmp_path / "moved" / "data")
    replace(manifest, shards=tuple(s for s in manifest.shards if s.samples > 1)).write()
    weights = next((tmp_path / "moved" / "autoencoder" / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    found = compare(before, made(moved, tmp_path / "c.yaml"))
    assert [(c.key, c.makes) for c in found] == [("data.path", "other data"), ("task.vae", "another autoencoder")]
    assert str(found[0]) == "data.path: other samples than before: 16 → 15"


def test_a_mixture_names_the_source(root: Path, tmp_path: Path) -> None:
    config = miniature.text_to_image(root)
    path = {"kind": "shards", "path": str(root / "data"), "size": 16}
    config["data"] = {"kind": "mixture", "sources": [{"data": path}, {"data": path | {"split": "heldout"}}]}
    before = made(config, tmp_path / "a.yaml")
    fewer = changed(config, "data", path | {"split": "heldout"})
    plain = changed(config, "data", path)
    found = compare(made(plain, tmp_path / "p.yaml"), made(fewer, tmp_path / "f.yaml"))
    assert told(found) == "other data (data.split train → heldout, data.path: other samples than before: 16 → 8)"
    heavier = copy.deepcopy(config)
    heavier["data"]["sources"][1]["weight"] = 0.5
    assert [str(c) for c in compare(before, made(heavier, tmp_path / "b.yaml"))] == ["data.sources.1.weight 1 → 0.5"]
    single = changed(config, "data", path)
    assert [str(c) for c in compare(before, made(single, tmp_path / "c.yaml"))] == ["data mixture → shards"]


def test_a_key_that_a_later_version_brings_is_no_change(config: dict[str, Any], tmp_path: Path) -> None:
    now = made(config, tmp_path / "a.yaml")
    before = copy.deepcopy(now)
    del before["config"]["train"]["max_skipped"], before["config"]["task"]["options"]
    assert compare(before, now) == []


def test_the_line_groups_what_makes_something_else() -> None:
    line = told([Change("seed", 0, 1, "another seed"), Change("train.steps", 6, 9), Change("train.batch", 4, 8)])
    assert line == "another seed (seed 0 → 1); train.steps 6 → 9, train.batch 4 → 8"
    many = told([Change(f"k{i}", 0, 1) for i in range(20)])
    assert many.endswith(", and 12 more")
    assert yaml.safe_load(dump({"a": 1e-8}))["a"] == 1e-8  # the record is read back from YAML
