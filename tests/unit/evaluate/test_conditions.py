"""Figures of told pictures: a model that follows exactly, one that sees nothing, and what must stay as it was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.cli import evaluate
from ldm.cli.evaluate_conditions import condition
from ldm.data.edits import write_edits
from ldm.data.manifest import Manifest, resolve
from ldm.data.pairs import Canny, Grey
from ldm.evaluate import conditions
from ldm.models import concat
from ldm.models.unet.controlnet import ControlNet, ControlNetConfig
from ldm.pipeline import Settings, TextToImage

TWO = Settings(steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return TextToImage.load("emoji")


@pytest.fixture(scope="module")
def case() -> conditions.Case:
    return conditions.captioned("emoji", "heldout", 4, 64, 0)


class Painter:
    """Draws the condition that it is shown, and grey where it is shown none."""

    def __init__(self, shown: Tensor | None = None) -> None:
        self.shown = shown

    def controlled(self, controls: Any) -> Painter:
        return Painter(controls[0].picture)

    def sample(self, prompts: Any, **_: Any) -> Tensor:
        grey = torch.zeros(len(prompts), 3, 64, 64)
        return grey if self.shown is None else grey + self.shown * 2 - 1


def shown_network() -> Any:
    return SimpleNamespace(picture_channels=3, guesses=True, title="test")


def test_one_that_follows_is_told_from_one_that_does_not(case: conditions.Case) -> None:
    painter: Any = Painter()
    found = conditions.control(painter, shown_network(), Grey(), case, TWO)
    of = {name: own["condition PSNR"].min().item() for name, own in found.own.items()}
    assert of["right condition"] > 45, "grey of a grey picture is itself, but for rounding"
    assert of["real pictures"] == float("inf")
    assert found.own["another's condition"]["condition PSNR"].max() < 25
    assert torch.equal(found.rows["another's condition"], found.rows["right condition"].roll(1, 0))


def test_edges_of_real_pictures_agree_with_themselves(case: conditions.Case) -> None:
    painter: Any = Painter()
    found = conditions.control(painter, shown_network(), Canny(low=60, high=120), case, TWO)
    assert found.own["real pictures"]["edges F1"].tolist() == [1] * 4
    assert found.own["no condition"]["edges F1"].max() == 0, "grey has no edge, the pictures have"


def test_a_controlnet_at_its_start_adds_nothing(pipe: TextToImage, case: conditions.Case) -> None:
    control = ControlNet(ControlNetConfig.of(pipe.network.config, pipe.codec.factor, 3)).eval()
    found = conditions.control(pipe, control, Canny(), case, TWO)
    rows = found.rows
    assert torch.equal(rows["right condition"], rows["no condition"])
    assert torch.equal(rows["another's condition"], rows["no condition"])


def widened(pipe: TextToImage, kind: Any) -> TextToImage:
    return pipe.with_network(concat.widened(pipe.network, concat.wide_config(pipe.network.config, kind)))


def test_inpainting_leaves_what_is_not_masked(pipe: TextToImage, case: conditions.Case) -> None:
    found = conditions.inpaint(widened(pipe, "mask"), case, TWO, beside=pipe)
    hole = (found.shown == 0).all(1, keepdim=True)
    for name in ("told the mask", "autoencoder"):
        assert torch.equal(found.rows[name].where(~hole, 0), case.images.where(~hole, 0)), name
    outside = (found.rows["base, blended"] - case.images).where(~hole, 0).abs().max()
    assert outside <= 1e-6
    worst, best = (found.own[name]["hole PSNR"].mean() for name in ("left grey", "autoencoder"))
    assert best > worst + 5
    assert torch.isfinite(found.own["told the mask"]["hole PSNR"]).all()
    with pytest.raises(ValueError, match="told no mask"):
        conditions.inpaint(pipe, case, TWO)


def test_the_hole_alone_is_measured(case: conditions.Case) -> None:
    mask = torch.zeros(4, 1, 64, 64)
    mask[..., :8, :8] = 1
    off = case.images + 0.2 * mask
    off[..., 32:, :] += 1  # outside: does not count
    assert conditions._hole(off, case.images, mask).tolist() == pytest.approx([20.0] * 4, abs=1e-4)


def test_bicubic_and_the_autoencoder_beside_super_resolution(pipe: TextToImage, case: conditions.Case) -> None:
    found = conditions.upscale(widened(pipe, "small"), case, TWO)
    assert list(found.rows) == ["drawn", "bicubic", "autoencoder"]
    assert all(pictures.shape == case.images.shape for pictures in found.rows.values())


def test_the_command_tells_edits_and_writes_them(
    pipe: TextToImage, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_edits(Manifest.read(resolve("emoji")), tmp_path / "edits")
    case = conditions.edits(str(tmp_path / "edits"), "compositional", 3, 64, 0)
    assert case.originals is not None
    assert not torch.equal(case.originals, case.images)
    assert all(p.split()[0] in ("make", "change", "give", "turn") for p in case.prompts)
    monkeypatch.setattr("ldm.cli.evaluate_conditions.loaded", lambda *_: widened(pipe, "source"))
    told = tmp_path / "figures.json"
    argv = ["conditions", "--data", str(tmp_path / "edits"), "--count", "3", "--steps", "2", "--candidates", "8"]
    argv += ["--out", str(told), "--sheet", str(tmp_path / "sheet.png")]
    assert evaluate.main(argv) == 0
    said = capsys.readouterr().out
    result = json.loads(told.read_text())["result"]
    assert list(result) == ["edited", "untouched", "real edit"]
    assert "PSNR" not in result["real edit"]
    assert "from original" not in result["untouched"]
    assert result["real edit"]["from original"] == pytest.approx(result["untouched"]["distance"], rel=1e-3)
    assert "edited" in said
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ([], "is told no picture"),
        (["--control", "a", "--ip-adapter", "b"], "one at a time"),
        (["--condition", "canny"], "--condition: is of --control"),
        (["--level", "-1"], "--level must be at least 0"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        evaluate.main(["conditions", *argv])


def test_a_runs_own_condition(tmp_path: Path) -> None:
    own = {"data": {"pairs": {"condition": {"kind": "canny", "low": 60, "high": 120}}}}
    (tmp_path / "config.yaml").write_text(json.dumps(own))
    assert condition(str(tmp_path), None) == Canny(low=60, high=120)
    assert condition(str(tmp_path), "grey") == Grey()
    assert condition("some/published/folder", None) == Canny()
    (tmp_path / "config.yaml").write_text(json.dumps({"data": {"pairs": {"condition": {"kind": "stored"}}}}))
    with pytest.raises(ValueError, match="give --condition"):
        condition(str(tmp_path), None)
