"""`ldm plan --card` and `--sample`: what is added makes the plan fit, and mistakes are told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldm.cli.__main__ import main
from tests import miniature


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("project"))
    miniature.teacher(root, "epsilon")
    task = {"kind": "finetune", "base": str(root / "teacher"), "adapter": {"kind": "lora", "rank": 4}}
    tree = {**miniature.contrastive(root), "task": task}
    tree["train"]["batch"] = 4
    return miniature.write(tree, root / "lora.yaml")


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def total(parts: dict[str, float]) -> float:
    return sum(v for k, v in parts.items() if k != "host")


def test_what_is_added_is_what_a_plan_with_it_takes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, plain = answer(capsys, str(config), "--card", "100")
    assert code == 0
    assert plain["way"]["settings"] == []
    least = total(plain["before"]["parts"])
    code, found = answer(capsys, str(config), "--card", str(0.6 * least / 0.92e9))
    assert code == 0
    words = [word for setting in found["way"]["settings"] for word in setting["words"]]
    assert words
    assert total(found["way"]["needs"]["parts"]) <= found["limit"]
    assert found["before"]["parts"] == plain["before"]["parts"] or "at least" in found["before"]["parts"]
    assert main(["plan", str(config), *words, "--gpus-per-node", "1", "--gpu", "rtx4060", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]["parts"]
    assert total(chosen) == pytest.approx(total(found["way"]["needs"]["parts"]), rel=1e-6)
    assert chosen["host"] == found["way"]["needs"]["parts"]["host"]


def test_what_does_not_fit_says_what_is_lacking(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config), "--card", "0.00001"]) == 1
    said = capsys.readouterr().out
    assert "it does not fit: " in said
    assert "GB are lacking with" in said
    assert "train.engine.blocks_on_device=1" in said


def test_drawing_with_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    code, whole = answer(capsys, "--sample", "tiny", "--size", "64")
    assert code == 0
    parts = whole["before"]["parts"]
    assert set(parts) == {"text", "network", "vae", "activations", "host"}
    _, half = answer(capsys, "--sample", "tiny", "--size", "64", "--precision", "bf16")
    for name in ("text", "network"):
        assert half["before"]["parts"][name] == pytest.approx(0.5 * parts[name], rel=0.01)
    assert half["before"]["parts"]["vae"] == parts["vae"]
    _, apart = answer(capsys, "--sample", "tiny", "--size", "64", "--offload")
    assert total(apart["before"]["parts"]) < total(parts)
    assert apart["before"]["parts"]["host"] == parts["text"] + parts["network"] + parts["vae"]
    _, many = answer(capsys, "--sample", "tiny", "--size", "64", "--count", "4")
    _, slices = answer(capsys, "--sample", "tiny", "--size", "64", "--count", "4", "--vae-slices")
    assert parts["activations"] < slices["before"]["parts"]["activations"] <= many["before"]["parts"]["activations"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--card", "0"], "--card must be above 0, got 0"),
        (["--sample", "tiny"], "give no config beside it"),
    ],
)
def test_mistakes_beside_a_config(
    config: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(config), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no config given"),
        (["--sample", "nobody/nothing"], "--sample: 'nobody/nothing' is not here"),
        (["--sample", "tiny", "--precision", "fp8"], "--precision: 'fp8' is not one of"),
        (["--sample", "tiny", "--count", "0"], "--count must be at least 1, got 0"),
        (["--sample", "tiny", "--size", "65"], "--size: 65 is not a multiple of"),
        (["--sample", "tiny", "--blocks-on-device", "0"], "--blocks-on-device must be at least 1, got 0"),
        (["--sample", "tiny", "--offload", "--blocks-on-device", "2"], "give one of both"),
        (["--sample", "tiny", "--text-precision", "int8"], "have no weights of 8 bits"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1, err
