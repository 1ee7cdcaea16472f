"""Figures of few pictures, of few candidates, of a judge that knows the text: all say so; odd counts are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.folders import write_module
from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.cli import evaluate
from ldm.cli.__main__ import main
from ldm.config.load import encode
from ldm.diffusion import Discrete, Epsilon
from ldm.evaluate import measure
from ldm.metrics import features, worth
from ldm.models.presets import AUTOENCODERS, CLIPS, TEXTS, UNETS
from ldm.models.text import TextTower, build_clip
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder

FEW, KNOWS = "few pictures", "text tower is one of those that condition the model"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, a model drawn under its text tower, and one under another's."""
    torch.manual_seed(1)
    root, config = tmp_path_factory.mktemp("models"), CLIPS["tiny"]
    clip: Any = build_clip(config)
    write_module(root / "clip" / "export" / "clip", clip.state_dict(), {"_class_name": "CLIP", **encode(config)})
    for name, tower in (("own", TextTower.of_clip(clip, config.text)), ("other", TextTower(TEXTS["tiny"][0]))):
        parts = {"network": UNet(UNETS["tiny"]), "autoencoder": Autoencoder(AUTOENCODERS["tiny"]), "text": [tower]}
        save_diffusers(root / name, **parts, scheduler=scheduler_to_diffusers(Discrete(), Epsilon()))  # type: ignore[arg-type]
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that cost nothing."""
    network = features.Encoder("pixels@2", lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))
    monkeypatch.setattr(features, "load_network", lambda name, weights=None: network)


def run(out: Path, *argv: Any) -> dict[str, Any]:
    assert evaluate.main([str(a) for a in (*argv, "--out", out)]) == 0
    return json.loads(out.read_text())


def test_what_is_said_depends_on_the_numbers() -> None:
    assert worth.distance(5000, 5000, 1000) == []
    assert [FEW in s for s in worth.distance(1000, 5000, 400)] == [True], "the Fréchet distance's bias alone"
    assert "all of the 1000" in worth.distance(1000, 5000, 1000)[-1]
    assert "most of the 1500" in worth.distance(1500, 5000, 1000)[-1]
    assert len(worth.distance(10, 5000, 10)) == 3
    assert worth.kernel(10, 5000, 5) == worth.distance(10, 5000, 5)[1:]
    assert worth.rates(100) == worth.judged(False) == worth.candidates(64, 64) == worth.discrepancy(4096, 2048) == []
    assert "which is of 99" in worth.rates(99)[0]


def test_distances_of_few_pictures_carry_their_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (32, 32), (i * 20, 9, 200 - 9 * i)).save(folder / f"{i:02d}.png")
    (folder / "._00.png").write_bytes(b"\0\5\26\7Mac OS X")
    argv = ("features", "--pictures", folder, "--split", "heldout", "--count", 12)
    found = run(tmp_path / "a.json", *argv)["result"]
    assert found["generated"] == 12, "a hidden file is no picture"
    assert found["warnings"] == worth.distance(12, 12, 12)
    said = capsys.readouterr().out
    assert all(f"warning: {w}\n" in said for w in found["warnings"])


def test_too_few_and_unreadable_pictures_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*argv: Any) -> str:
        assert main(["evaluate", "features", "--split", "heldout", *map(str, argv)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    one, none, below = (tmp_path / name for name in ("one", "none", "below"))
    for folder in (one, none, below / "inner"):
        folder.mkdir(parents=True)
    for folder in (one, below / "inner"):
        Image.new("RGB", (32, 32)).save(folder / "a.png")
    assert "1 picture in" in refused("--pictures", one)
    assert "no pictures found" in refused("--pictures", none)
    assert "1 picture in" in refused("--pictures", below)
    assert "--count must be at least 2, got 1" in refused("--pictures", one, "--count", 1)
    (one / "zz.png").write_bytes(b"not a png")
    assert "zz.png" in refused("--pictures", one)


def test_fewer_captions_than_candidates_lower_them(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = measure.caption_pool("emoji", "heldout")
    argv = ("retrieval", "--clip", root / "clip", "--split", "heldout", "--real", "--count", 5, "--candidates", 9999)
    found = run(tmp_path / "a.json", *argv)["result"]
    assert found["candidates"] == len(pool)
    assert found["R@1"]["chance"] == 1 / len(pool)
    assert found["warnings"] == [*worth.candidates(9999, len(pool)), *worth.rates(5)]
    said = capsys.readouterr().out
    assert f"candidates: 9999 were asked for, but there are {len(pool)} distinct captions" in said
    assert f"own caption among {len(pool)}" in said
    with pytest.raises(ValueError, match="at least 2 distinct captions to choose from, there are 1"):
        measure.candidates(64, ["one"])


def test_a_judge_that_knows_the_models_text_says_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("retrieval", "--clip", root / "clip", "--split", "heldout", "--count", 2, "--steps", 1, "--candidates", 4)
    for name, knows in (("own", True), ("other", False)):
        found = run(tmp_path / f"{name}.json", *argv, "--model", root / name)
        assert found["protocol"]["judge_knows_text"] is knows
        assert any(KNOWS in w for w in found["result"]["warnings"]) is knows
        assert (KNOWS in capsys.readouterr().out) is knows
    argv = ("prompts", "--clip", root / "clip", "--split", "heldout", "--count", 2, "--each", 1, "--steps", 1)
    found = run(tmp_path / "prompts.json", *argv, "--model", root / "own", "--table", tmp_path / "t.csv")
    assert found["result"]["warnings"] == worth.discrepancy(2, 2) + worth.judged(True)
    assert (tmp_path / "t.csv").read_text().splitlines()[0].endswith(",pictures")


def test_the_table_carries_what_its_rows_are_worth(root: Path, tmp_path: Path) -> None:
    argv = ["samplers", "--clip", root / "clip", "--count", 4, "--reference", 20, "--candidates", 9999]
    argv += ["--model", root / "own", "--splits", "heldout", "--samplers", "ddim", "--steps", 1, "--out", tmp_path]
    assert evaluate.main([str(a) for a in argv]) == 0
    rows, table = json.loads((tmp_path / "results.json").read_text()), (tmp_path / "table.md").read_text()
    drawn = [row for row in rows if row["protocol"]["sampler"] == "ddim"]
    assert len(rows) == 3
    assert [KNOWS in " ".join(row["result"]["warnings"]) for row in rows] == [False, False, True]
    for said in drawn[0]["result"]["warnings"]:
        assert said in table
    assert "- warning (3 of 3 rows): few pictures" in table
    assert f"- warning (1 of 3 rows): {worth.judged(True)[0]}" in table


@pytest.mark.parametrize("measured", ["retrieval", "reconstruction", "features", "prompts", "nll", "inversion"])
@pytest.mark.parametrize("option", ["--count", "--steps", "--batch", "--candidates", "--size", "--each", "--refine"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_counts_below_their_least_are_refused_by_name(
    measured: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if (option, value) == ("--refine", "0"):
        return
    try:
        code = main(["evaluate", measured, option, value])
    except SystemExit:
        assert f"there is no option {option}" in capsys.readouterr().err, "not an option of this measure"
        return
    assert code == 2
    assert f"{option} must be {'a whole number of ' * (option == '--steps')}at least" in capsys.readouterr().err
