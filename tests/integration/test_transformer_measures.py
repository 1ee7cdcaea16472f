"""`ldm evaluate` over the families, and text encoders of less memory in every verb; tiny and random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoint.convert import save_diffusers
from tests import miniature
from tests.families import make
from tests.integration.test_transformer_training import config, losses, quiet, tune

torch.set_num_threads(1)
KINDS = ("sd3", "flux", "pixart", "zimage")
FIRST = [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, captioned pictures, and a folder of each family with its published scheduler."""
    folder = tmp_path_factory.mktemp("measures")
    miniature.data(folder / "data")
    (folder / "subject").mkdir()
    for color in ("red", "green"):
        (folder / "subject" / f"{color}.png").write_bytes(miniature.picture(color, "cross"))
        (folder / "subject" / f"{color}.txt").write_text(f"a {color} cross")
    for kind in KINDS:
        parts = make(kind, folder / "t5" / kind)
        own = {"network": parts.network, "autoencoder": parts.autoencoder, "text": parts.text}
        save_diffusers(folder / kind, scheduler=parts.scheduler, **own)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("measure", ["retrieval", "prompts", "features", "samplers", "nll", "inversion"])
def test_every_measure_of_every_family(measure: str, kind: str, root: Path) -> None:
    """At a size that the family's settings need not tell; figures are finite and say how they came about."""
    out = root / f"{measure}-{kind}"
    data = ["--data", str(root / "data"), "--model", str(root / kind), "--size", "16", "--batch", "2"]
    split = {"nll": "heldout", "inversion": "heldout"}.get(measure, "train")
    words = [*data, "--steps", "2", "--count", "4", "--out", str(out if measure == "samplers" else f"{out}.json")]
    if measure == "samplers":
        more = ["--samplers", "euler,dpmpp_2m", "--splits", split, "--guidance", "2", "--candidates", "4"]
    else:
        more = ["--split", split] + (["--candidates", "4"] if measure == "retrieval" else [])
    code, said = quiet(["evaluate", measure, *words, *more])
    assert code == 0, said
    text = (out / "results.json" if measure == "samplers" else Path(f"{out}.json")).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    made = json.loads(text)
    if measure == "samplers":
        assert {row["protocol"]["sampler"] for row in made} >= {"euler", "dpmpp_2m"}
        assert {row["protocol"]["size"] for row in made} == {16}
    elif measure not in ("nll",):
        assert made["protocol"]["size"] == 16
    if measure == "retrieval":  # the family's own way to draw
        assert made["protocol"]["sampler"] == ("dpmpp_2m" if kind == "pixart" else "euler")


def test_sizes_that_a_model_cannot_draw_are_one_line(root: Path) -> None:
    words = ["evaluate", "nll", "--model", str(root / "sd3"), "--data", str(root / "data"), "--size", "18"]
    code, said = quiet(words)
    assert code == 2
    assert "18" in said
    assert "Traceback" not in said


def text_parts(folder: Path) -> dict[str, Any]:
    return {
        f"{path.parent.name}/{k}": v
        for path in folder.glob("text_encoder*/*.safetensors")
        for k, v in load_file(path).items()
    }


@pytest.mark.parametrize("precision", ["int8", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "pixart" else pytest.mark.slow) for kind in KINDS]
)
def test_text_encoders_of_less_memory_in_every_verb(kind: str, precision: str, root: Path) -> None:
    """They draw, encode, tune and train; what is exported is the base's own."""
    chosen = ["--text-precision", precision]
    out = root / f"text-{precision}-{kind}"
    words = ["--model", str(root / kind), "--out", str(out / "drawn"), "--size", "16", "--steps", "2"]
    code, said = quiet(["sample", "a red cross", *words, *chosen])
    assert code == 0, said
    parts = ["--vae", str(root / kind), "--text", str(root / kind), "--size", "16"]
    code, said = quiet(["data", "encode", str(root / "data"), str(out / "cache"), *parts, *chosen])
    assert code == 0, said
    assert "bytes each" in said
    run = tune(root, kind, out.name, "lora", *chosen)
    assert f"text_precision: {precision}" in (run / "config.yaml").read_text()
    if kind == "zimage":
        return
    path = config(root, kind, f"train-{out.name}", text_precision=precision, cache=None, samples={"prompts": []})
    cached = [f"data.path={out / 'cache'}", "data.cached=true", "train.steps=1"]
    code, said = quiet(["train", str(path), *cached])
    assert code == 0, said
    ours, wanted = (text_parts(f) for f in (root / f"train-{out.name}" / "export", root / kind))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[k], v) for k, v in wanted.items())
    code, said = quiet(["train", str(path), *cached, "task.text_precision=fp32", f"out={out / 'other'}"])
    assert code == 2
    assert "cache was made with text" in said
    code, said = quiet(["plan", str(path), "--gpu", "a100-80g"])
    assert code == 0, said


def test_what_a_text_precision_cannot_be_is_one_line(root: Path) -> None:
    common = ["--images", str(root / "subject"), "--base", str(root / "sd3"), "--out", str(root / "refused")]
    for words, expected in (
        (["sample", "a cross", "--model", "emoji", "--text-precision", "int8"], "text encoders are CLIP's"),
        (["sample", "a cross", "--text-precision", "half"], "invalid choice: 'half'"),
        (["finetune", "lora", *common, "task.text_precision=half"], "task.text_precision"),
        (["finetune", "lora", *common, "--text-precision", "bf16", "--train-text-encoder"], "take part in training"),
        (["data", "encode", "emoji", str(root / "no"), "--text", "emoji", "--size", "16", "--t5-padding", "zero"],
         "--t5-padding: 'zero', but this model has no T5"),
        (["finetune", "lora", *common, "task.t5_padding=none"], "task.t5_padding"),
    ):  # fmt: skip
        try:
            code, said = quiet(words)
        except SystemExit as error:  # argparse
            code, said = int(error.code or 0), expected
        assert code == 2, words
        assert expected in said
        assert "Traceback" not in said


@pytest.mark.parametrize("kind", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_zero_padding_trains_alike_from_a_cache_that_costs_what_texts_are_long(kind: str, root: Path) -> None:
    found, sizes = {}, {}
    for padding in ("zero", "unmodified"):
        for options in (("--no-cache",), ()):
            name = f"padded-{padding}-{'online' if options else 'cached'}"
            run = tune(root, kind, name, "lora", *options, f"task.t5_padding={padding}", steps=1)
            found[padding, bool(options)] = losses(run)
        told = json.loads((run / "cache" / "manifest.json").read_text())["notes"]
        sizes[padding] = told["text_bytes_per_caption"]
    for padding in ("zero", "unmodified"):
        assert found[padding, True] == pytest.approx(found[padding, False], rel=1e-4)
    assert found["zero", True] != pytest.approx(found["unmodified", True], rel=1e-3)
    full = 4 * 40 * {"sd3": 256, "flux": 512}[kind]  # in float32
    assert sizes["unmodified"] > full
    assert sizes["zero"] < sizes["unmodified"] - 0.8 * full
