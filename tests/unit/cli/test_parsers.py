"""All command lines: defaults in every help, kinds of options, and examples that are themselves accepted."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import _parser as launch_parser
from launch.options import Parser, default_text
from ldm.cli.__main__ import VERBS, main
from ldm.cli.options import is_override
from tests import miniature

ROOT = Path(__file__).parents[3]


def verb_parser(verb: str) -> Any:
    module = importlib.import_module(f"ldm.cli.{verb}")
    return (module.parser if "parser" in vars(module) else module._parser)()


def leaves(parser: Any) -> Iterator[Any]:
    """The parser and those of its verbs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from leaves(below)


ALL = [p for verb in VERBS for p in leaves(verb_parser(verb))] + list(leaves(launch_parser()))


@pytest.mark.parametrize("parser", ALL, ids=lambda p: p.prog)
def test_every_option_tells_its_default(parser: Any) -> None:
    assert isinstance(parser, Parser)
    for action in parser._actions:
        if action.option_strings and action.help != argparse.SUPPRESS and default_text(action):
            told = parser._get_formatter()._expand_help(action)
            assert f"default: {default_text(action)}" in told, action.option_strings


def test_defaults_that_come_later_are_told_too() -> None:
    """Those of fine-tuning by method, and those of a SLURM job, which a site's file may change."""
    from launch.job import SlurmJob
    from ldm.recipes.folder_runs import RATES, STEPS

    helps = {p.prog: {o: a.help for a in p._actions for o in a.option_strings} for p in leaves(verb_parser("finetune"))}
    for method, steps in STEPS.items():
        told = helps["ldm finetune " + method.removesuffix("_lora").removesuffix("_pivotal").replace("_", "-")]
        assert str(steps) in told["--steps"]
        assert all(f"{rate:.0e}".replace("e-0", "e-") in told["--lr"] for rate in RATES[method])
    (slurm,) = [p for p in ALL if p.prog.endswith("launch slurm")]
    fields = {f.name: f.default for f in dataclasses.fields(SlurmJob)}
    for action in slurm._actions:
        value = fields.get(action.dest)
        if isinstance(value, (int, str, Path)) and not isinstance(value, bool) and value:
            assert str(value) in action.help, action.dest


@pytest.mark.parametrize("parser", ALL, ids=lambda p: p.prog)
def test_help_on_odd_terminals(parser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("1", "20", "0", "-5", "many", "100000"):
        monkeypatch.setenv("COLUMNS", columns)
        assert parser.format_help()


@pytest.mark.parametrize("parser", ALL, ids=lambda p: p.prog)
def test_no_option_takes_paths_or_numbers_unread(parser: Any) -> None:
    """Every kind is one that the parser reads: finite numbers, and ~ for the home folder."""
    for action in parser._actions:
        assert action.type in (None, str, int, float, Path), action.option_strings


def test_a_verb_that_is_missing_is_one_of_those(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, one in (
        ("data", "build, index, inspect, encode, edits, captions, check"),
        ("finetune", "dreambooth, textual-inversion, lora, controlnet, ip-adapter, inpaint, instruct, upscale"),
    ):
        with pytest.raises(SystemExit):
            main([verb])
        assert f", one of {one}; `ldm {verb} --help`" in capsys.readouterr().err


def test_the_verbs_have_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, right in (("trian", "train"), ("Sample", "sample"), ("txt2img", "sample"), ("eval", "evaluate")):
        assert main([wrong]) == 2
        assert capsys.readouterr().err.endswith(f"; did you mean {right!r}?\n")


@pytest.mark.parametrize(
    ("argv", "right"),
    [
        (["sample", "--guidence", "3"], "--guidance"),
        (["sample", "--num_inference_steps", "3"], "--steps"),
        (["sample", "--cfg-scale=3"], "--guidance"),
        (["sample", "--negative_prompt", "x"], "--negative"),
        (["sample", "--width", "64"], "--size"),
        (["sample", "--scheduler", "ddim"], "--sampler"),
        (["finetune", "lora", "--train_data_dir", "x"], "--images"),
        (["finetune", "lora", "--network_dim", "8"], "--rank"),
        (["finetune", "lora", "--pretrained_model_name_or_path", "x"], "--base"),
        (["edit", "img2img", "a", "b", "--guidance_scale", "3"], "--guidance"),
        (["evaluate", "retrieval", "--candidate", "3", "--bacth", "3"], "--batch"),
        (["data", "build", "--shardbytes", "3"], "--shard-bytes"),
        (["train", "--dryrun"], "--dry-run"),
        (["plan", "--gpu-per-node", "3"], "--gpus-per-node"),
    ],
)
def test_options_of_others_are_known(argv: list[str], right: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"; did you mean {right}?" in err


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return miniature.write(miniature.text_to_image(miniature.project(tmp_path / "project")), tmp_path / "a=b.yaml")


def test_options_and_overrides_in_any_order(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = None
    words = [f"out={tmp_path}/x", str(config), "--print-config", "train.steps=3"]
    for order in ((0, 1, 2, 3), (2, 0, 1, 3), (1, 3, 2, 0), (3, 2, 1, 0)):
        assert main(["train", *(words[i] for i in order)]) == 0
        printed = capsys.readouterr().out
        assert f"out: {tmp_path}/x" in printed
        wanted = wanted or printed
        assert printed == wanted
    with pytest.raises(SystemExit):
        main(["distill", "lcmm", str(config)])
    assert "did you mean 'lcm'?" in capsys.readouterr().err
    for argv in (["train"], ["train", "train.steps=3"]):
        with pytest.raises(SystemExit):
            main(argv)
        assert "CONFIG is missing" in capsys.readouterr().err
    assert main(["train", str(config), "more.yaml"]) == 2
    assert "expected key=value" in capsys.readouterr().err


def test_finetune_takes_overrides_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "my cat #1"
    images.mkdir()
    argv = ["finetune", "lora", "train.steps=7", "--images", str(images), "train.optim.warmup=2", "--rank", "8",
            "out=~/x #2", "--print-config"]  # fmt: skip
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "steps: 7" in printed
    assert "rank: 8" in printed
    assert f"out: '{Path.home()}/x #2'" in printed or f"out: {Path.home()}/x #2" in printed
    assert main([*argv, "--rank", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def examples() -> list[tuple[str, str]]:
    """`key=value` words that messages and helps suggest: (file, word)."""
    found = []
    for path in sorted([*(ROOT / "ldm").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]):
        for match in re.finditer(r"such as ((?:[\w.]+=[^\s\"'`;)]+ ?)+)", path.read_text(encoding="utf-8")):
            found += [(path.name, word.rstrip(".,")) for word in match[1].split() if is_override(word)]
    return found


def test_suggested_overrides_are_accepted(config: Path) -> None:
    from ldm.config.schema import load_run

    words = {word for _, word in examples() if "." in word or word.startswith("out=")}
    assert "train.optim.lr=1e-4" in words
    for word in words:
        assert load_run(config, [word]), word
