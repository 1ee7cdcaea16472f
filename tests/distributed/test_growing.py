"""A run that grows a model in depth: its first loss is the start's own bit for bit, on one and two ranks alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.cli.__main__ import main
from ldm.config.load import dump
from ldm.config.schema import load_run
from ldm.pipeline import TextToImage
from ldm.recipes import assemble
from ldm.recipes.run import Start, run
from tests import miniature, ranks

DEEPER = "task.network.layers_per_block=3"


def rows(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]


def grows(path: str, out: str, stage: int) -> int:
    """Two steps of the grown network."""
    config = load_run(path, [f"out={out}", "task.grow=true", DEEPER, f"train.engine.zero_stage={stage}"])
    return run(
        lambda: assemble(config.task, config.data, config.train, config.seed, 0),
        config.train, config.out, seed=config.seed, resolved=dump(config), start=Start(),
    )  # fmt: skip


def test_a_run_grows_goes_on_and_is_the_same_on_two_ranks(tmp_path: Path, capsys: Any) -> None:
    root = miniature.project(tmp_path)
    config = miniature.text_to_image(root, samples={"prompts": [], "every": 0})
    config["train"] = miniature.train(steps=3, ema=None, optim={"lr": 1.0e-2})
    path = miniature.write(config, root / "config.yaml")
    assert main(["train", str(path), f"out={root / 'start'}"]) == 0
    config["task"]["start"] = str(root / "start")
    path = miniature.write(config, root / "next.yaml")
    assert main(["train", str(path), f"out={root / 'same'}", "seed=4", "train.steps=2"]) == 0
    grown = ["task.grow=true", DEEPER, "seed=4"]
    assert main(["train", str(path), f"out={root / 'grown'}", *grown, "train.steps=1"]) == 0
    assert main(["train", str(path), f"out={root / 'grown'}", *grown, "train.steps=2"]) == 0
    same, deeper = rows(root / "same"), rows(root / "grown")
    assert deeper[0] == same[0]
    assert deeper[1] != same[1]
    network = TextToImage.load(root / "grown").network
    assert network.config.layers_per_block in (3, (3, 3))
    weights = load_file(next((root / "grown" / "export" / "unet").glob("*.safetensors")))
    own = load_file(next((root / "start" / "export" / "unet").glob("*.safetensors")))
    new = {name for name in weights if ".resnets.2.conv2.weight" in name and name not in own}
    assert new
    assert all(weights[name].any() for name in new)  # zeros at the start
    capsys.readouterr()
    for wrong, why in (
        (["task.grow=true"], "nothing to grow; write false"),
        (["task.grow=true", DEEPER, "task.network.block_out_channels=[16,16]"], "only the number of layers"),
        (["task.grow=true", DEEPER, "task.start=null"], "grow: true needs `start`, a model, and `network`"),
        ([DEEPER], "another network than that of task.start"),
    ):
        assert main(["train", str(path), f"out={root / 'wrong'}", *wrong]) == 2
        assert why in capsys.readouterr().err
    assert main(["plan", str(path), *grown]) == 0
    planned = sum(value.numel() for value in weights.values()) / 1e6
    assert f"trained weights    {planned:.2g} M" in capsys.readouterr().out


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_grow_alike(tmp_path: Path, stage: int) -> None:
    root = miniature.project(tmp_path)
    config = miniature.text_to_image(root, samples={"prompts": [], "every": 0})
    config["train"] = miniature.train(steps=2, ema=None, optim={"lr": 1.0e-2})
    path = miniature.write(config, root / "config.yaml")
    assert main(["train", str(path), f"out={root / 'start'}"]) == 0
    config["task"]["start"] = str(root / "start")
    path = miniature.write(config, root / "next.yaml")
    for world in (1, 2):
        assert ranks.run(grows, world, str(path), str(root / str(world)), stage, timeout=300) == [0] * world
    torch.testing.assert_close(rows(root / "2"), rows(root / "1"), rtol=1e-5, atol=0)
