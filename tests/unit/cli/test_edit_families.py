"""What `ldm edit` takes where the user says nothing is what `ldm sample` takes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from ldm.checkpoint.convert import save_diffusers
from ldm.cli.edit import _of_family
from ldm.pipeline import Settings, TextToImage
from tests.families import make

UNSAID = argparse.Namespace(sampler=None, guidance=None)


@pytest.mark.parametrize(
    ("kind", "sampler", "guidance"), [("sd3", "euler", 7.0), ("sd3_clip", "dpmpp_2m", 3.0), ("pixart", "ddim", 4.5)]
)
def test_an_edit_is_drawn_as_a_sample_is(kind: str, sampler: str, guidance: float, tmp_path: Path) -> None:
    parts = make(kind, tmp_path / "t5")
    save_diffusers(
        tmp_path / "model", network=parts.network, autoencoder=parts.autoencoder, text=parts.text,
        scheduler=parts.scheduler,
    )  # fmt: skip
    pipe = TextToImage.load(tmp_path / "model")
    found = _of_family(UNSAID, pipe, Settings(sampler="ddim", guidance=3.0))
    assert (found.sampler, found.guidance) == (sampler, guidance)
    assert found.guidance == pipe.habit[2]
    said = _of_family(argparse.Namespace(sampler="heun", guidance=2.0), pipe, Settings(sampler="heun", guidance=2.0))
    assert (said.sampler, said.guidance) == ("heun", 2.0)
