"""Distillation where weights are divided over ranks: the target's average, adapters and pairs at every ZeRO stage."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm import dist
from ldm.adapters.lora import LoraConfig
from ldm.diffusion.prediction import V
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Discrete
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives import Objective
from ldm.objectives.consistency import ConsistencyOptions
from ldm.objectives.inputs import LatentFeed
from ldm.objectives.matching import MatchingObjective, MatchingOptions
from ldm.objectives.progressive import ProgressiveOptions
from ldm.objectives.trajectory import TrajectoryOptions
from ldm.recipes.distill import Student, make_objective, make_student, memory
from ldm.recipes.distill_task import DistillTask, Method
from ldm.rng import Rng
from ldm.train import state
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from ldm.train.optim import Optim
from tests import ranks
from tests.distributed import tiny

OPTIM = Optim(lr=3e-3, eps=1e-6, weight_decay=0.0)
LORA = LoraConfig(rank=2, targets=("attention", "convolution", "time"))
METHODS: dict[str, tuple[Method, LoraConfig | None, int | None]] = {
    "lcm": (ConsistencyOptions(decay=0.7), None, 16),
    "lora": (ConsistencyOptions(w=(2.0, 2.0), decay=0.7), LORA, None),
    "tcd": (TrajectoryOptions(decay=0.7), None, None),
    "progressive": (ProgressiveOptions(steps=4), None, 16),
    "dmd": (MatchingOptions(steps=(2,), every=2), None, None),
    "gan": (MatchingOptions(steps=(2,), every=2, adversarial=0.1, head=0.3), None, None),
    "gan lora": (MatchingOptions(steps=(1, 2), every=2, adversarial=0.1, head=0.3, judge="patches"), LORA, None),
}
STEPS = 3


def build(name: str) -> tuple[Objective, Student, UNet]:
    """A random teacher, none of whose weights is zero, and a student of it."""
    method, lora, width = METHODS[name]
    torch.manual_seed(3)
    unet = UNet(tiny.UNET)
    for p in unet.parameters():
        nn.init.normal_(p, std=0.1) if p.ndim == 1 else nn.init.xavier_normal_(p)
    unet.requires_grad_(False)
    vae = Autoencoder(AutoencoderConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, sample_size=4))
    process = Process(schedule=Discrete(zero_terminal_snr=True), prediction=V())
    task = DistillTask(teacher="tiny", method=method, lora=lora, guidance_embedding=width)
    student = make_student(task, unet, process)
    feed = LatentFeed(LatentCodec.of(vae), tiny.encode_text, 0.0)
    return make_objective(task, student, unet, process, feed), student, unet


class Training:
    """The engine around a distillation, stepped as the trainer does."""

    def __init__(self, name: str, stage: int) -> None:
        self.objective, self.student, self.unet = build(name)
        config = EngineConfig(zero_stage=stage, precision="fp32", clip=0.0)
        micro = tiny.BATCH // dist.world_size()
        optimizer = OPTIM.build(self.objective.parameters())
        self.engine = Engine(self.objective, optimizer, config, micro_batch=micro, accumulate=1)
        self.objective.bind(self.engine.whole)
        self.objective.after_step(0)

    def step(self, step: int) -> float:
        """One optimizer step (from 0); the mean loss of the global batch."""
        self.engine.set_lr(OPTIM.lr)
        (batch,) = tiny.micro_batches(step, dist.rank(), dist.world_size(), 1)
        loss, _ = self.engine.forward(batch, Rng.of(tiny.SEED, batch["position"]))
        self.engine.backward_step(loss)
        self.objective.after_step(step + 1)
        return float(dist.mean(loss))

    def held(self) -> dict[str, Tensor]:
        """Masters, and the target's own weights."""
        return dict(self.engine.full(self.engine.masters)) | _target(self.objective)


def _target(objective: Objective) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in objective.state().get("tensors", {}).items()}


def story(name: str, stage: int, folder: str) -> dict[str, Any]:
    """Train, save, go on; then another engine resumes and goes on alike."""
    warnings.simplefilter("ignore")
    training = Training(name, stage)
    losses = [training.step(i) for i in range(STEPS)]
    out: dict[str, Any] = {"held": training.held()}
    extra = training.objective.state()
    path = state.save(Path(folder), STEPS, training.engine, None, extra, keep=0)
    losses += [training.step(i) for i in range(STEPS, STEPS + 2)]
    out |= {"losses": losses, "end": training.held()}
    again = Training(name, stage)
    step, extra = state.load(path, again.engine, None)
    again.objective.load_state(extra)
    again.objective.after_step(step)
    out |= {
        "loaded": again.held(),
        "again": [again.step(i) for i in range(STEPS, STEPS + 2)],
        "again end": again.held(),
    }
    return out


