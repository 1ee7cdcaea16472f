"""The shipped few-step student: size, what it draws with by itself, determinism, other LoRAs beside it, the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint.lora_files import NAME
from ldm.cli.__main__ import main
from ldm.config.schema import load_run
from ldm.demo import run as demo
from ldm.demo.page import build
from ldm.models.shipped import ASSETS, SHIPPED, STUDENTS
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.record import PARTS, model_hash
from ldm.recipes.sources import load_towers

FOUR = Settings(sampler="lcm", steps=4, guidance=1.0, seed=7)
PROMPTS = ["a red apple", "cat"]
ALL, EACH = 60_000_000, 20_000_000
"""Bytes of all that is embedded, data too, and of its largest file."""


@pytest.fixture(scope="module")
def student() -> TextToImage:
    return TextToImage.load("emoji_lcm")


def test_all_that_is_embedded_is_within_its_budget() -> None:
    assert all((SHIPPED[name] / NAME).is_file() for name in STUDENTS.values())
    sizes = [p.stat().st_size for p in ASSETS.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(sizes) <= ALL
    assert max(sizes) <= EACH


def test_four_steps_are_four_calls_without_guidance_and_the_same_again(student: TextToImage) -> None:
    calls: list[float] = []
    hook = student.unet.register_forward_pre_hook(lambda _, given: calls.append(float(given[1][0])))
    first = student.sample(PROMPTS, settings=FOUR)
    hook.remove()
    assert len(calls) == 4
    trained = json.loads((SHIPPED["emoji_lcm"] / "scheduler_config.json").read_text())["original_inference_steps"]
    stride = 1000 // trained
    assert {(t + 1) % stride for t in calls} == {0}, "at times that it was trained at"
    assert torch.equal(first, student.sample(PROMPTS, settings=FOUR))
    assert torch.equal(first, TextToImage.load("emoji_lcm").sample(PROMPTS, settings=FOUR))
    teacher = TextToImage.load("emoji").sample(PROMPTS, settings=FOUR)
    assert (first - teacher).abs().max() > 0.01
    assert first.flatten(1).std(1).min() > 0.1, "pictures, not a flat field"


def test_another_lora_stacks_on_it_and_comes_off_again(student: TextToImage) -> None:
    """The student's own file again at half its strength: the corrections add up to one and a half."""
    before = student.sample(PROMPTS, settings=FOUR)
    student.load_lora(SHIPPED["emoji_lcm"] / NAME, 0.5, name="again")
    both = student.sample(PROMPTS, settings=FOUR)
    student.unload_loras("again")
    assert torch.equal(student.sample(PROMPTS, settings=FOUR), before)
    whole = TextToImage.load("emoji")
    whole.student = student.student  # whose times both are drawn at
    whole.load_lora(SHIPPED["emoji_lcm"] / NAME, 1.5)
    change = float((both - before).abs().max())
    assert change > 1e-3
    assert (both - whole.sample(PROMPTS, settings=FOUR)).abs().max() < 0.05 * change


def test_the_command_draws_with_it_in_four_steps_by_itself(tmp_path: Path) -> None:
    assert main(["sample", "a red apple", "--model", "emoji_lcm", "--seed", "7", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        told = json.loads(grid.info["ldm"])
    assert (told["sampler"], told["steps"], told["guidance"]) == ("lcm", 4, 1.0)


def test_the_page_shows_what_is_drawn_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A yellow face as the prompt gives a yellower picture than others do."""
    monkeypatch.setattr(demo, "IMAGE_SCALES", (1.0,))
    model, nothing = TextToImage.load("emoji"), cast("Any", None)
    config = load_run(ASSETS / "demo.yaml")
    shown = demo.Demo(config, Path(), model, nothing, Settings(sampler="dpmpp_2m", steps=6, guidance=3.0), print)
    demo.image_prompts(shown, model)
    given, drawn = (
        torch.stack([torch.tensor(np.asarray(p), dtype=torch.float32).flatten(0, 1).mean(0) for p in row if p])
        for row in shown.results.image_prompts.values()
    )
    given, drawn = given - given.mean(0), drawn - drawn.mean(0)
    assert (given * drawn).sum() / (given.norm() * drawn.norm()) > 0.3, "colours go over"
    assert "Pictures as prompts" in build(shown.results).html()


def test_the_page_shows_the_teacher_and_the_student_at_each_count(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, nothing = TextToImage.load("emoji"), cast("Any", None)
    assert demo.FEW_STEPS == (1, 2, 4, 8)
    monkeypatch.setattr(demo, "FEW_STEPS", (1, 2))
    settings = Settings(sampler="dpmpp_2m", steps=25, guidance=3.0)
    shown = demo.Demo(nothing, Path(), teacher, nothing, settings, print)
    demo.few_steps(shown, teacher)
    assert len(shown.results.few_steps) == 6
    assert all(len(row) == 2 for row in shown.results.few_steps.values())
    page = build(shown.results).html()
    assert all(word in page for word in ("Few steps", "teacher: Euler", "student: LCM", "1 step", "2 steps"))


def test_the_128_px_model_has_the_text_encoder_of_the_other(tmp_path: Path) -> None:
    whole, other = TextToImage.load("emoji_128"), TextToImage.load("emoji")
    assert whole.size(None) == (128, 128)
    mine, its = whole.text[0].state_dict(), other.text[0].state_dict()
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in its)
    assert torch.equal(load_towers("emoji_128")[0].table.weight, other.text[0].table.weight)
    assert model_hash("emoji_128", PARTS["text"]) == model_hash("emoji", PARTS["text"])
    assert model_hash("emoji_128") != model_hash("emoji")
    alone = tmp_path / "alone"
    shutil.copytree(SHIPPED["emoji_128"] / "vae", alone / "vae")
    assert model_hash("emoji_128", PARTS["vae"]) == model_hash(str(alone), PARTS["vae"]), "no other's files count"
    assert main(["convert", "emoji_128", str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert theirs.scheduler.config.use_flow_sigmas
    settings = Settings(sampler="dpmpp_2m", steps=2, guidance=3.0)
    again = TextToImage.load(tmp_path / "folder").sample(["cat"], settings=settings)
    assert torch.equal(again, whole.sample(["cat"], settings=settings))
