"""Configs of the large families, trained for a step: every key of theirs on small random models of the same form."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoint.convert import save_diffusers
from ldm.cli.__main__ import main
from ldm.config.load import encode, read
from tests import miniature
from tests.families import make, network_config
from tests.parity.test_diffusers_folder import make as make_unet
from tests.parity.test_diffusers_folder import save as save_unet

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2] / "configs"
RUNS = {
    "finetune/pixart_sigma_full": "pixart", "finetune/sd35_medium_full": "sd3", "finetune/flux_dev_full": "flux",
    "finetune/sdxl_full": "sdxl", "finetune/pixart_sigma_lora": "pixart", "finetune/sd35_medium_lora": "sd3",
    "finetune/flux_dev_lora": "flux", "finetune/sdxl_lora": "sdxl", "train/pixart_sigma": "pixart",
    "train/sd35_medium": "sd3", "train/flux": "flux_schnell",
}  # fmt: skip
QUICK = ("finetune/pixart_sigma_full", "train/sd35_medium")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and three captioned pictures."""
    folder = tmp_path_factory.mktemp("configs")
    miniature.data(folder / "data")
    miniature.crosses(folder / "pictures")
    return folder


def model(root: Path, kind: str) -> str:
    """A small random model of a family, made at its first use."""
    folder = root / kind
    if folder.exists():
        return str(folder)
    if kind == "sdxl":
        save_unet(make_unet(kind), folder)
    else:
        parts = make(kind, root / "tokenizers" / kind)
        own: dict[str, Any] = {"network": parts.network, "autoencoder": parts.autoencoder}
        save_diffusers(folder, text=parts.text, scheduler=parts.scheduler, **own)
    return str(folder)


def written(root: Path, name: str, kind: str) -> Path:
    """The config with a small model, network, data and batch in the place of its own, and otherwise as it is."""
    tree: dict[str, Any] = dict(read(ROOT / f"{name}.yaml"))
    task, train = tree["task"], tree["train"]
    tree["out"] = str(root / name.replace("/", "-"))
    task["cache"] = f"{tree['out']}-cache"
    if "network" in task:
        small = encode(network_config(kind))
        wanted = set(task["network"]) - set(small)
        assert not wanted, f"keys that the network has not: {wanted}"
        task |= {"vae": model(root, kind), "text": model(root, kind), "network": task["network"] | small}
        tree["data"] |= {"path": str(root / "data"), "size": 16}
    else:
        task |= {"base": model(root, kind), "images": str(root / "pictures")}
        tree["data"] |= {"path": f"{tree['out']}-shards", "size": 16}
        task["samples"] |= {"prompts": ["a tree"]}
        task["samples"]["settings"] |= {"steps": 1}
    train |= {
        "steps": 1,
        "batch": 2 * train.get("accumulate", 1),
        "threads": 1,
        "log": {"every": 1, "tensorboard": False},
    }
    train["engine"] |= {"precision": "fp32"}
    return miniature.write(tree, root / f"{name.replace('/', '-')}.yaml")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in RUNS])
def test_every_config_trains(name: str, root: Path) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(["train", str(written(root, name, RUNS[name]))])
    assert code == 0, said.getvalue()
    run = root / name.replace("/", "-")
    rows = [json.loads(line) for line in (run / "log" / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(rows[-1]["loss"])
    assert (run / "export" / ("pytorch_lora_weights.safetensors" if "lora" in name else "model_index.json")).is_file()
