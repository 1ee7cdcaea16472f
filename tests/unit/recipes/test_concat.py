"""Plans and one-command configs of U-Nets that are told a picture by more channels."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from ldm import dist
from ldm.cli import finetune
from ldm.config.schema import load_run
from ldm.recipes import plan_job
from ldm.recipes.planned import Asked
from ldm.recipes.text_to_image import SampleHook, Samples
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


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_draws_its_prompts_with_their_own_pictures(rank: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Three prompts on two ranks: the second has the third one, and the first again."""
    asked: list[Any] = []

    class Pipeline:
        network = SimpleNamespace(training=False, has_dropout=False, train=lambda was: None)

        def sample(self, prompts: list[str], *, settings: Any, indices: list[int]) -> torch.Tensor:
            asked.append((prompts, indices))
            return torch.zeros(len(prompts), 3, 8, 8)

    class Seen:
        def under(self, indices: list[int]) -> Any:
            asked.append(list(indices))
            return Pipeline()

        def finished(self, indices: list[int], drawn: torch.Tensor) -> torch.Tensor:
            asked.append(list(indices))
            return drawn

    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "rank", lambda: rank)
    monkeypatch.setattr(dist, "gather", lambda own: own.repeat(2, 1, 1, 1))
    engine = SimpleNamespace(autocast=contextlib.nullcontext)
    trainer = SimpleNamespace(averaged=contextlib.nullcontext, engine=engine, out=tmp_path)
    hook = SampleHook(Samples(prompts=("a", "b", "c")), Pipeline(), Seen())  # type: ignore[arg-type]
    hook(trainer, 1)  # type: ignore[arg-type]
    rows = [[0, 1], [2, 0]][rank]
    assert asked == [rows, (["abc"[i] for i in rows], rows), rows]
