"""The main job in miniature, by the commands that users type: train on two processes, be stopped, resume, draw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.cli.__main__ import main
from tests import miniature

AGAIN = 75
TWO = (sys.executable, "-m", "launch", "local", "--procs", "2", "--")
ENV = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.project(tmp_path_factory.mktemp("project"))


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    """`ldm train` on two processes."""
    command = [*TWO, sys.executable, "-m", "ldm.cli", "train", str(config), *overrides]
    env = {k: v for k, v in os.environ.items() if k not in RANKS} | ENV
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], code: int) -> str:
    """Its output, once it has ended as it should."""
    try:
        out = process.communicate(timeout=400)[0]
    finally:
        process.kill()
    assert process.returncode == code, out[-4000:]
    assert "Traceback" not in out
    return out


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log" / "metrics.jsonl").read_text().splitlines()]


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "export" / "unet").glob("*.safetensors")))


@pytest.fixture(scope="module")
def runs(root: Path) -> tuple[Path, Path, str]:
    """An undisturbed run, one that was stopped by SIGTERM in the middle and resumed, and what the latter said."""
    steps = 10
    config = miniature.text_to_image(root, cache=str(root / "cache"))
    config["train"] = miniature.train(steps=steps, checkpoint={"every": 4, "keep": 2})
    path = miniature.write(config, root / "config.yaml")
    finish(start(path, f"out={root / 'calm'}"), 0)
    disturbed = root / "disturbed"
    process = start(path, f"out={disturbed}")
    miniature.stop_after_two_steps(process, disturbed)
    finish(process, AGAIN)
    saved = sorted(disturbed.glob("checkpoints/step-*"))
    assert saved
    assert len(rows(disturbed)) < steps
    assert not (disturbed / "export").exists()
    said = finish(start(path, f"out={disturbed}"), 0)
    return root / "calm", disturbed, said


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(runs: tuple[Path, Path, str]) -> None:
    calm, disturbed, said = runs
    assert "resuming from" in said
    a, b = rows(calm), rows(disturbed)
    assert [r["step"] for r in b] == list(range(1, 11))
    for name in ("loss", "grad_norm", "lr", "loss_low_noise", "loss_middle_noise", "loss_high_noise"):
        assert [r[name] for r in a] == [r[name] for r in b], name
    ours, theirs = exported(calm), exported(disturbed)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    for run in (calm, disturbed):
        assert json.loads((run / "done.json").read_text())["step"] == 10
        assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-10", "step-8"]
    assert len({r["loss"] for r in a}) == 10
    assert all(r["data_memory_gib"] > 0 and r["bad_samples"] == 0 for r in a)
    assert all(0.05 < r["host_memory_gib"] < 100 for r in a)


def test_sample_grids_are_the_same_too(runs: tuple[Path, Path, str]) -> None:
    calm, disturbed, _ = runs
    names = sorted(p.name for p in (calm / "samples").glob("*.png"))
    assert names == ["step-0000000.png", "step-0000004.png", "step-0000008.png", "step-0000010.png"]
    first, last = (np.asarray(Image.open(calm / "samples" / n)) for n in (names[0], names[-1]))
    assert np.array_equal(last, np.asarray(Image.open(disturbed / "samples" / names[-1])))
    assert not np.array_equal(first, last)


def test_the_export_opens_here_and_in_diffusers(runs: tuple[Path, Path, str]) -> None:
    import diffusers

    import ldm

    run = runs[0]
    pipeline = ldm.load(run)
    pictures = pipeline("a red dot", steps=2, seed=3, guidance=2.0)
    assert pictures[0].size == (miniature.SIZE, miniature.SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(run / "export", safety_checker=None)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    cond = pipeline.encode_text(["a red dot", ""])
    with torch.no_grad():
        ids = theirs.tokenizer(["a red dot", ""], padding="max_length", return_tensors="pt", max_length=12).input_ids
        torch.testing.assert_close(theirs.text_encoder(ids)[0], cond["text"], rtol=0, atol=1e-5)
        ours = pipeline.unet(x, t, cond)
        torch.testing.assert_close(theirs.unet(x, t, cond["text"]).sample, ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.vae.decode(x).sample, pipeline.codec.autoencoder.decode(x), rtol=0, atol=1e-5)
    assert theirs.vae.config.scaling_factor == pipeline.codec.scale == 0.9
    assert theirs.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_pictures_do_not_depend_on_the_batch_size(runs: tuple[Path, Path, str], sampler: str) -> None:
    import ldm

    pipeline = ldm.load(runs[0])
    prompts = ["a red dot", "a blue bar", "", "a green cross", "white"]
    one, four = (
        [np.asarray(p, dtype=int) for p in pipeline(prompts, steps=3, seed=1, sampler=sampler, batch=b)] for b in (1, 4)
    )
    assert max(np.abs(a - b).max() for a, b in zip(one, four, strict=True)) <= 1  # a rounding of 1/255
    assert not np.array_equal(one[0], one[1])


def test_a_finished_run_is_not_touched_by_the_same_command(runs: tuple[Path, Path, str], root: Path) -> None:
    run = runs[0]
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert main(["train", str(root / "config.yaml"), f"out={run}"]) == 0
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_another_world_size_resumes(runs: tuple[Path, Path, str], root: Path) -> None:
    """The stopped run's folder on one process: same data and schedule, losses equal but for rounding."""
    calm, other = runs[0], root / "other"
    (other / "checkpoints").mkdir(parents=True)
    os.symlink(calm / "checkpoints" / "step-8", other / "checkpoints" / "step-8")
    assert main(["train", str(root / "config.yaml"), f"out={other}", "train.engine.zero_stage=1"]) == 0
    a, b = rows(calm)[-2:], rows(other)
    assert [r["step"] for r in b] == [9, 10]
    assert [r["loss"] for r in b] == pytest.approx([r["loss"] for r in a], rel=1e-5)


