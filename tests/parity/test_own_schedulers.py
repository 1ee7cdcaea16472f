"""A folder's own scheduler, asked for by its sampler's name, draws the picture that diffusers' pipeline draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.pipeline import TextToImage
from tests.parity.test_diffusers_folder import SCHEDULER, make, save
from tests.parity.test_pipelines import BOUND, NEGATIVE, PROMPT, STEPS, ours_of, theirs_of

PLAIN = {k: v for k, v in SCHEDULER.items() if k not in ("_class_name", "set_alpha_to_one")}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "leading", "use_karras_sigmas": True}),
    ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "algorithm_type": "dpmsolver++"}),
    ("heun", "HeunDiscreteScheduler", {}),
    ("plms", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    ("ddim", "DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
]


@pytest.mark.parametrize(("sampler", "cls", "more"), CASES, ids=[f"{i}-{c[1]}" for i, c in enumerate(CASES)])
def test_picture(sampler: str, cls: str, more: dict[str, Any], tmp_path: Path) -> None:
    parts = make("sd1")
    parts.scheduler = {"_class_name": cls, **PLAIN, **more}
    with torch.no_grad():  # when the network is asked is to be seen in the picture
        for parameter in [*parts.network.time_embedding.parameters(), *parts.network.conv_out.parameters()]:
            parameter *= 8
    save(parts, tmp_path / "ours")
    pipe = theirs_of(tmp_path / "ours")
    assert type(pipe.scheduler).__name__ == cls
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    expected = pipe(PROMPT, negative_prompt=NEGATIVE, latents=noise, **STEPS).images * 2 - 1
    assert expected.std() > 0.01
    assert (ours_of(tmp_path / "ours", noise, sampler=sampler) - expected).abs().max() < BOUND
    other = ours_of(tmp_path / "ours", noise, sampler=sampler, spacing="quadratic")  # what is asked for goes first
    assert (other - expected).abs().max() > BOUND


def test_a_scheduler_that_does_not_draw_here_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = make("sd1")
    parts.scheduler = {"_class_name": "SASolverScheduler", **PLAIN}
    save(parts, tmp_path / "ours")
    assert TextToImage.load(tmp_path / "ours").own is None
    assert "SASolverScheduler is no sampler here" in caplog.text


def test_a_folder_with_added_tokens(tmp_path: Path) -> None:
    """As textual inversion saves a whole pipeline; the folder that we write of it loads there with the same picture."""
    from ldm.checkpoint.convert import convert

    parts = make("sd1")
    save(parts, tmp_path / "plain")
    pipe = theirs_of(tmp_path / "plain")
    pipe.tokenizer.add_tokens(["<toy>", "<toy>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[-2:] = torch.randn(2, 32)
    pipe.save_pretrained(tmp_path / "full")
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    expected = pipe("a <toy> here", negative_prompt=NEGATIVE, latents=noise, **STEPS).images * 2 - 1
    convert(tmp_path / "full", tmp_path / "again", "diffusers")
    for folder in ("full", "again"):
        got = ours_of(tmp_path / folder, noise, prompt="a <toy> here", sampler="ddim")
        assert (got - expected).abs().max() < BOUND
    theirs = theirs_of(tmp_path / "again")("a <toy> here", negative_prompt=NEGATIVE, latents=noise, **STEPS).images
    assert (theirs * 2 - 1 - expected).abs().max() < BOUND
    added = json.loads((tmp_path / "again/tokenizer/added_tokens.json").read_text("utf-8"))
    assert added == {"<toy>": 4096, "<toy>_1": 4097}
