"""An optimizer of weights that do not train is refused from the config alone, before a base is looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm.cli.__main__ import main
from tests import miniature

LORA = {"kind": "lora", "rank": 2}
WORDS = {"kind": "textual_inversion", "concepts": [{"token": "<a>", "images": "nothing"}]}
PIVOTAL = {"kind": "pivotal", "tokens": [{"token": "<a>"}]}
SUBJECT = {"kind": "dreambooth", "images": "nothing", "noun": "<a> dot"}
MUON = {"algorithm": "muon", "weight_decay": 0.0}
NOT_HIDDEN = "train.optim.algorithm: 'muon' is for a denoising network whose own weights train"
DECAY = "train.optim.weight_decay: 0.1 would pull new tokens to zero"
NOT_THERE = "/nothing' is not here"
PLUS = "train.optim.rates.lora_plus: 16.0, but no LoRA trains"


def config(tmp_path: Path, task: dict[str, Any], optim: dict[str, Any]) -> Path:
    """A run over a base and data that are not there, so that what looks for them says so instead."""
    tree = miniature.contrastive(tmp_path)
    own = {"samples": {"every": 0}} if task["kind"] == "controlnet" else {}
    tree["task"] = {"base": str(tmp_path / "nothing")} | own | task
    tree["train"]["optim"] |= optim
    if task["kind"] == "controlnet":
        tree["data"] |= {"pairs": {"condition": {"kind": "canny"}}}
    return miniature.write(tree, tmp_path / "run.yaml")


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize(
    ("task", "optim", "says"),
    [
        ({"kind": "finetune", "adapter": LORA}, MUON, NOT_HIDDEN),
        (WORDS, MUON, NOT_HIDDEN),
        ({"kind": "ip_adapter"}, MUON, NOT_HIDDEN),
        (WORDS, {"weight_decay": 0.1}, DECAY),
        (SUBJECT | {"adapter": PIVOTAL}, {"weight_decay": 0.1}, DECAY),
        ({"kind": "finetune", "adapter": {"kind": "full"}}, {"rates": {"lora_plus": 16.0}}, PLUS),
        ({"kind": "controlnet"}, {"rates": {"lora_plus": 16.0}}, PLUS),
        # what does train is not refused for its optimizer, but for the base that is not there
        ({"kind": "finetune", "adapter": {"kind": "full"}}, MUON, NOT_THERE),
        ({"kind": "finetune", "adapter": LORA}, {"rates": {"lora_plus": 16.0}}, NOT_THERE),
        ({"kind": "controlnet"}, MUON, NOT_THERE),
    ],
)
def test_what_does_not_train_has_no_such_optimizer(
    verb: str, task: dict[str, Any], optim: dict[str, Any], says: str, tmp_path: Path, capsys: Any
) -> None:
    path = config(tmp_path, task, optim)
    assert main([verb, str(path)]) == 2
    said = capsys.readouterr().err
    assert (says if verb == "plan" or says != NOT_THERE else "data.path") in said
    assert said.count("\n") == 1
