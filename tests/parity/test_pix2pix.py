"""InstructPix2Pix: our edits are those of diffusers' pipelines, from folders and single files both ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.convert import convert
from ldm.editing import instruct
from ldm.editing.canvas import pixels
from ldm.pipeline import Settings, TextToImage
from ldm.rng import Rng
from tests.parity.test_diffusers_folder import make, save
from tests.parity.test_pipelines import theirs_of

PROMPT, NEGATIVE, BOUND = "make it a red apple", "a green cross", 1e-3


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(4).integers(0, 255, (16, 24, 3), dtype=np.uint8))


def ours(folder: Path, photo: Image.Image, noise: Tensor, **changes: Any) -> Tensor:
    pipe = TextToImage.load(folder)
    settings = Settings(**{"steps": 8, "guidance": 5.0, "negative": NEGATIVE, "size": (16, 24)} | changes)
    given = pipe.concat.original(pixels(photo))
    return pipe.decode(pipe.latents([PROMPT], settings, Rng(0, (0,)), x=noise, given=given), settings)


@pytest.mark.parametrize("family", ["instruct", "instruct_xl"])
@pytest.mark.parametrize("scales", [(5.0, 1.5), (7.5, 1.0), (3.0, 2.5)])
def test_edits_are_theirs(
    family: str, scales: tuple[float, float], photo: Image.Image, noise: Tensor, tmp_path: Path
) -> None:
    """Latents of the mode, not scaled, and zeros where the picture is left out; both scales."""
    save(make(family), tmp_path / "ours")
    pipe = theirs_of(tmp_path / "ours")
    assert type(pipe).__name__ == f"StableDiffusion{'XL' * (family == 'instruct_xl')}InstructPix2PixPipeline"
    how: dict[str, Any] = {"num_inference_steps": 8, "output_type": "pt", "latents": noise, "image": photo}
    how |= {"height": 16, "width": 24} if family == "instruct_xl" else {}
    told = {"guidance_scale": scales[0], "image_guidance_scale": scales[1], "negative_prompt": NEGATIVE}
    expected = pipe(PROMPT, **how, **told).images * 2 - 1
    assert expected.std() > 0.01
    mine = {"guidance": scales[0], "image_guidance": scales[1]}
    found = ours(tmp_path / "ours", photo, noise, **mine)
    assert (found - expected).abs().max() < BOUND
    pipe.save_pretrained(tmp_path / "theirs")
    assert (ours(tmp_path / "theirs", photo, noise, **mine) - expected).abs().max() < BOUND
    assert (ours(tmp_path / "ours", photo.rotate(180), noise, **mine) - expected).abs().max() > BOUND  # it is seen


def test_the_python_call_and_what_it_refuses(photo: Image.Image, tmp_path: Path) -> None:
    """The picture's own size, two edits by their seeds, and no other network."""
    save(make("instruct"), tmp_path / "ours")
    pipe = TextToImage.load(tmp_path / "ours")
    settings = Settings(steps=3, guidance=5.0, seed=4)
    odd = photo.crop((0, 0, 21, 13))
    two = instruct(pipe, odd, PROMPT, settings=settings, count=2)
    assert [p.size for p in two] == [(21, 13)] * 2
    assert (np.asarray(two[0]) != np.asarray(two[1])).any()
    weaker = instruct(pipe, odd, PROMPT, settings=replace(settings, image_guidance=3.0))
    assert (np.asarray(two[0]) != np.asarray(weaker[0])).any()
    again = instruct(pipe, odd, PROMPT, settings=replace(settings, image_guidance=1.5))
    assert np.array_equal(np.asarray(two[0]), np.asarray(again[0]))
    with pytest.raises(ValueError, match="is told the picture before an edit here: use `ldm edit instruct`"):
        pipe("a cat", steps=1)
    save(make("sd1"), tmp_path / "plain")
    with pytest.raises(ValueError, match="editing by an instruction: needs a U-Net with 8 channels, got 4"):
        instruct(TextToImage.load(tmp_path / "plain"), photo, PROMPT, settings=settings)
    with pytest.raises(ValueError, match=r"image_guidance must be at least 0, got -1\.0"):
        Settings(image_guidance=-1.0)
    with pytest.raises(ValueError, match="image_guidance: goes with guide 'cfg' alone"):
        Settings(image_guidance=1.0, guide="projected")


def test_single_files_both_ways(tmp_path: Path) -> None:
    """In the authors' names, our config in the header."""
    parts = make("instruct")
    save(parts, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "one.safetensors", "single")
    convert(tmp_path / "one.safetensors", tmp_path / "back", "diffusers")
    back = TextToImage.load(tmp_path / "back").network.state_dict()
    assert all(torch.equal(back[k], v) for k, v in parts.network.state_dict().items())
