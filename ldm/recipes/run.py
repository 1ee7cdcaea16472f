"""From a checked config to a finished run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ldm import dist
from ldm.checkpoint import files
from ldm.recipes.base import Assembly
from ldm.train import engine
from ldm.train.trainer import TrainConfig, Trainer


def run(build: Callable[[], Assembly], train: TrainConfig, out: Path, *, seed: int, resolved: str) -> int:
    """Train in the run folder `out`, resuming what is there, and export at the end; the process's exit code.

    `resolved` is the whole config as YAML. Raises ValueError when the folder holds a run with another model or data.
    """
    engine.start()
    if _finished(out, train.steps, resolved):
        dist.say(f"{out}: already finished {train.steps} steps; exported to {out / 'export'}")
        return 0
    if dist.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log").mkdir(exist_ok=True)
        files.write_text(out / "config.yaml", resolved)
    dist.barrier()
    assembly = build()
    trainer = Trainer(train, assembly.objective, assembly.loader, out, seed=seed, settings=resolved)
    code = trainer.run(assembly.hooks)
    if code == 0:
        weights = trainer.weights()
        if dist.rank() == 0:
            assembly.export(weights, out / "export")
            files.write_text(out / "done.json", json.dumps({"step": trainer.step, "skipped": trainer.skipped}))
            dist.say(f"finished {trainer.step} steps; exported to {out / 'export'}")
        dist.barrier()
    return code


def _finished(out: Path, steps: int, resolved: str) -> bool:
    """Whether this very config has run to its end here."""
    config, done = out / "config.yaml", out / "done.json"
    if not (config.is_file() and done.is_file() and config.read_text(encoding="utf-8") == resolved):
        return False
    return json.loads(done.read_text(encoding="utf-8")).get("step") == steps
