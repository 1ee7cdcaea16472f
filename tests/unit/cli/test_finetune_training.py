"""What the options of `ldm finetune` about optimizer, loss and masks put into the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm.cli import finetune
from ldm.config.schema import load_run
from ldm.diffusion.shape import SmoothL1
from ldm.objectives.masked import MaskOptions


def run_of(images: Path, *words: str, method: str = "lora") -> Any:
    more = ["--class", "dog"] if method == "dreambooth" else []
    args = finetune.parser().parse_args([method, "--images", str(images), *more, *words])
    return load_run(finetune.tree(args))


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--optimizer prodigy", "train.optim.lr", 1.0),
        ("--optimizer came --lr 1e-3", "train.optim.algorithm", "came"),
        ("--lr-scheduler rex --lr-warmup-steps 7", "train.optim.decay", "rex"),
        ("--lr-scheduler rex --lr-warmup-steps 7", "train.optim.warmup", 7),
        ("--loraplus-lr-ratio 16", "train.optim.rates.lora_plus", 16.0),
        ("--train-text-encoder --text-encoder-lr 1e-6", "train.optim.rates.text", 1e-6),
        ("--train-text-encoder --text-encoder-lr 1e-6 2e-6", "train.optim.rates.text", (1e-6, 2e-6)),
        ("--loss-type smooth_l1 --huber-schedule exponential --huber-c 0.2 --huber-scale 3", "task.options.loss",
         SmoothL1(schedule="exponential", c=0.2, scale=3.0)),
        ("--loss-type l1", "task.options.drop", 0.0),
        ("--multires-noise-iterations 6 --multires-noise-discount 0.2", "task.options.multires_discount", 0.2),
        ("--min-timestep 100 --max-timestep 900", "task.options.max_timestep", 900),
        ("--masked-loss alpha", "task.masks", "alpha"),
        ("--masked-loss masks/ --unmasked-weight 0.1 --normalize-masked-area", "task.options.mask",
         MaskOptions(outside=0.1, normalize=True)),
        ("--masked-loss alpha", "data.pairs.loss_weight.channels", 1),
    ],
)  # fmt: skip
def test_options(tmp_path: Path, words: str, key: str, value: Any) -> None:
    run = run_of(tmp_path, *words.split())
    for name in key.split("."):
        run = run[name] if isinstance(run, dict) else getattr(run, name)
    assert run == value


def test_without_them_the_config_is_as_before(tmp_path: Path) -> None:
    args = finetune.parser().parse_args(["lora", "--images", str(tmp_path)])
    tree = finetune.tree(args)
    assert set(tree["train"]["optim"]) == {"lr", "weight_decay"}
    assert "options" not in tree["task"]
    assert "masks" not in tree["task"]
    assert "pairs" not in tree["data"]


def test_class_pictures_have_masks_too(tmp_path: Path) -> None:
    run = run_of(tmp_path, "--masked-loss", "alpha", method="dreambooth")
    assert [list(s.data.pairs) for s in run.data.sources] == [["loss_weight"]] * 2


def test_other_methods_keep_their_options(tmp_path: Path) -> None:
    run = run_of(tmp_path, "--loss-type", "l1", method="ip-adapter")
    assert (run.task.options.drop, run.task.options.loss.kind) == (0.1, "l1")
    run = run_of(tmp_path, "--masked-loss", "alpha", method="inpaint")
    assert set(run.data.pairs) == {"inpaint_mask", "masked", "loss_weight"}
    assert run.task.options.concat.kind == "inpaint"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--huber-c 0.2", "--huber-c: is of --loss-type huber"),
        ("--unmasked-weight 0.5", "--unmasked-weight: is of --masked-loss"),
        ("--multires-noise-discount 0.5", "--multires-noise-discount: is of"),
        ("--text-encoder-lr 1e-5", "--text-encoder-lr: text encoders do not train"),
    ],
)
def test_options_of_others_that_are_not_asked_for(tmp_path: Path, words: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        run_of(tmp_path, *words.split())
