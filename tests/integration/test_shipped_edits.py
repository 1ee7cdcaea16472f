"""What the shipped model's editing must keep, measured: inversion comes back, CLIP guidance raises retrieval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.cli import evaluate
from ldm.editing import clip_guide
from ldm.models.text.openclip import fitted, tokenizer_of
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.sources import load_clip


def figures(tmp_path: Path, *argv: str) -> dict:
    out = tmp_path / "figures.json"
    assert evaluate.main(["inversion", *argv, "--out", str(out)]) == 0
    return json.loads(out.read_text())["result"]


def test_forty_steps_there_and_back_cost_less_than_a_decibel(tmp_path: Path) -> None:
    """The short form: few held-out pictures and steps; two fixed-point rounds halve the error of the latents."""
    plain = figures(tmp_path, "--count", "2", "--steps", "40")
    assert plain["lost"]["mean"] < 1
    few = figures(tmp_path, "--count", "1", "--steps", "10")
    refined = figures(tmp_path, "--count", "1", "--steps", "10", "--refine", "2")
    assert refined["latent_rmse"] < 0.5 * few["latent_rmse"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--captions",), ("--refine", "2")], ids=lambda how: " ".join(how) or "plain")
def test_two_hundred_and_fifty_steps_cost_less_than_a_decibel(how: tuple[str, ...], tmp_path: Path) -> None:
    found = figures(tmp_path, "--count", "8", "--steps", "250", *how)
    assert found["lost"]["mean"] < 1
    assert found["lost"]["worst"] < 1


def test_clip_guidance_raises_each_similarity() -> None:
    """The short form: the shipped CLIP finds every guided picture closer to its caption than the unguided one."""
    captions = ["a red heart", "a smiling face with sunglasses", "a pizza"]
    pipe, (clip, config) = TextToImage.load("emoji"), load_clip("clip_emoji")
    model: Any = clip
    found = []
    with torch.no_grad():
        text = model.encode_text(tokenizer_of(config)(captions), normalize=True)
        for scale in (0.0, 5.0):
            guide = clip_guide(pipe, clip, config, scale)
            images = pipe.sample(captions, settings=Settings(steps=5, guidance=1.0), guide=guide)
            seen = fitted(images, config)
            found.append((model.encode_image(seen, normalize=True) * text).sum(1))
    assert bool((found[1] > found[0] + 0.02).all())


@pytest.mark.slow
def test_clip_guidance_raises_retrieval(tmp_path: Path) -> None:
    """On held-out combinations, without other guidance, from the same noise."""
    argv = ["samplers", "--samplers", "ddim", "--steps", "20", "--guidance", "1", "--clip-guidance", "0,5"]
    argv += ["--splits", "compositional", "--count", "24", "--no-bounds", "--out", str(tmp_path)]
    assert evaluate.main(argv) == 0
    plain, guided = (row["result"]["R@1"]["rate"] for row in json.loads((tmp_path / "results.json").read_text()))
    assert guided > plain