@pytest.mark.parametrize("kind", ["autoencoder", "contrastive"])
def test_the_other_recipes_train_resume_and_export(kind: str, root: Path, tmp_path: Path) -> None:
    config = getattr(miniature, kind)(root)
    path = miniature.write(config, tmp_path / "config.yaml")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", str(path), f"out={whole}"]) == 0
    assert main(["train", str(path), f"out={parts}", "train.checkpoint.every=4"]) == 0
    newest = parts / "checkpoints" / "step-6"
    shard = newest / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])  # cut short, as by a full disk
    (parts / "done.json").unlink()
    with pytest.warns(UserWarning, match=r"step-6 is damaged .*bytes"):
        assert main(["train", str(path), f"out={parts}"]) == 0  # from step 4
    a, b = rows(whole), rows(parts)
    assert [r["step"] for r in b] == list(range(1, 7))
    assert [r["loss"] for r in a] == [r["loss"] for r in b]
    assert all(np.isfinite(v) for r in a for v in r.values())
    name = {"autoencoder": "vae", "contrastive": "clip"}[kind]
    for left, right in zip(sorted(whole.glob(f"export/{name}/*")), sorted(parts.glob(f"export/{name}/*")), strict=True):
        assert left.read_bytes() == right.read_bytes()
    figures = json.loads((whole / "export" / "figures.json").read_text())
    assert figures["step"] == 6
    if kind == "autoencoder":
        assert "adversarial" not in a[1]
        assert "adversarial" in a[2]
        scale = json.loads((whole / "export" / "vae" / "config.json").read_text())["scaling_factor"]
        assert scale == pytest.approx(1 / figures["latent_std"], rel=1e-4)


def test_killed_between_the_last_step_and_the_export(root: Path, tmp_path: Path) -> None:
    """All steps are saved but the export is missing: the same command measures and exports, with the same figures."""
    path = miniature.write(miniature.autoencoder(root), tmp_path / "config.yaml")
    out = tmp_path / "run"
    assert main(["train", str(path), f"out={out}", "train.steps=3"]) == 0
    export = {p.name: p.read_bytes() for p in (out / "export").rglob("*") if p.is_file()}
    for left in (out / "done.json", *sorted((out / "export").rglob("*"), reverse=True)):
        left.rmdir() if left.is_dir() else left.unlink()
    assert main(["train", str(path), f"out={out}", "train.steps=3"]) == 0
    assert {p.name: p.read_bytes() for p in (out / "export").rglob("*") if p.is_file()} == export
