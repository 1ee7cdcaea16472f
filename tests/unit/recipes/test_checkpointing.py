"""`task.gradient_checkpointing` by name: the same losses and gradients bit by bit, and less is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.adapters.lora import LoraConfig
from ldm.config.load import decode
from ldm.config.schema import load_run
from ldm.diffusion.process import Process
from ldm.models.presets import UNETS
from ldm.models.unet import UNet
from ldm.objectives.consistency import ConsistencyOptions
from ldm.recipes import plan_job
from ldm.recipes.distill import DistillTask, make_student
from ldm.recipes.finetune import FinetuneTask
from ldm.recipes.planned import Asked
from ldm.recipes.text_to_image import TextToImageTask
from tests import miniature

NAMES = ("none", "transformer", "block")
TASKS: dict[str, tuple[type, dict[str, Any]]] = {
    "text_to_image": (TextToImageTask, {"network": {"kind": "unet"}, "vae": "vae", "text": "clip"}),
    "finetune": (FinetuneTask, {}),
    "distill": (DistillTask, {"teacher": "emoji", "method": {"kind": "lcm"}}),
}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("value", [*NAMES, True, False])
def test_configs_take_names_and_truth(kind: str, value: bool | str) -> None:
    cls, needed = TASKS[kind]
    task = decode(cls, {"kind": kind, "gradient_checkpointing": value, **needed}, "task")
    assert task.gradient_checkpointing == value
    assert type(task.gradient_checkpointing) is type(value)
    with pytest.raises(ValueError, match=r"gradient_checkpointing.*'layer'"):
        decode(cls, {"kind": kind, "gradient_checkpointing": "layer", **needed}, "task")


def student(how: str | bool, lora: bool) -> torch.nn.Module:
    torch.manual_seed(3)
    teacher = UNet(replace(UNETS["tiny"], sample_size=8)).eval()
    for p in teacher.parameters():
        torch.nn.init.normal_(p, std=0.05)
    task = DistillTask(
        teacher="tiny",
        method=ConsistencyOptions(decay=0.0),
        guidance_embedding=None,
        lora=LoraConfig() if lora else None,
        gradient_checkpointing=how,  # type: ignore[arg-type]
    )
    made = make_student(task, teacher, Process()).trained
    for name, p in made.named_parameters():
        if p.requires_grad and "up" in name:  # a LoRA starts at zero, and so would half of its gradients
            torch.nn.init.normal_(p, std=0.05)
    return made


def bytes_kept(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The output, and the bytes that are kept for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return call(), sum(storages.values())


@pytest.mark.parametrize("lora", [False, True])
def test_students_keep_less_and_learn_the_same(lora: bool) -> None:
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(6, 4, 16, 16, generator=g), torch.randn(6, 7, 32, generator=g)
    sizes, grads, losses = {}, {}, {}
    for how in NAMES:
        net = student(how, lora)
        out, sizes[how] = bytes_kept(lambda net=net: net(x, torch.arange(6) * 100, {"text": text}))
        losses[how] = out.square().mean()
        losses[how].backward()
        grads[how] = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert sizes["block"] < 0.8 * sizes["transformer"] < 0.8 * sizes["none"], sizes
    for how in NAMES[1:]:
        assert torch.equal(losses[how], losses["none"])
        assert grads[how].keys() == grads["none"].keys()
        assert grads[how]
        assert all(torch.equal(grads[how][n], grads["none"][n]) for n in grads[how])


@pytest.mark.parametrize("how", NAMES)
def test_the_planner_counts_the_granularity(how: str, tmp_path: Path) -> None:
    """By the modules that it builds; without any, a plan that recomputes does so by block."""
    changes = {"gradient_checkpointing": how, "vae": "kl_f8", "text": "sd15", "cache": None}
    tree = miniature.text_to_image(tmp_path, **changes)
    tree["task"]["network"] = {**tree["task"]["network"], "cross_attention_dim": 768}  # the tower's
    path = miniature.write(tree, tmp_path / "run.yaml")
    run = load_run(path)
    job = plan_job(run.task, run.data, run.train, Asked(name=run.name, world=1, gpu=False))
    assert job.recompute == (how != "none")
    for recompute in (True, False):
        unet = job.build(recompute)
        assert isinstance(unet, UNet)
        assert unet.recompute == (recompute and how != "transformer")
        assert all(m.recompute == (recompute and how == "transformer") for m in unet.transformers())
