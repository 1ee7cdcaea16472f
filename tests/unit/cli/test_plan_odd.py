"""`ldm plan` of parts that do not fit, of models that are not here, of odd numbers, and of figures next to nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ldm.cli.__main__ import main
from ldm.config.load import encode
from ldm.models.presets import TEXTS, UNETS
from ldm.plan.report import digits, duration
from ldm.recipes import planned_models
from tests import miniature

XL = {k: v for k, v in encode(UNETS["sdxl"]).items() if v is not None}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.project(tmp_path_factory.mktemp("project"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a plan that is refused."""
    try:
        code = main(["plan", *arguments])
    except SystemExit as ended:  # by the parser
        code = ended.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ldm plan: ")
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (  # an SDXL network written by hand meets Stable Diffusion 2's tower
            {"network": XL, "text": "sd21", "vae": "kl_f8_sdxl"},
            "task.network.cross_attention_dim: 2048, but task.text 'sd21' has text states of width 1024; those of sdxl",
        ),
        (
            {"network": {**XL, "projection_class_embeddings_input_dim": 2560}, "text": "sdxl", "vae": "kl_f8"},
            "task.network.projection_class_embeddings_input_dim: 2560, but task.text 'sdxl' has a pooled vector of "
            "1280 and the six sizes take 1536: 2816 in all",
        ),
        (
            {"network": encode(UNETS["sd15_inpainting"]), "text": "sd15", "vae": "kl_f8"},
            "task.network.in_channels: 9, but task.vae 'kl_f8' has latents of 4 channels",
        ),
        (
            {"network": encode(UNETS["tiny"]), "text": "somewhere/that-is-not-here", "vae": "tiny"},
            "task.network.cross_attention_dim: 32, but task.text 'somewhere/that-is-not-here'",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named_with_their_values(
    root: Path, task: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = miniature.text_to_image(root)
    tree["task"] = {"kind": "text_to_image", **task}
    assert message in refused(capsys, str(miniature.write(tree, root / "unfit.yaml")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes must be at least 1, got 0"),
        (["--nodes", "-3"], "--nodes must be at least 1, got -3"),
        (["--nodes", str(10**15)], "--nodes must be at most 1,000,000,000,000"),
        (["--gpus-per-node", "0"], "--gpus-per-node must be at least 1, got 0"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--samples", "-5"], "--samples must be at least 1, got -5"),
        (["--price", "-1"], "--price must be at least 0, got -1"),
        (["--price", "nan"], "--price: expected a finite number, got 'nan'"),
        (["--inside", "0"], "--inside must be above 0, got 0"),
        (["--outside", "inf"], "--outside: expected a finite number, got 'inf'"),
        (["--gpu", "a100"], "did you mean 'a100-80g' or 'a100-40g'?"),
        (["--gpu", "h10"], "did you mean 'h100'?"),
        (["--gpu", ""], "gpu: '' is not one of"),
        (["--page", "."], "--page: '.' is a folder"),
        (["train.batch=0"], "batch must be at least 1"),
        (["data.size=20"], "data.size: 20 is not a multiple of the autoencoder's 8 pixels"),
        (["data.size=4"], "data.size: 4 is not a multiple of the autoencoder's 8 pixels"),
        (["task.vae=/dev/null/x"], ""),
        (["nothing"], "expected key=value"),
    ],
)
def test_odd_numbers_are_refused_in_one_line(
    root: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "config.yaml"
    if not path.is_file():
        tree = miniature.text_to_image(root)
        tree["task"]["vae"] = "kl_f8"
        miniature.write(tree, path)
    if message:
        assert message in refused(capsys, str(path), *arguments)
    else:
        main(["plan", str(path), *arguments])
        assert "Traceback" not in capsys.readouterr().err


def test_a_model_whose_config_cannot_be_read_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "broken" / "vae").mkdir(parents=True)
    for text, message in (("{", "not JSON"), ("[]", "expected keys and values"), ('{"a": 1}', "unknown")):
        (root / "broken" / "vae" / "config.json").write_text(text)
        tree = miniature.text_to_image(root, vae=str(root / "broken"))
        said = refused(capsys, str(miniature.write(tree, root / "unreadable.yaml")))
        assert message in said
        assert str(root / "broken" / "vae" / "config.json") in said


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("runwayml/stable-diffusion-v1-5", "sd15"),
        ("CompVis/stable-diffusion-v1-4", "sd15"),
        ("stabilityai/stable-diffusion-2", "sd21"),
        ("stabilityai/stable-diffusion-2-1", "sd21"),
        ("stabilityai/stable-diffusion-2-1-base", "sd21_base"),
        ("stabilityai/sd-turbo", "sd21_base"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
        ("stabilityai/sdxl-turbo", "sdxl"),
        ("models/sd2", "sd21"),
        ("models/sd15/", "sd15"),
        ("lcm_sd15", "lcm_sd15"),
        ("Tongyi-MAI/Z-Image-Turbo", "zimage"),
        ("z_image_turbo_bf16.safetensors", "zimage"),
        ("somebody/my-model", None),
    ],
)
def test_a_published_name_tells_its_family(name: str, family: str | None) -> None:
    assert planned_models.family_of(name) == family


def test_a_tower_that_is_not_here_is_that_which_the_network_takes() -> None:
    for family in ("sd15", "sd21", "sdxl"):
        said: list[str] = []
        found = planned_models.towers("of/mine", UNETS[family], said)
        assert tuple(t.config for t in found) == TEXTS[family]
        assert said == [f"task.text: 'of/mine' is not here; planned as that of {family}"]


SUBJECT = {"images": "no/pictures", "noun": "dog", "prior": None}
CONCEPT = {"concepts": [{"token": "<a>", "vectors": 3, "initializer": ["toy"], "images": "no/pictures"}]}


@pytest.mark.parametrize(
    ("kind", "own", "weights"),
    [
        # in each of the two blocks with attention: rank (in + out) of to_q, to_k, to_v, to_out
        ("finetune", {"adapter": {"kind": "lora", "rank": 2}}, None),
        ("dreambooth", SUBJECT, "unet"),
        ("textual_inversion", CONCEPT, 3 * 32),
    ],
)
def test_fine_tuning_of_a_family_that_is_not_here(
    root: Path, kind: str, own: dict[str, Any], weights: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its preset's name, whatever trains: corrections, all weights, or three rows of the tower's width."""
    from torch import nn

    from ldm.models.unet import UNet

    tree = miniature.contrastive(root)
    tree["task"] = {"kind": kind, "base": "tiny", "options": {"drop": 0.0}, **own}
    tree["train"]["optim"] = {"lr": 1e-3, "weight_decay": 0.0}
    tree["train"]["batch"] = 2
    path = miniature.write(tree, root / f"{kind}.yaml")
    assert main(["plan", str(path), "--gpus-per-node", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    unet = UNet(UNETS["tiny"])
    linear = [m for n, m in unet.named_modules() if ".attn" in n and isinstance(m, nn.Linear)]
    expected = {
        None: sum(2 * (m.in_features + m.out_features) for m in linear),
        "unet": sum(p.numel() for p in unet.parameters()),
    }.get(weights, weights)
    assert found["weights"] == expected
    assert found["point"]["images_per_second"] > 0
    assert not any("is not here" in w and "task.base" in w for w in found["warnings"]), "a preset's name is no guess"


def test_a_base_of_no_known_family_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = miniature.contrastive(root)
    tree["task"] = {"kind": "finetune", "base": "somebody/my-model"}
    said = refused(capsys, str(miniature.write(tree, root / "unknown.yaml")))
    assert "task.base: 'somebody/my-model' is not here, and its name tells no family; one of ['sd15'" in said
    tree["task"] = {"kind": "distill", "teacher": "somebody/my-model", "method": {"kind": "lcm"}}
    assert "task.teacher: 'somebody/my-model' is not here" in refused(
        capsys, str(miniature.write(tree, root / "unknown.yaml"))
    )


def test_a_figure_next_to_nothing_keeps_its_digits(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = [0, 1234.5, 0.25, 0.0123, 0.000021, -0.0004]
    assert [digits(v) for v in told] == ["0", "1,234.500", "0.250", "0.012", "2.1e-05", "-0.0004"]
    assert [digits(v, 1) for v in (0.04, 3, 2.25)] == ["0.04", "3.0", "2.2"]
    assert [duration(d) for d in (3, 0.5, 0.01, 0.0001, 0)] == [
        "3.0 days", "12.0 hours", "14.4 minutes", "8.6 seconds", "0 seconds",
    ]  # fmt: skip
    tree = miniature.text_to_image(root, cache=str(root / "cache"))
    assert main(["plan", str(miniature.write(tree, root / "small.yaml")), "--gpus-per-node", "1"]) == 0
    said = capsys.readouterr().out
    assert not re.search(r"(?<![\d.])0\.0+(?!\d)", said), "no figure of zeros alone"
    assert "0: none at the fullest moment" in said
    assert "0 GB a step and GPU (ZeRO-2): one GPU sends nothing" in said


def test_a_batch_without_end_is_planned_at_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The accumulation that fits is found among micro-batches, not by counting up to the batch."""
    tree = miniature.text_to_image(root, cache=str(root / "cache"))
    path = str(miniature.write(tree, root / "endless.yaml"))
    assert main(["plan", path, "--gpus-per-node", "1", "train.batch=1000000000000", "--json"]) == 0
    point = json.loads(capsys.readouterr().out)["point"]
    assert point["micro"] * point["accumulate"] == 10**12
    assert point["micro"] == 4096
    assert main(["plan", path, f"train.steps={10**400}"]) == 2
    assert "cannot be planned: a number is too large" in capsys.readouterr().err
