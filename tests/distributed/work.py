"""What the ranks do in the tests beside this file; each function runs on every rank of `tests.ranks.run`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import dist
from ldm.models.network import hidden
from ldm.rng import Rng
from ldm.train import state
from ldm.train.ema import Ema
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from ldm.train.optim import Optim
from tests.distributed import tiny

HALF = 3
"""Steps before the checkpoint."""


class Training:
    """An engine with EMA and the tiny objective; steps as the trainer does."""

    def __init__(
        self,
        stage: int,
        accumulate: int = 1,
        clip: float = tiny.CLIP,
        seed: int = 1,
        precision: Any = "fp32",
        optim: Optim = tiny.OPTIM,
    ) -> None:
        self.objective, self.accumulate, self.optim = tiny.build(seed), accumulate, optim
        config = EngineConfig(zero_stage=stage, precision=precision, clip=clip)
        micro = tiny.BATCH // (dist.world_size() * accumulate)
        optimizer = optim.build(self.objective.parameters(), hidden(self.objective.trained))
        self.engine = Engine(self.objective, optimizer, config, micro_batch=micro, accumulate=accumulate)
        self.ema = Ema(tiny.EMA, self.engine.masters)
        self.norms: list[float] = []

    def step(self, step: int) -> float:
        """One optimizer step (from 0); the mean loss of the global batch."""
        self.engine.set_lr(self.optim.lr_at(step, tiny.STEPS))
        total = 0.0
        batches = tiny.micro_batches(step, dist.rank(), dist.world_size(), self.accumulate)
        for i, batch in enumerate(batches):
            loss, _ = self.engine.forward(batch, Rng.of(tiny.SEED, batch["position"]))
            updated = self.engine.backward_step(loss)
            assert updated == (i + 1 == self.accumulate)
            total += float(dist.mean(loss)) / self.accumulate
        self.ema.update(self.engine.masters, step + 1)
        self.norms.append(self.engine.grad_norm)
        return total

    def bad_step(self, step: int) -> bool:
        """A step whose loss is NaN in the last rank's first micro-batch alone; whether weights were updated."""
        self.engine.set_lr(self.optim.lr_at(step, tiny.STEPS))
        updated = True
        for i, batch in enumerate(tiny.micro_batches(step, dist.rank(), dist.world_size(), self.accumulate)):
            if i == 0 and dist.rank() == dist.world_size() - 1:
                batch["weight"] = batch["weight"] * float("nan")
            loss, _ = self.engine.forward(batch, Rng.of(tiny.SEED, batch["position"]))
            updated = self.engine.backward_step(loss)
        return updated

    def loss(self, step: int) -> float:
        """The loss of a step's batch without training."""
        with torch.no_grad():
            batch = tiny.micro_batches(step, dist.rank(), dist.world_size(), 1)[0]
            loss, _ = self.engine.forward(batch, Rng.of(tiny.SEED, batch["position"]))
        return float(dist.mean(loss))

    def full(self, shards: list[Tensor] | None = None) -> dict[str, Tensor]:
        """By the engine."""
        return dict(self.engine.full(self.engine.masters if shards is None else shards))

    def read(self) -> dict[str, Tensor]:
        """Masters as DeepSpeed's own debugging interface gives them; the parameters at stage 0."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, p in self.objective.named_parameters():
            value = p if self.engine.config.zero_stage == 0 else safe_get_full_fp32_param(p)
            assert value is not None
            found[name] = value.detach().float().cpu().clone()
        return found

    def moment(self, kind: str) -> dict[str, Tensor]:
        """Adam's moments, whole; their oracle is plain PyTorch."""
        return self.full([self.engine.inner.state[m][kind] for m in self.engine.masters])


