"""Starts in a folder that holds a run: what goes on, what is said, what is refused, and nothing written by refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm.checkpoint import files
from ldm.cli.__main__ import main
from ldm.recipes.models import usable
from ldm.train.state import read_state
from tests import miniature

Start = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.project(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def done(root: Path) -> Path:
    """A run of two steps of four samples."""
    config = miniature.text_to_image(root, samples={"prompts": [], "every": 0})
    config["train"] |= {"steps": 2, "checkpoint": {"every": 1, "keep": 0}, "engine": {"precision": "fp32"}}
    config["out"] = str(root / "done")
    path = miniature.write(config, root / "config.yaml")
    assert main(["train", str(path)]) == 0
    return root / "done"


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


@pytest.fixture
def start(root: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> Start:
    """`ldm train` in the copy; code and what was said."""

    def act(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["train", str(root / "config.yaml"), f"out={run}", *arguments])
        return code, capsys.readouterr().err

    return act


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed=3", "another seed (seed 0 → 3)"),
        ("data.split=heldout", "other data (data.split train → heldout"),
        ("task.process.prediction.kind=epsilon", "another objective (task.process.prediction v → epsilon)"),
        (
            "task.network.block_out_channels=[16,32]",
            "another model (task.network.block_out_channels [8, 16] → [16, 32])",
        ),
        ("train.optim.algorithm=lion", "another optimizer (train.optim.algorithm adamw → lion)"),
        ("data.path=/nowhere", "data.path: '/nowhere' is no folder"),
        ("task.vae=/nowhere", "task.vae: model '/nowhere': not a shipped model"),
    ],
)
def test_a_refused_start_names_what_differs_and_writes_nothing(run: Path, start: Start, change: str, said: str) -> None:
    before = content(run)
    code, text = start("train.steps=4", change)
    assert code == 2
    assert said in text
    assert "Traceback" not in text
    assert content(run) == before


def test_what_may_change_is_said_in_a_line_and_kept(run: Path, start: Start) -> None:
    """The new rate counts; the old config stays beside the log."""
    old = (run / "config.yaml").read_text()
    code, text = start("train.steps=3", "train.optim.lr=3e-4", "train.ema=null", "train.optim.decay=constant")
    assert code == 0
    assert "train.ema on (decay 0.9, warmup true) → none" in text
    assert "train.optim.lr 0.002 → 0.0003" in text
    assert rows(run)[-1]["lr"] == 3e-4
    event = json.loads((run / "log" / "events.jsonl").read_text())
    assert event["step"] == 2
    assert event["event"] == "changed"
    assert "train.optim.lr 0.002 → 0.0003" in event["keys"]
    assert (run / "log" / "config-until-step-2.yaml").read_text() == old
    told = read_state(run / "checkpoints" / "step-3")["trained_with"]
    assert told["config"]["train"]["optim"]["lr"] == 3e-4
    assert told["history"][0]["step"] == 2


def test_allowed_changes_go_on_and_are_the_rule_from_then_on(run: Path, start: Start) -> None:
    changes = ("train.optim.algorithm=lion", "seed=3", "train.optim.lr=1e-4")
    code, text = start("--allow-changes", "train.steps=3", *changes)
    assert code == 0
    assert "seed 0 → 3" in text
    assert "seed 0 → 3" in (run / "log" / "events.jsonl").read_text()
    assert read_state(run / "checkpoints" / "step-3")["optimizer"] == "Lion"
    assert start("train.steps=4", *changes)[0] == 0  # as it is now
    assert start("train.steps=5")[0] == 2  # as it was
    code, text = start("--allow-changes", "train.steps=5", *changes, "task.network.block_out_channels=[16,32]")
    assert code == 2
    assert "parameters differ, such as" in text


def test_another_batch_goes_on_at_the_same_sample(run: Path, start: Start) -> None:
    code, text = start("train.steps=3", "train.batch=8", "train.accumulate=2")
    assert code == 0
    assert "train.batch 4 → 8" in text
    assert "the data go on at sample 8;" in text
    assert read_state(run / "checkpoints" / "step-3")["extra"]["batches"] == [[0, 4], [2, 8]]
    code, text = start("train.steps=4")
    assert code == 0
    assert "batch 8 → 4: the data go on at sample 16;" in text


def test_fewer_steps_than_done_train_nothing_and_say_so(run: Path, start: Start) -> None:
    weights = content(run / "export")
    code, text = start("train.steps=1")
    assert code == 0
    assert "train.steps is 1, but" in text
    assert "has done 2: nothing is left to train" in text
    assert {k: v for k, v in content(run / "export").items() if k.endswith("safetensors")} == {
        k: v for k, v in weights.items() if k.endswith("safetensors")
    }
    assert [r["step"] for r in rows(run)] == [1, 2]


def test_a_checkpoint_without_the_record_goes_on_with_a_line(run: Path, start: Start) -> None:
    for step in (1, 2):
        folder = run / "checkpoints" / f"step-{step}"
        told = read_state(folder)
        del told["trained_with"], told["extra"]["batches"], told["extra"]["computed_in"]
        (folder / "state.json").write_text(json.dumps(told))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["state.json"] = files.describe(folder / "state.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))
    code, text = start("train.steps=3")
    assert code == 0
    assert "does not say what it was trained with: nothing is compared" in text


def test_when_all_are_damaged_nothing_begins_unless_told(run: Path, start: Start) -> None:
    for step, name in ((1, "state.json"), (2, "shard-00000.safetensors")):
        path = run / "checkpoints" / f"step-{step}" / name
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    before = content(run)
    with pytest.warns(UserWarning, match="damaged"):
        code, text = start("train.steps=4")
    assert code == 2
    assert "step-2: shard-00000.safetensors: contents changed (SHA-256 differs); step-1: state.json" in text
    assert "--from-scratch" in text
    assert content(run) == before
    code, text = start("--from-scratch", "train.steps=1")
    assert code == 0
    aside = content(run / "earlier-1")
    kept = {k: v for k, v in before.items() if not k.startswith("lock")}
    assert aside == kept
    assert [r["step"] for r in rows(run)] == [1]


def test_a_finished_run_without_its_checkpoints_is_not_begun_again(run: Path, start: Start) -> None:
    shutil.rmtree(run / "checkpoints")
    before = content(run)
    code, text = start("train.steps=4")
    assert code == 2
    assert "none of its checkpoints is left" in text
    assert content(run) == before


def test_seeds_of_any_size_train(root: Path, tmp_path: Path) -> None:
    """Two seeds that agree in 64 bits are still two."""
    losses = []
    for seed in (5, 5 + 2**64, -(2**63) - 1):
        out = tmp_path / str(seed)
        assert main(["train", str(root / "config.yaml"), f"out={out}", "train.steps=1", f"seed={seed}"]) == 0
        losses.append(rows(out)[0]["loss"])
    assert len(set(losses)) == 3


def test_the_network_of_the_start_trains_and_is_written(
    root: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run, its export and its checkpoint alike; another one is refused, `ldm plan` reads the start's."""
    config = yaml.safe_load((root / "config.yaml").read_text())
    network = config["task"].pop("network")
    for number, source in enumerate((done, done / "export", done / "checkpoints" / "step-1", f"{done}@2")):
        out = tmp_path / str(number)
        path = miniature.write(config, tmp_path / "config.yaml")
        assert main(["train", str(path), f"task.start={source}", f"out={out}", "train.steps=1"]) == 0
        written = yaml.safe_load((out / "config.yaml").read_text())["task"]["network"]
        assert written["block_out_channels"] == network["block_out_channels"]
        assert written["cross_attention_dim"] == 16
    capsys.readouterr()
    assert main(["plan", str(path), f"task.start={done}", "--gpu", "a100-80g", "--json"]) == 0
    plain = capsys.readouterr().out
    assert main(["plan", str(root / "config.yaml"), "--gpu", "a100-80g", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(plain)
    config["task"]["network"] = network | {"block_out_channels": [16, 32]}
    path = miniature.write(config, tmp_path / "config.yaml")
    assert main(["train", str(path), f"task.start={done}", f"out={tmp_path / 'other'}"]) == 2
    said = capsys.readouterr().err
    assert "task.network: another network than that of task.start" in said
    assert "block_out_channels [16, 32] for [8, 16]" in said
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_is_exported_by_its_own_name(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, source in enumerate((f"{done}@1", done / "checkpoints" / "step-1")):
        assert main(["export", str(source), str(tmp_path / str(number))]) == 0
        assert f"{tmp_path / str(number)}: step 1," in capsys.readouterr().out
    assert main(["export", f"{done}@1", str(tmp_path / "c"), "--step", "2"]) == 2
    assert main(["export", str(done.parent / "data"), str(tmp_path / "c")]) == 2
    assert "no config.yaml in it: it is a data set" in capsys.readouterr().err


def test_what_is_no_model_is_named(root: Path, done: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model .*it is a data set"):
        usable(root / "data", "--model")
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match="it is empty"):
        usable(tmp_path / "notes")
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(ValueError, match=r"it holds a\.txt"):
        usable(tmp_path / "notes")
    with pytest.raises(ValueError, match=r"no checkpoint of step 7, only of \[1, 2\]"):
        usable(f"{done}@7")


@pytest.fixture(scope="module")
def tuned(root: Path) -> Callable[..., int]:
    """`ldm finetune lora` of the miniature teacher on three captioned pictures."""
    miniature.teacher(root)
    (root / "subject").mkdir()
    for color in ("red", "green", "blue"):
        (root / "subject" / f"{color}.png").write_bytes(miniature.picture(color, "cross"))
        (root / "subject" / f"{color}.txt").write_text(f"a {color} cross")

    def act(out: Path, *options: str, steps: int = 2) -> int:
        plain = ("--images", root / "subject", "--base", root / "teacher", "--out", out, "--steps", steps, "--size", 16)
        sets = ("train.checkpoint.every=1", "train.log.tensorboard=false", "train.engine.precision=fp32")
        words = [*map(str, plain), *(w for s in sets for w in ("--set", s)), "--samples-every", "0"]
        return main(["finetune", "lora", *words, *options])

    return act


def test_a_fine_tuning_says_what_it_was(
    tuned: Callable[..., int], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank, batch and rate by their names; another base by its content."""
    out = tmp_path / "lora"
    assert tuned(out) == 0
    before = content(out)
    for options, said in (
        (("--rank", "16"), "another adapter (task.adapter.rank 4 → 16)"),
        (("--alpha", "8"), "another adapter (task.adapter.alpha none → 8)"),
        (("--seed", "1"), "another seed (seed 0 → 1)"),
        (("--set", "task.weighting.kind=min_snr"), "another objective (task.weighting uniform → min_snr)"),
    ):
        capsys.readouterr()
        assert tuned(out, *options, steps=3) == 2
        assert said in capsys.readouterr().err
        assert content(out) == before
    assert tuned(out, "--batch", "3", "--lr", "3e-4", steps=3) == 0
    said = capsys.readouterr().err
    assert "train.batch 2 → 3" in said
    assert "train.optim.lr 0.0001 → 0.0003" in said
    weights = next((root / "teacher" / "unet").glob("*.safetensors"))
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert tuned(out, "--batch", "3", "--lr", "3e-4", steps=4) == 2
    assert "another base model (task.base: other weights" in capsys.readouterr().err
    weights.write_bytes(kept)


def test_a_fine_tuning_begins_anew_with_other_pictures(
    tuned: Callable[..., int], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own shards and cache go aside too; a start that fails on the way puts all back."""
    out, more = tmp_path / "lora", tmp_path / "more"
    assert tuned(out) == 0
    before = content(out)
    shutil.copytree(root / "subject", more)
    (more / "white.png").write_bytes(miniature.picture("white", "dot"))
    (more / "white.txt").write_text("a white dot")
    assert tuned(out, "--images", str(more), steps=3) == 2
    assert "other pictures" in capsys.readouterr().err
    assert content(out) == before
    broken = ("--from-scratch", "--images", str(more), "--set", "train.optim.weight_decay=0.5", "--targets", "nothing")
    assert tuned(out, *broken) == 2
    assert content(out) == before
    assert tuned(out, "--from-scratch", "--images", str(more)) == 0
    assert content(out / "earlier-1") == {k: v for k, v in before.items() if not k.startswith("lock")}
    told = read_state(out / "checkpoints" / "step-2")["trained_with"]["content"]["data"]
    assert [d["samples"] for d in told] == [4]


def test_a_student_says_what_its_teacher_was(
    tuned: Callable[..., int], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a checkpoint may stand for the teacher: of one without an export, it is written once."""
    assert tuned(tmp_path / "lora") == 0
    shutil.rmtree(tmp_path / "lora" / "export")
    method = {"kind": "lcm", "solver_steps": 10}
    config = miniature.distill(root, method, teacher=f"{tmp_path / 'lora'}@1", guidance_embedding=None)
    config["task"]["samples"] = {"prompts": [], "every": 0}
    config["task"]["method"]["w"] = [2.0, 2.0]
    config["out"] = str(tmp_path / "lcm")
    config["train"] |= {"steps": 1, "checkpoint": {"every": 1}}
    path = miniature.write(config, tmp_path / "config.yaml")
    assert main(["distill", "lcm", str(path)]) == 0
    written = yaml.safe_load((tmp_path / "lcm" / "config.yaml").read_text())["task"]["teacher"]
    assert written == str(tmp_path / "lora" / "exports" / "step-1")
    capsys.readouterr()
    assert main(["distill", "lcm", str(path), "train.steps=2", f"task.teacher={root / 'teacher'}"]) == 2
    assert "another teacher (task.teacher: other weights" in capsys.readouterr().err
    assert main(["distill", "lcm", str(path), "train.steps=2"]) == 0
