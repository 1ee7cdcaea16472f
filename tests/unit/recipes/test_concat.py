"""Plans and one-command configs of U-Nets that are told a picture by more channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm.cli import finetune
from ldm.config.schema import load_run
from ldm.recipes import plan_job
from ldm.recipes.planned import Asked
from tests import miniature
from tests.integration.test_concat_training import KINDS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("project"))
    miniature.teacher(root)
    return root


def job(tree: dict[str, Any]) -> Any:
    run = load_run(tree)
    return plan_job(run.task, run.data, run.train, Asked(name="x", world=1, gpu=True))


@pytest.mark.parametrize("kind", KINDS)
def test_plans_count_the_channels_and_the_picture_s_encoding(kind: str, root: Path) -> None:
    plain, told = miniature.text_to_image(root), miniature.text_to_image(root)
    for tree in (plain, told):
        tree["task"]["samples"] = {}
    told["task"]["network"] = plain["task"]["network"] | KINDS[kind]["network"]
    told["task"]["options"] = {"concat": {"kind": kind}}
    told["data"] = plain["data"] | {"pairs": KINDS[kind]["pairs"]}
    ours, theirs = job(told), job(plain)
    more = KINDS[kind]["network"]["in_channels"] - 4
    assert ours.flops - theirs.flops == pytest.approx(2 * 9 * 8 * 64 * more, rel=0.05, abs=3e4)
    encodes = 1 if kind == "upscale" else 2
    assert [f.flops for f in ours.frozen if f.name == "vae"] == [encodes * f.flops for f in theirs.frozen[:1]]
    base = {"kind": "finetune", "base": str(root / "teacher"), "adapter": {"kind": "full"}}
    started = told | {"task": base | {"options": told["task"]["options"]}}
    weights = [sum(p.numel() for p in j.build(False).parameters()) for j in (ours, job(started))]
    assert weights[0] == weights[1]
    cached = [job(tree | {"task": tree["task"] | {"cache": "nowhere"}}).sample_bytes for tree in (told, plain)]
    assert cached[0] > cached[1]
    assert replace(ours, flops=None).build(False) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_one_command_writes_the_whole_config(kind: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [kind, "--images", str(root / "data"), "--base", str(root / "teacher"), "--print-config", "--prompt", "a dot"]
    own += ["--validation-image", "a.png"] + (["--validation-mask", "m.png"] if kind == "inpaint" else [])
    assert finetune.main(own) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["task"]["adapter"]["kind"] == "full"
    assert tree["task"]["options"]["concat"]["kind"] == kind
    assert set(tree["data"]["pairs"]) == set(KINDS[kind]["pairs"])
    assert tree["task"]["samples"]["pictures"] == ["a.png"]
    assert tree["task"]["samples"]["masks"] == (["m.png"] if kind == "inpaint" else [])
