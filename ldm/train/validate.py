"""The loss on held-out samples with fixed noise and times, by all ranks together."""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from ldm import dist
from ldm.checkpoint import files
from ldm.rng import Rng
from ldm.train.config import ValidateConfig
from ldm.train.trainer import Trainer
from ldm.train.writer import on_first
from ldm.types import Batch


def rows(batch: Batch, chosen: list[int]) -> Batch:
    """Some rows of a batch."""
    return {k: v[chosen] if isinstance(v, Tensor) else [v[i] for i in chosen] for k, v in batch.items()}


class LossOnHeldOut:
    """Writes `validation_loss` to the log: the mean over samples, the same for any number of ranks.

    `batch` holds the same samples on every rank. The noise and time of a sample belong to its place in it. For
    objectives whose loss is the mean of `weight` times a sample's loss, and that take fixed times as `time` (B,).
    With `keep_best` the checkpoint of the lowest loss stays in the run's folder `best`, named in its `best.json`.
    """

    on_demand = False

    def __init__(self, config: ValidateConfig, batch: Batch, seed: int) -> None:
        self.every, self._seed, self._keep = config.every, seed + 1, config.keep_best
        places = torch.arange(len(batch["key"]))
        self._batch = batch | {"position": places}
        if config.times:
            self._batch["time"] = (places % config.times).double() / config.times
        self.last = math.nan

    def __call__(self, trainer: Trainer, step: int) -> None:
        with trainer.averaged():
            self.last = self.loss(trainer)
        if trainer.log is not None:
            trainer.log.write(step, {"validation_loss": self.last})
        dist.say(f"step {step}: validation loss {self.last:.5f}")
        if self._keep and step > 0:
            self._keep_best(trainer, step)

    def _keep_best(self, trainer: Trainer, step: int) -> None:
        """Save where the loss is the lowest so far, of all starts of the run; collective."""
        note = trainer.out / "best.json"
        best = math.inf
        if dist.rank() == 0 and note.is_file():
            told = json.loads(note.read_text(encoding="utf-8"))
            best = math.inf if told["step"] > step else float(told["validation_loss"])  # the run went back behind it
        if not dist.from_first(int(self.last < best)):
            return
        trainer.save_best()
        trainer.writer.finish()
        on_first(lambda: files.write_text(note, json.dumps({"step": step, "validation_loss": self.last})))

    @torch.no_grad()
    def loss(self, trainer: Trainer) -> float:
        """Of the network as it is; collective."""
        count, micro = len(self._batch["key"]), trainer.config.micro_batch(dist.world_size())
        share = math.ceil(count / dist.world_size())  # equal on all ranks: the network may be divided over them
        total = 0.0
        for start in range(0, share, micro):
            places = [dist.rank() * share + i for i in range(start, min(start + micro, share))]
            part = rows(self._batch, [p % count for p in places])
            part["weight"] = torch.tensor([1.0 if p < count else 0.0 for p in places])
            loss, _ = trainer.engine.forward(part, Rng.of(self._seed, part["position"]))
            total += float(loss) * len(places)
        return dist.sums([total])[0] / count
