"""One run in a process of its own: `python -m bench.quality.worker SPEC`, a `Spec` as JSON."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.quality import runs
from bench.quality.runs import Spec

BUSY = 73
"""Exit code where another process has the run (EX_CANTCREAT)."""


def main(argv: list[str]) -> int:
    """The exit code: 0 done, 75 told to stop, 73 another process is at it."""
    spec = Spec.of(json.loads(argv[0]))
    os.environ["OMP_NUM_THREADS"] = str(spec.threads)  # before torch is loaded
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import torch

    torch.set_num_threads(spec.threads)
    return work(spec)


def work(spec: Spec) -> int:
    """The same in this process."""
    from bench.quality import ours, rows
    from bench.quality.course import Course
    from bench.quality.judge import Quality, calls
    from ldm.checkpoint.lock import RunLock, RunLocked
    from ldm.data.mixture import main_source

    recipe = rows.load(spec.recipe, tiny=spec.quick, precision=spec.precision)
    if runs.finished(spec, recipe) is not None:
        return 0
    settings = recipe.task.samples.settings
    network_calls = calls(settings, spec.protocol)
    lock = RunLock(spec.work)
    try:
        lock.acquire()
    except RunLocked:
        return BUSY
    try:
        _forget_others(spec, spec.identity(recipe))
        data = main_source(recipe.run.data)
        quality = functools.cache(lambda: Quality(spec.protocol, data.path, data.split, Path(spec.out) / "cache"))
        if recipe.about.by == "diffusers":
            from bench.quality import peer

            code = peer.run(spec, recipe, quality)
        else:
            code = ours.run(spec, recipe, quality)
        if code:
            return code
        course = Course.read(spec.work / "course.json")
        assert course is not None
        runs.write(spec, _record(spec, recipe, course, {"sampler": settings.sampler, "network_calls": network_calls}))
    finally:
        lock.release()
    shutil.rmtree(spec.work)
    return 0


def _forget_others(spec: Spec, identity: dict[str, Any]) -> None:
    """Begin anew where what lies there was begun by another recipe of this name."""
    from ldm.checkpoint.files import write_text

    path = spec.work / "identity.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != identity:
        print(f"{spec.name}: the recipe is another now: from the beginning", flush=True)
        for gone in ("checkpoints", "log"):
            shutil.rmtree(spec.work / gone, ignore_errors=True)
        for gone in ("course.json", "peer.safetensors"):
            (spec.work / gone).unlink(missing_ok=True)
    write_text(path, json.dumps(identity))


def _record(spec: Spec, recipe: Any, course: Any, drawn: dict[str, Any]) -> dict[str, Any]:
    from bench.timing import machine

    parameters = sum(p.numel() for p in _network(recipe).parameters())
    return {
        "name": spec.name, "recipe": spec.recipe, "seed": spec.seed, "budget": spec.budget, "prefix": recipe.prefix,
        "identity": spec.identity(recipe), "machine": machine(spec.threads, []), "parameters": parameters,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "drawn": drawn, "steps": course.steps,
        "planned_seconds_a_step": course.rate, "starts": course.starts, "points": course.points,
    }  # fmt: skip


def _network(recipe: Any) -> Any:
    import torch

    from ldm.models import networks

    with torch.device("meta"):
        return networks.build(recipe.task.network)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
