"""A model that is kept between commands draws what a fresh one draws, whatever was added to it in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.cli import kept
from ldm.cli.__main__ import main
from ldm.models.shipped import SHIPPED
from ldm.pipeline import TextToImage

LORA = SHIPPED["emoji_lcm"] / "pytorch_lora_weights.safetensors"
HOW = ["--model", "emoji", "--steps", "2", "--seed", "5"]


@pytest.fixture
def loads(monkeypatch):
    """Models that were loaded, while they are kept."""
    found = []
    load = TextToImage.load

    def counted(source, **how):
        found.append(str(source))
        return load(source, **how)

    monkeypatch.setattr(TextToImage, "load", staticmethod(counted))
    monkeypatch.setattr(kept, "_keeps", True)
    monkeypatch.setattr(kept, "_kept", {})
    return found


def drawn(folder: Path, *argv: str) -> np.ndarray:
    assert main([*argv, *HOW, "--out", str(folder)]) == 0
    (path,) = [p for p in folder.glob("*.png") if not p.name.startswith("grid")]
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_lora_is_gone_afterwards(loads, tmp_path):
    fresh = ldm.load("emoji")
    loads.clear()
    base = np.asarray(fresh("a red apple", steps=2, seed=5, guidance=3.0, sampler="dpmpp_2m")[0])
    fresh.load_lora(LORA, 0.5)
    tuned = np.asarray(fresh("a red apple", steps=2, seed=5, guidance=3.0, sampler="dpmpp_2m")[0])
    assert not np.array_equal(base, tuned)
    sample = ["sample", "a red apple"]
    assert np.array_equal(drawn(tmp_path / "1", *sample), base)
    assert np.array_equal(drawn(tmp_path / "2", *sample, "--lora", f"{LORA}:0.5"), tuned)
    assert np.array_equal(drawn(tmp_path / "3", *sample), base)
    assert loads == ["emoji"]


def test_edits_take_loras(loads, tmp_path):
    from ldm.editing import img2img
    from ldm.pipeline import Settings

    Image.new("RGB", (64, 64), "red").save(tmp_path / "p.png")
    fresh = ldm.load("emoji")
    fresh.load_lora(LORA, 0.5)
    settings = Settings(sampler="ddim", steps=2, seed=5, guidance=3.0)
    (expected,) = img2img(fresh, Image.open(tmp_path / "p.png"), "a red apple", strength=0.7, settings=settings)
    edit = ["edit", "img2img", str(tmp_path / "p.png"), "a red apple", "--lora", f"{LORA}:0.5"]
    assert np.array_equal(drawn(tmp_path / "out", *edit), np.asarray(expected))


def test_files_that_change_are_read_again(loads, tmp_path):
    import shutil

    shutil.copytree(SHIPPED["emoji"], tmp_path / "m")
    one = kept.load(tmp_path / "m")
    assert kept.load(tmp_path / "m") is one
    (tmp_path / "m" / "unet" / "config.json").touch()
    assert kept.load(tmp_path / "m") is not one
    assert len(kept._kept) == 1  # the old one is not kept beside
    kept.drop(next(iter(kept._kept.values()))[0])
    assert not kept._kept


def test_only_so_much_is_kept(loads, tmp_path, monkeypatch):
    kept.load("emoji")
    kept.load("emoji_128")
    assert [key[0] for key in kept._kept] == ["emoji", "emoji_128"]
    monkeypatch.setattr(kept, "SHARE", 0.0)
    kept.load("emoji_lcm")
    assert [key[0] for key in kept._kept] == ["emoji_lcm"]
