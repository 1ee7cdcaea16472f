"""The page shows partners beside pictures; the commands take pairs as configs tell them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.cli.__main__ import main
from ldm.data.decode import to_rgb
from ldm.data.manifest import Manifest
from tests.unit.data.paired import hole, write_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Red pictures with a blue condition; the third lacks it."""
    red, blue = (np.full((128, 128, 3), c, np.uint8) for c in ((255, 0, 0), (0, 0, 255)))
    samples = [{"png": red, "condition.png": blue, "mask.png": hole(128, 128)} for _ in range(4)]
    del samples[2]["condition.png"]
    return write_set(tmp_path / "set", samples)


def sheet(out: Path) -> np.ndarray:
    return np.asarray(to_rgb(Image.open(out / "contact.png"))).astype(int)


def share(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    """How many thumbnails' worth of a colour there is."""
    return round(float((np.abs(picture - color).max(2) < 3).sum()) / 128**2)


def test_stored_partners_stand_beside_their_pictures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "inspect", str(folder), "--out", str(tmp_path / "page")]) == 0
    assert "partners: {'condition': 3, 'mask': 4}" in capsys.readouterr().out
    statistics = json.loads((tmp_path / "page" / "statistics.json").read_text())
    assert statistics["partners"] == {"condition": 3, "mask": 4}
    assert share(sheet(tmp_path / "page"), (255, 0, 0)) == 4
    assert share(sheet(tmp_path / "page"), (0, 0, 255)) == 3


def test_pairs_are_shown_as_training_sees_them_and_bad_ones_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = "{condition: {kind: stored}, inpaint_mask: {kind: stored_mask}, masked: {kind: masked}}"
    assert main(["data", "inspect", str(folder), "--pairs", pairs, "--out", str(tmp_path / "page")]) == 0
    assert "bad: {'no_partner': 1}" in capsys.readouterr().out
    assert share(sheet(tmp_path / "page"), (0, 0, 255)) == 3
    config = tmp_path / "run.yaml"
    config.write_text("data: {pairs: {condition: {kind: canny}}}")
    assert main(["data", "inspect", str(folder), "--pairs", str(config), "--out", str(tmp_path / "other")]) == 0
    assert "bad: {}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        ("canny", "--pairs canny: expected names with what they are, as in '{condition: {kind: canny}}'"),
        ("{condition: {kind: cany}}", "--pairs.condition.kind: 'cany' is not one of"),
        ("{source: {kind: stored}}", "pairs: 'source' is something else in a batch; call it original"),
        ("no.yaml", "config 'no.yaml': no such file"),
    ],
)
def test_pairs_that_cannot_be_are_one_line(
    folder: Path, pairs: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "inspect", str(folder), "--pairs", pairs]) != 0
    said = capsys.readouterr().err
    assert line in said
    assert len(said.strip().splitlines()) == 1


def test_encode_from_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the shipped autoencoder: edges as bytes, the masked picture as latents."""
    pairs = "{condition: {kind: canny}, inpaint_mask: {kind: stored_mask}, masked: {kind: masked}}"
    out = tmp_path / "cache"
    told = ["data", "encode", str(folder), str(out), "--size", "64", "--pairs", pairs]
    assert main([*told, "--vae", "emoji"]) == 0
    manifest = Manifest.read(out)
    assert manifest.cached is not None
    assert list(manifest.cached["pairs"]) == ["condition", "inpaint_mask", "masked"]
    assert set(manifest.notes["relative_rms_error"]) == {"moments", "pair.masked.moments"}
    capsys.readouterr()
    assert main([*told, "--text", "emoji"]) != 0
    assert "--pairs: they are cached beside latents; give --vae" in capsys.readouterr().err
