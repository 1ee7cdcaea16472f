"""`ldm finetune` with `train.engine.blocks_on_device`: the run of the whole network, bit by bit; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoint.convert import save_diffusers
from ldm.train.engine import check_streamed
from ldm.train.engine_config import EngineConfig
from tests import families, miniature
from tests.integration.test_transformer_training import quiet
from tests.parity import test_diffusers_folder as unets

torch.set_num_threads(1)
KINDS = ("sdxl", "flux")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming")
    miniature.crosses(folder / "subject")
    for kind in KINDS:
        parts = unets.make(kind) if kind == "sdxl" else families.make(kind, folder / "t5")
        own: dict[str, Any] = {"network": parts.network, "autoencoder": parts.autoencoder, "text": parts.text}
        save_diffusers(folder / kind, scheduler=parts.scheduler, **own)
    return folder


def tune(root: Path, kind: str, name: str, *options: str, method: str = "lora") -> tuple[int, str]:
    given = ["--images", root / "subject", "--base", root / kind, "--out", root / name, "--steps", 4, "--size", 16]
    sets = ("train.log.tensorboard=false", "train.threads=1", "task.samples.settings.steps=2", "train.log.every=1")
    words = [*map(str, given), *(w for s in sets for w in ("--set", s)), "--lr", "3e-2", "--precision", "fp32"]
    return quiet(["finetune", method, *words, *options])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same(kind: str, root: Path) -> None:
    """Losses, the export, and the pictures drawn while it trains; it resumes with another number of blocks."""
    options = ("--prompt", "a red cross", "--samples-every", "2")
    code, said = tune(root, kind, f"{kind}-whole", *options)
    assert code == 0, said
    few = ("--set", "train.engine.blocks_on_device=2")
    code, said = tune(root, kind, f"{kind}-few", *options, *few, "--set", "train.checkpoint.every=2")
    assert code == 0, said
    whole, streamed = root / f"{kind}-whole", root / f"{kind}-few"
    assert losses(streamed) == losses(whole)
    for file in sorted((whole / "export").glob("*.safetensors")):
        found = load_file(streamed / "export" / file.name)
        assert all(torch.equal(found[name], value) for name, value in load_file(file).items())
    drawn = sorted(path.relative_to(whole) for path in (whole / "samples").rglob("*.png"))
    assert drawn
    for path in drawn:
        assert (whole / path).read_bytes() == (streamed / path).read_bytes()


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_a_run_over_stored_weights_is_the_same(storage: str, root: Path) -> None:
    stored = ("--set", f"train.engine.frozen={storage}")
    for name, few in (("whole", ()), ("few", ("--set", "train.engine.blocks_on_device=2"))):
        code, said = tune(root, "flux", f"{storage}-{name}", *stored, *few)
        assert code == 0, said
    assert losses(root / f"{storage}-few") == losses(root / f"{storage}-whole")
    exports = [
        load_file(root / f"{storage}-{name}/export/pytorch_lora_weights.safetensors") for name in ("whole", "few")
    ]
    assert all(torch.equal(exports[1][name], value) for name, value in exports[0].items())


def test_textual_inversion_goes_through_the_frozen_network(root: Path) -> None:
    for name, few in (("tokens-whole", ()), ("tokens-few", ("--set", "train.engine.blocks_on_device=1"))):
        code, said = tune(root, "sdxl", name, "--token", "<x>", *few, method="textual-inversion")
        assert code == 0, said
    assert losses(root / "tokens-few") == losses(root / "tokens-whole")


def test_dreambooth_draws_its_class_with_it(root: Path) -> None:
    booth = ("--identifier", "sks", "--class", "cross", "--num-class-images", "2", "--lora")
    booth += ("--set", "task.prior.settings.steps=2")
    for name, few in (("booth-whole", ()), ("booth-few", ("--set", "train.engine.blocks_on_device=2"))):
        code, said = tune(root, "sdxl", name, *booth, *few, method="dreambooth")
        assert code == 0, said
    assert losses(root / "booth-few") == losses(root / "booth-whole")


def test_what_trains_is_refused_in_one_line(root: Path) -> None:
    full = ("--identifier", "sks", "--class", "cross", "--no-prior", "--set", "train.engine.blocks_on_device=2")
    code, said = tune(root, "flux", "full", *full, method="dreambooth")
    assert code != 0
    assert "train.engine.blocks_on_device: 2 needs a network that stays frozen (task.adapter lora)" in said
    assert "Traceback" not in said
    message = r"train.engine.blocks_on_device: is for networks that stay frozen .*; here Linear trains, whose"
    with pytest.raises(ValueError, match=message):
        check_streamed(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"blocks_on_device": 0}, "blocks_on_device must be at least 1, or null for all, got 0"),
        ({"blocks_on_device": 2, "zero_stage": 3}, "blocks_on_device: needs zero_stage 0, 1 or 2, got 3"),
        ({"blocks_on_device": 2, "compile": "inductor"}, "blocks_on_device: needs compile 'off' or 'blocks', got"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**keys)
    assert EngineConfig(blocks_on_device=2, compile="blocks", zero_stage=2).blocks_on_device == 2
