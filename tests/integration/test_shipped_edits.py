"""What the shipped model's editing must keep, measured: inversion comes back, CLIP guidance raises retrieval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.cli import evaluate


def figures(tmp_path: Path, *argv: str) -> dict:
    out = tmp_path / "figures.json"
    assert evaluate.main(["inversion", *argv, "--out", str(out)]) == 0
    return json.loads(out.read_text())["result"]


def test_forty_steps_there_and_back_cost_less_than_a_decibel(tmp_path: Path) -> None:
    """The short form: few held-out pictures and steps; a fixed-point round halves the error of the latents."""
    plain = figures(tmp_path, "--count", "2", "--steps", "40")
    assert plain["lost"]["mean"] < 1
    few = figures(tmp_path, "--count", "1", "--steps", "10")
    refined = figures(tmp_path, "--count", "1", "--steps", "10", "--refine", "1")
    assert refined["latent_rmse"] < 0.5 * few["latent_rmse"]


@pytest.mark.slow
@pytest.mark.parametrize("captions", [(), ("--captions",)])
def test_two_hundred_and_fifty_steps_cost_less_than_a_decibel(captions: tuple[str, ...], tmp_path: Path) -> None:
    found = figures(tmp_path, "--count", "8", "--steps", "250", *captions)
    assert found["lost"]["mean"] < 1
    assert found["lost"]["worst"] < 1


@pytest.mark.slow
def test_clip_guidance_raises_retrieval(tmp_path: Path) -> None:
    """On held-out combinations, without other guidance, from the same noise."""
    argv = ["samplers", "--samplers", "ddim", "--steps", "20", "--guidance", "1", "--clip-guidance", "0,20"]
    argv += ["--splits", "compositional", "--count", "64", "--no-bounds", "--out", str(tmp_path)]
    assert evaluate.main(argv) == 0
    plain, guided = (row["result"]["R@1"]["rate"] for row in json.loads((tmp_path / "results.json").read_text()))
    assert guided > plain
