"""`ldm finetune` as users run it: preempted and given again; the shipped model under every ZeRO stage."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.cli.finetune import main as finetune
from ldm.config.schema import load_run
from ldm.pipeline import TextToImage
from tests import miniature, ranks
from tests.integration.test_end_to_end import ENV, RANKS, TWO, finish, rows

pytestmark = pytest.mark.slow
AGAIN = 75


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("command"))
    miniature.teacher(root)
    (root / "subject").mkdir()
    for color in ("red", "green", "blue"):
        (root / "subject" / f"{color}.png").write_bytes(miniature.picture(color, "cross"))
    return root


def start(root: Path, out: Path) -> subprocess.Popen[str]:
    """The command on two processes."""
    method = ("dreambooth", "--identifier", "sks", "--class", "cross", "--lora", "--num-class-images", "3")
    changes = ("train.checkpoint.every=4", "train.log.every=1", "train.threads=1", "task.prior.settings.steps=2")
    changes += ("task.samples.settings.steps=2", "train.log.tensorboard=false")
    options = ("--images", root / "subject", "--base", root / "teacher", "--out", out, "--steps", 10, "--lr", 0.01)
    options += ("--samples-every", 5, "--precision", "fp32")
    command = [*TWO, sys.executable, "-m", "ldm.cli", "finetune", *method, *map(str, options)]
    command += [word for change in changes for word in ("--set", change)]
    env = {k: v for k, v in os.environ.items() if k not in RANKS} | ENV
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_preempted_run_goes_on_with_the_same_command(root: Path) -> None:
    calm, disturbed = root / "calm", root / "disturbed"
    finish(start(root, calm), 0)
    process = start(root, disturbed)
    miniature.stop_after_two_steps(process, disturbed)
    finish(process, AGAIN)
    assert len(rows(disturbed)) < 10
    assert not (disturbed / "export").exists()
    said = finish(start(root, disturbed), 0)
    assert "resuming from" in said
    assert [r["loss"] for r in rows(calm)] == [r["loss"] for r in rows(disturbed)]
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        ours, theirs = (load_file(run / "export" / name) for run in (calm, disturbed))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert load_run(disturbed / "config.yaml").train.steps == 10  # the resolved config is one for `ldm train`
    assert "already finished 10 steps" in finish(start(root, disturbed), 0)


def tune(argv: list[str]) -> int:
    """The command in a rank of its own, its progress bars silent."""
    with contextlib.redirect_stderr(io.StringIO()):
        return finetune(argv)


@pytest.mark.parametrize(
    "options", [("--train-text-encoder",), ("--lora", "--train-text-encoder")], ids=["full", "lora"]
)
def test_the_shipped_model_under_every_zero_stage(options: tuple[str, ...], root: Path) -> None:
    """DreamBooth with preservation on two processes: two steps give the same weights whatever is divided."""
    found = {}
    for stage in range(4):
        out = root / f"emoji{len(options)}-{stage}"
        argv = ["dreambooth", "--identifier", "sks", "--class", "bird", "--images", str(root / "subject"), *options]
        argv += ["--out", str(out), "--steps", "2", "--zero-stage", str(stage), "--precision", "fp32"]
        argv += ["--class-data-dir", str(root / "birds"), "--num-class-images", "4", "--lr", "1e-4"]
        for change in ("task.prior.settings.steps=2", "task.samples.settings.steps=1", "train.threads=1"):
            argv += ["--set", change]
        assert ranks.run(tune, 2, argv, timeout=900) == [0, 0]
        found[stage] = weights(TextToImage.load(out))
    before = weights(TextToImage.load("emoji"))
    moved = {k for k, v in before.items() if not torch.equal(v, found[0][k])}
    # of corrections every attention's matrices: 8 in each of the U-Net's 4, 2 (q, k and v in one) in each of the text's
    attentions = {k for k in before if k.endswith("weight") and any(w in k for w in ("attn1.", "attn2.", ".attn."))}
    assert moved == (attentions if "--lora" in options else set(before))
    assert len(attentions) == 4 * 8 + 4 * 2
    step = sum(float((found[0][k] - before[k]).abs().sum()) for k in moved)
    for stage in (1, 2, 3):  # single numbers may go elsewhere: Adam's first step has a gradient's sign, however small
        off = sum(float((found[0][k] - found[stage][k]).abs().sum()) for k in before)
        assert off < 1e-3 * step


def weights(pipeline: TextToImage) -> dict[str, torch.Tensor]:
    modules = (pipeline.unet, *(tower.model for tower in pipeline.text))
    return {f"{i}.{k}": v.detach() for i, m in enumerate(modules) for k, v in m.named_parameters()}