def plain(name: str) -> tuple[list[float], dict[str, Tensor]]:
    """One process, plain PyTorch, and the target's average by its recursion, written out."""
    objective, *_ = build(name)
    objective.after_step(0)
    adam = torch.optim.AdamW(objective.parameters(), lr=OPTIM.lr, eps=1e-6, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = tiny.rows(step, list(range(tiny.BATCH)))
        loss, _ = objective(batch, Rng.of(tiny.SEED, batch["position"]))
        adam.zero_grad()
        loss.backward()
        adam.step()
        objective.after_step(step + 1)
        losses.append(loss.item())
    weights = {n: p.detach().clone() for n, p in objective.named_parameters() if p.requires_grad}
    return losses, weights | _target(objective)


QUICK = {("lcm", 1), ("lora", 3), ("gan", 2), ("gan lora", 3)}


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        pytest.param(name, stage, marks=() if (name, stage) in QUICK else pytest.mark.slow)
        for name in METHODS
        for stage in (0, 1, 2, 3)
    ],
)
def test_two_ranks_train_as_plain_pytorch_and_resume_bit_by_bit(name: str, stage: int, tmp_path: Path) -> None:
    losses, weights = plain(name)
    found = ranks.run(story, 2, name, stage, str(tmp_path), timeout=300)
    assert found[0]["losses"][:STEPS] == pytest.approx(losses, rel=1e-4)
    assert tiny.worst(found[0]["held"], weights) < 1e-3
    for each in found:
        assert tiny.worst(each["held"], found[0]["held"]) == 0  # the target is the same on all ranks
        assert tiny.worst(each["loaded"], each["held"]) == 0
        assert each["again"] == each["losses"][STEPS:]
        assert tiny.worst(each["again end"], each["end"]) == 0


def test_a_lora_shares_the_teachers_weights_and_a_full_student_copies_them() -> None:
    whole = sum(p.numel() * 4 for p in UNet(tiny.UNET).parameters())
    _, student, unet = build("lora")
    corrections = sum(p.numel() * 4 for p in student.trained.parameters())
    assert memory(student, unet) == {"trained": corrections, "teacher": 0, "shared": whole, "target": corrections}
    objective, student, unet = build("tcd")
    assert memory(student, unet) == {"trained": whole, "teacher": whole, "shared": 0, "target": whole}
    assert {id(p) for p in objective.parameters()} == {id(p) for p in student.trained.parameters()}
    _, student, unet = build("gan lora")
    head = sum(p.numel() * 4 for n, p in student.trained.named_parameters() if n.startswith("head."))
    assert memory(student, unet) == {
        "trained": corrections + whole + head,
        "teacher": 0,
        "shared": whole,
        "target": 0,
    }


def test_a_new_student_answers_as_its_teacher_and_corrections_can_be_left_out() -> None:
    g = torch.Generator().manual_seed(0)
    x, t, text = torch.randn(2, 4, 4, 4, generator=g), torch.tensor([10, 900]), torch.randn(2, 3, 6, generator=g)
    for name in ("lcm", "lora", "dmd"):
        _, student, unet = build(name)
        own = student.own
        told = own.seen({"text": text}, torch.tensor([1.0, 7.0]))
        if student.lora is None:
            assert torch.equal(own.net(x, t, told), unet(x, t, {"text": text}))
        else:
            before = unet(x, t, {"text": text})
            for p in student.trained.parameters():
                nn.init.normal_(p, std=0.3)
            assert not torch.allclose(own.net(x, t, told), before)
            assert torch.equal(student.goal.net(x, t, told), before)  # the target's corrections are still none


def test_with_a_lora_the_teacher_and_the_critic_have_none_of_its_corrections() -> None:
    objective, student, unet = build("gan lora")
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 4, 4, generator=g), torch.tensor([10, 900])
    cond = {"text": torch.randn(2, 3, 6, generator=g)}
    plain = unet(x, t, cond)
    for name, p in student.trained.named_parameters():
        if name.startswith("student."):
            nn.init.normal_(p, std=0.3)
    assert isinstance(objective, MatchingObjective)
    assert student.critic is not None
    assert torch.equal(objective._teacher.estimator.net(x, t, cond), plain)
    assert torch.allclose(student.critic.net(x, t, cond), plain, atol=1e-6)  # its own copy, elsewhere in memory
    assert not torch.allclose(student.own.net(x, t, cond), plain)
