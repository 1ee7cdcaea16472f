"""`task.start` of a distillation: the student begins as the LoRA that is named, and mistakes name the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.lora import LoraConfig
from ldm.checkpoint.lora_files import NAME, write_lora
from ldm.diffusion.process import Process
from ldm.models.presets import UNETS
from ldm.models.unet import UNet
from ldm.objectives.consistency import ConsistencyOptions
from ldm.objectives.matching import MatchingOptions
from ldm.recipes.distill import DistillTask, Student, make_student

RANKED: dict[str, Any] = {"rank": 3, "targets": ("attention", "convolution")}


def base() -> UNet:
    torch.manual_seed(3)
    unet = UNet(UNETS["tiny"]).eval()
    for p in unet.parameters():
        nn.init.normal_(p, std=0.05)
    return unet


def made(start: str | None, method: Any = None, **lora: Any) -> Student:
    task = DistillTask(
        teacher="emoji",
        method=method or ConsistencyOptions(decay=0.5),
        guidance_embedding=None,
        lora=LoraConfig(**RANKED | lora),
        start=start,
    )
    return make_student(task, base(), Process())


def answer(student: Student) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, 32, generator=g)
    with torch.no_grad():
        return student.own.net(x, torch.tensor([20, 900]), {"text": text})


@pytest.fixture
def before(tmp_path: Path) -> tuple[Path, Student]:
    """A run whose export holds corrections that are none of nothing."""
    student = made(None, alpha=6.0)
    for p in student.trained.parameters():
        nn.init.normal_(p, std=0.2)
    assert student.lora is not None
    lora = student.lora.lora(dict(student.trained.named_parameters()))
    write_lora(tmp_path / "run" / "export" / NAME, lora, student.network.config)
    return tmp_path / "run", student


@pytest.mark.parametrize("method", [ConsistencyOptions(decay=0.5), MatchingOptions()])
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_a_student_answers_as_the_lora_that_it_starts_from_whatever_its_own_alpha(
    before: tuple[Path, Student], method: Any, alpha: float | None
) -> None:
    """Against weights merged in float64."""
    run, old = before
    assert old.lora is not None
    merged = base()
    for name, low in old.lora.lora(dict(old.trained.named_parameters())).items():
        weight = merged.get_parameter(name.removeprefix("unet.") + ".weight")
        weight.data += low.delta(weight.data).to(weight)
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, 32, generator=g)
    with torch.no_grad():
        expected = merged(x, torch.tensor([20, 900]), {"text": text})
    for folder in (run, run / "export"):
        student = made(str(folder), method, alpha=alpha)
        assert torch.allclose(answer(student), expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(answer(made(None, method)), expected, atol=1e-2 * float(expected.abs().max()))
    if student.target is not None:  # it starts there too
        own = dict(student.trained.named_parameters())
        assert all(torch.equal(v, own[k.removeprefix("target.")]) for k, v in student.target.tensors().items())


def test_what_does_not_fit_is_told_with_the_key(before: tuple[Path, Student]) -> None:
    run, _ = before
    for changes, told in (
        ({"rank": 2}, "rank 3 of .* is not the configured rank 2"),
        ({"targets": ("attention",)}, "targets choose"),
        ({"dora": True}, "DoRA"),
    ):
        with pytest.raises(ValueError, match=f"^start '.*': .*{told}"):
            made(str(run), **changes)
    with pytest.raises(ValueError, match=r"^start 'nowhere': model 'nowhere': not a shipped model"):
        made("nowhere")
    with pytest.raises(ValueError, match=r"^start 'emoji': LoRA .*no such"):
        made("emoji")
    (run / "export" / "adapter.json").write_text(json.dumps({"base": "elsewhere", "loras": [NAME], "embeddings": []}))
    with pytest.raises(ValueError, match=r"^start .*: a LoRA of 'elsewhere', while the teacher is 'emoji'"):
        made(str(run))
    with pytest.raises(ValueError, match="start: 'emoji_lcm' is a LoRA to go on with, and needs lora"):
        DistillTask(teacher="emoji", method=MatchingOptions(), start="emoji_lcm")
