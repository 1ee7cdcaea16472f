"""Short runs of every task kind give the losses of before; runs, checkpoints and exports of before still load.

`python -m tests.golden` compares digit by digit; here the processor's own kernels round.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ldm.pipeline import Settings, TextToImage
from tests import ranks
from tests.golden import runs

torch.set_num_threads(1)
ROUNDING = 1e-3
DRAW = Settings(sampler="ddim", steps=2, guidance=2.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.project(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", runs.KINDS)
def test_losses_are_those_of_before(name: str, root: Path) -> None:
    found = {f"{name}, 1": runs.figures(root, name, 1)}
    assert runs.differences(found, ROUNDING) == []


@pytest.mark.parametrize("name", ["text_to_image, cached, checkpointing", "dmd", "dreambooth, dora"])
def test_losses_of_two_processes_are_those_of_before(name: str, root: Path) -> None:
    found = {f"{name}, 2": runs.figures(root, name, 2)}
    assert runs.differences(found, ROUNDING) == []


def test_the_comparison_sees_a_digit() -> None:
    kept: dict[str, Any] = runs.kept()["clip, 1"]
    assert runs.differences({"clip, 1": kept}) == []
    first = torch.nextafter(torch.tensor(kept["losses"][0]), torch.tensor(9.0)).item()
    other = kept | {"losses": [first, *kept["losses"][1:]]}
    assert len(runs.differences({"clip, 1": other})) == 1
    assert len(runs.differences({"clip, 1": kept | {"exported": 1.01 * kept["exported"]}}, ROUNDING)) == 1


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A copy of what was made before; its files name each other relative to this folder."""
    shutil.copytree(runs.MADE, tmp_path / "made")
    return tmp_path / "made"


def test_a_run_of_before_goes_on(made: Path) -> None:
    """Its own config and checkpoint of step 3 go on to step 5, as a run that is made today does."""
    found = []
    for name in ("before", "today"):
        shutil.copytree(made / "run-text_to_image", made / name)
        shutil.rmtree(made / name / "export")
        tree = yaml.safe_load((made / name / "config.yaml").read_text())
        (made / name / "config.yaml").unlink()
        if name == "today":
            shutil.rmtree(made / name / "checkpoints")
        tree["out"] = name
        tree["train"] |= {"steps": 5, "optim": tree["train"]["optim"] | {"decay": "constant"}}
        assert ranks.run(runs.run, 1, tree, str(made), timeout=600) == [0]
        found.append(load_file(made / name / "export" / "unet" / "diffusion_pytorch_model.safetensors"))
    steps = [json.loads(line).get("step") for line in (made / "before/log/metrics.jsonl").read_text().splitlines()]
    assert steps[0] == 4, "from its checkpoint"
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0.1, atol=5e-3)


def test_exports_of_before_draw(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    base = TextToImage.load("teacher").sample(["a red dot"], settings=DRAW)
    for name in ("run-text_to_image", "run-lcm-lora", "run-finetune-lora", "run-textual_inversion"):
        pipe = TextToImage.load(made / name / "export")
        prompt = "a <thing>" if name == "run-textual_inversion" else "a red dot"
        image = pipe.sample([prompt], settings=DRAW)
        assert image.shape == (1, 3, 16, 16)
        assert not torch.equal(image, base)
