"""A ControlNet trained in miniature over a frozen base: divided, stopped and resumed, exported, loaded, drawn under."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm.checkpoint.control_files import load_control
from ldm.cli import finetune
from ldm.cli import sample as cli
from ldm.config.load import decode
from ldm.config.schema import RunConfig
from ldm.pipeline import Control, Settings, TextToImage
from ldm.train import trainer
from tests import miniature, ranks
from tests.integration.test_finetune import SLOW, exported, train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("controlnet"))
    miniature.teacher(root)
    edges = np.zeros((20, 20, 3), dtype=np.uint8)
    edges[5:15, 5] = edges[5:15, 14] = 255
    Image.fromarray(edges).save(root / "edges.png")
    return root


def config(root: Path, out: str, *, engine: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    how = {"sampler": "ddim", "steps": 2, "guidance": 2.0}
    task = {
        "kind": "controlnet", "base": str(root / "teacher"), "options": {"drop": 0.5},
        "samples": {"prompts": ["a red dot"], "every": 2, "settings": how}, "conditions": [str(root / "edges.png")],
    }  # fmt: skip
    data = {"kind": "shards", "path": str(root / "data"), "size": miniature.SIZE,
            "pairs": {"condition": {"kind": "canny", "low": 20, "high": 60}}}  # fmt: skip
    plain = miniature.train(steps=4, optim={"lr": 1e-2, "weight_decay": 0.0}, checkpoint={"every": 2, "keep": 0})
    plain["engine"] = {"zero_stage": 1, "precision": "fp32"} | (engine or {})
    return {"name": out, "out": str(root / out), "task": task | changes, "data": data, "train": plain}


def log(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def out(project: Path) -> Path:
    """A run that is done."""
    assert ranks.run(train, 1, config(project, "one"), timeout=SLOW) == [0]
    return project / "one"


def test_one_process_trains_the_controlnet_alone_and_its_export_draws(project: Path, out: Path) -> None:
    rows = log(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # It adds nothing at first, and what the first step moves, the 1x1 convolutions, does not see the picture yet.
    assert [row["control_sensitivity"] != 0 for row in rows] == [False, False, True, True]
    net = load_control(out)
    from diffusers import ControlNetModel

    theirs = ControlNetModel.from_pretrained(out / "export").state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in net.state_dict().items())
    assert any(conv.weight.any() for conv in net.controlnet_down_blocks)
    pipe, image = TextToImage.load(project / "teacher"), Image.open(project / "edges.png")
    settings = Settings(steps=2, guidance=2.0)
    plain = pipe.sample(["a red dot"], settings=settings)
    seen = pipe.controlled([Control(network=net, picture=image)]).sample(["a red dot"], settings=settings)
    assert (plain - seen).abs().max() > 1e-4
    drawn = [np.asarray(Image.open(p)) for p in sorted((out / "samples").glob("step-*.png"))]
    assert len(drawn) == 3
    assert (drawn[0] != drawn[-1]).any()
    with pytest.raises(ValueError, match=r"a ControlNet; draw under it with --control .* and its base as the model"):
        TextToImage.load(out)


def test_two_processes_stage_3_resume_and_start(project: Path) -> None:
    """ZeRO 3 on two ranks over cached latents and conditions, stopped and resumed, is bit for bit one run."""
    cached = {"cache": str(project / "cache")}
    runs = {k: config(project, f"z-{k}", engine={"zero_stage": 3}, **cached) for k in ("whole", "halves")}
    assert ranks.run(train, 2, runs["whole"], timeout=SLOW) == [0, 0]
    assert ranks.run(train, 2, runs["halves"], 2, timeout=SLOW) == [trainer.AGAIN] * 2
    assert ranks.run(train, 2, runs["halves"], timeout=SLOW) == [0, 0]
    found = {k: exported(project / f"z-{k}") for k in runs}
    assert found["whole"]
    assert all(torch.equal(found["whole"][k], found["halves"][k]) for k in found["whole"])
    gaps = [[row["control_sensitivity"] for row in log(project / f"z-{k}")] for k in runs]
    assert gaps[0] == gaps[1]
    assert ranks.run(train, 1, config(project, "more", start=str(project / "z-whole"), **cached), timeout=SLOW) == [0]
    first = log(project / "more")[0]
    assert first["control_sensitivity"] != 0  # it goes on from what was learned
    before, after = exported(project / "z-whole"), exported(project / "more")
    assert set(before) == set(after)


def test_the_command_draws_under_it(project: Path, out: Path, tmp_path: Path) -> None:
    own = ["a red dot", "--model", str(project / "teacher"), "--steps", "2", "--device", "cpu"]
    entry = f"{out}:{project / 'edges.png'}:0.8"
    assert cli.main([*own, "--control", entry, "--control-steps", "0", "0.5", "--out", str(tmp_path)]) == 0
    assert any(tmp_path.glob("0000*.png"))
    for bad, line in (
        ([*own, "--control", f"{out}:{project / 'edges.png'}:-1"], r"scale must be at least 0, got -1\.0"),
        ([*own, "--control", f"{out}:{project / 'nothing.png'}"], "no such picture"),
        ([*own, "--control", "one"], "expected CONTROLNET:PICTURE"),
        ([*own, "--control", f"{project / 'teacher'}:{project / 'edges.png'}"], "no ControlNet: it is a whole model"),
        ([*own, "--control", f"emoji:{project / 'edges.png'}"], "emoji: no ControlNet: it is a whole model"),
        ([*own, "--control", entry, "--control-steps", "0.9", "0.1"], "0 <= start < end <= 1"),
        ([*own, "--guess"], "--guess: is of ControlNets; add --control"),
    ):
        with pytest.raises(ValueError, match=line):
            cli.main(bad)


def test_a_picture_is_drawn_again_under_the_same_condition_and_says_if_it_is_another(
    project: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edges = tmp_path / "edges.png"
    edges.write_bytes((project / "edges.png").read_bytes())
    own = ["a red dot", "--model", str(project / "teacher"), "--steps", "2", "--device", "cpu"]
    assert cli.main([*own, "--control", f"{out}:{edges}:0.8", "--out", str(tmp_path / "first")]) == 0
    (first,) = (tmp_path / "first").glob("0000*.png")
    capsys.readouterr()
    assert cli.main(["--from-png", str(first), "--out", str(tmp_path / "second")]) == 0
    assert "another" not in capsys.readouterr().err
    assert np.array_equal(Image.open(first), Image.open(tmp_path / "second" / first.name))
    Image.open(edges).rotate(90).resize((24, 24)).save(edges)
    assert cli.main(["--from-png", str(first), "--out", str(tmp_path / "third")]) == 0
    assert "drawn under other condition pictures: the picture will be another" in capsys.readouterr().err


def test_one_command_writes_the_whole_config(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["controlnet", "--images", str(project), "--base", str(project / "teacher"), "--size", "16", "--print-config"]
    edges = str(project / "edges.png")
    told = [
        "--condition",
        "small",
        "--prompt",
        "a dot",
        "--validation-image",
        edges,
        "--proportion-empty-prompts",
        "0.5",
    ]
    assert finetune.main([*own, *told]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["task"]["kind"] == "controlnet"
    assert tree["task"]["conditions"] == [edges]
    assert tree["task"]["options"]["drop"] == 0.5
    assert tree["data"]["pairs"]["condition"] == {"kind": "small", "factor": 4, "enlarge": True, "cache": "pixels"}
    assert tree["train"]["optim"]["lr"] == 1e-5
    with pytest.raises(ValueError, match=r"--condition stored: .* is a folder of pictures"):
        finetune.main([*own, "--condition", "stored"])
    with pytest.raises(ValueError, match=r"0 pictures for 1 samples\.prompts"):
        finetune.main([*own, "--prompt", "a dot"])


def test_bad_configs_are_refused(project: Path) -> None:
    from ldm.recipes import assemble

    def line(changes: dict[str, Any], data: dict[str, Any] | None = None) -> str:
        tree = config(project, "bad", **changes)
        tree["data"] |= data or {}
        try:
            told = decode(RunConfig, tree)
            assemble(told.task, told.data, told.train, 0, 0)
        except ValueError as error:
            return str(error)
        return ""

    assert "data.pairs: no 'condition' for a ControlNet" in line({}, {"pairs": {}})
    assert "1 pictures for 2 samples.prompts" in line({"samples": {"prompts": ["a", "b"]}})
    assert "channels: a condition has 1 or 3, got 4" in line({"channels": 4})
    assert "no ControlNet" in line({"start": str(project / "teacher")})
    assert "sensitivity must be at least 0" in line({"sensitivity": -1})