def train(stage: int, steps: int, accumulate: int = 1, clip: float = tiny.CLIP) -> dict[str, Any]:
    """Losses, norms and weights of a short training."""
    training = Training(stage, accumulate, clip)
    losses = [training.step(i) for i in range(steps)]
    return {"losses": losses, "norms": training.norms, "weights": training.read(), "first": training.moment("exp_avg")}


def train_in_bf16(stage: int, steps: int) -> dict[str, Any]:
    """Losses, and the dtypes of masters, moments, averages and weights."""
    training = Training(stage, precision="bf16")
    losses = [training.step(i) for i in range(steps)]
    held = [*training.engine.masters, *training.ema.shards, *training.objective.parameters()]
    held += [training.engine.inner.state[m]["exp_avg"] for m in training.engine.masters]
    return {"losses": losses, "dtypes": {t.dtype for t in held}, "weights": training.full()}


def skip(stage: int, accumulate: int) -> dict[str, Any]:
    """Step 0, a step that is not finite, step 1."""
    training = Training(stage, accumulate)
    losses = [training.step(0)]
    before = training.read()
    updated = training.bad_step(5)
    after = training.read()
    losses.append(training.step(1))
    return {"losses": losses, "updated": updated, "before": before, "after": after, "first": training.moment("exp_avg")}


def story(stage: int, folder: str) -> dict[str, Any]:
    """Train, average, save, swap, go on; then another engine with other weights resumes and goes on alike."""
    warnings.simplefilter("ignore")
    training = Training(stage)
    start = training.read()
    losses, weights = [], []
    for i in range(HALF):
        losses.append(training.step(i))
        weights.append(training.read())
    path = state.save(Path(folder), HALF, training.engine, training.ema, {"note": 7}, keep=0)
    out: dict[str, Any] = {
        "start": start,
        "weights": weights,
        "first": training.moment("exp_avg"),
        "second": training.moment("exp_avg_sq"),
        "full": training.full(),
        "ema": training.full(training.ema.shards),
        "norms": list(training.norms),
    }
    out["swap"] = swap(training)
    losses += [training.step(i) for i in range(HALF, HALF + 2)]
    out |= {"losses": losses, "end": training.full(), "end ema": training.full(training.ema.shards)}
    again = Training(stage, seed=2)
    out["other"] = again.full()
    step, extra = state.load(path, again.engine, again.ema)
    out["loaded"] = (step, extra["note"])
    out["again"] = [again.step(i) for i in range(HALF, HALF + 2)]
    out |= {"again end": again.full(), "again ema": again.full(again.ema.shards)}
    return out


def swap(training: Training) -> dict[str, Any]:
    """The loss before, inside and after `applied`, and whether masters and averages came back bit by bit."""
    kept = [[t.detach().clone() for t in ts] for ts in (training.engine.masters, training.ema.shards)]
    before = training.loss(8)
    with training.engine.applied(training.ema.shards):
        inside, weights = training.loss(8), training.read()
    after = training.loss(8)
    same = [
        torch.equal(a, b)
        for old, new in zip(kept, (training.engine.masters, training.ema.shards), strict=True)
        for a, b in zip(old, new, strict=True)
    ]
    return {"losses": (before, inside, after), "weights": weights, "same": all(same)}


def load_each(folders: list[str]) -> list[dict[str, Any]]:
    """Each checkpoint in turn into an engine of every stage: what it then holds, and the last one's losses."""
    warnings.simplefilter("ignore")
    found = []
    for stage in range(4):
        training = Training(stage, seed=3)
        turned = folders[stage:] + folders[:stage]  # so that each stage goes on from another one
        for folder in turned:
            state.load(Path(folder), training.engine, training.ema)
            held = {"weights": training.full(), "ema": training.full(training.ema.shards)}
            held |= {"first": training.moment("exp_avg"), "second": training.moment("exp_avg_sq")}
            found.append({"stage": stage, "folder": folder, **held})
        found[-1] |= {"losses": [training.step(i) for i in range(HALF, HALF + 2)]}
    return found
