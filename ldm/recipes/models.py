"""A run's checkpoint where a model is asked for: it is written as the folder that the run would write at its end.

The folders are in the run's `exports/step-N`, each written once.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from ldm import dist
from ldm.checkpoint import files
from ldm.config.load import decode, read
from ldm.data.mixture import Data
from ldm.models.shipped import SHIPPED, check_draws
from ldm.recipes import Task, assemble
from ldm.recipes.record import MODELS
from ldm.recipes.sources import is_model, seen
from ldm.train.chosen import choose
from ldm.train.trainer import TrainConfig
from ldm.words import expanded

EXPORTS = "exports"
_NOTE = "made_of.json"
T = TypeVar("T")


def usable(source: str | Path, key: str = "model") -> str:
    """The source as `TextToImage.load` takes it, after writing out a checkpoint if it is one.

    `RUN@N`, `RUN@best` and `RUN/checkpoints/step-N` are the averaged weights of a run's checkpoint, a run that has not
    ended those of its newest one. Raises ValueError naming `key` and what was found for a folder that is no model.
    """
    text = str(source)
    if text in SHIPPED:
        if key.rpartition(".")[2] not in ("vae", "text", "image_encoder"):  # which take a part
            check_draws(text, key)
        return text
    text = expanded(text)
    path, step = _split(text)
    if step is not None:
        return str(_exported(path, step, key))
    if (path / "state.json").is_file() and path.parent.name == "checkpoints":
        return str(_exported(path.parent.parent, files.step_of(path), key))
    if not path.is_dir() or is_model(path) or any(path.glob("*.safetensors")):
        return text
    run = path.parent if path.name == "checkpoints" else path
    if is_model(run / "export"):
        _tell_stale(run)
        return str(run)
    if files.steps(run / "checkpoints"):
        newest = files.newest_of_run(run / "checkpoints")
        assert newest is not None
        return str(_exported(run, files.step_of(newest), key))
    raise ValueError(f"{key} {text!r}: no model in this folder: {seen(path)}")


def run_of(source: str | Path) -> tuple[Path, int | None]:
    """A run's folder by its own path, its export's, `RUN/checkpoints[/step-N]` or `RUN@N`; and the step asked for.

    Raises ValueError naming what was found where there is no run.
    """
    path, step = _split(expanded(str(source)))
    if path.parent.name == "checkpoints" and (path / "state.json").is_file():
        path, step = path.parent.parent, files.step_of(path)
    elif path.name in ("checkpoints", "export") and not (path / "config.yaml").is_file():
        path = path.parent
    if not path.is_dir():
        raise ValueError(f"run {str(source)!r}: no config.yaml in it: there is no such folder")
    if not (path / "config.yaml").is_file():
        found = "it is a model" if is_model(path) else seen(path)
        raise ValueError(f"run {str(source)!r}: no config.yaml in it: {found}")
    return path, step


def with_usable(task: T) -> T:
    """A task whose models are all `usable`."""
    plain: Any = task
    changes = {name: usable(vars(plain)[name], f"task.{name}") for name in MODELS if vars(plain).get(name) is not None}
    changed = {name: source for name, source in changes.items() if source != vars(plain)[name]}
    return cast("T", replace(plain, **changed)) if changed else task


def _tell_stale(run: Path) -> None:
    """A run that goes on after its end has an export of before."""
    done, saved = run / "done.json", files.steps(run / "checkpoints")
    if done.is_file() and saved:
        step = json.loads(done.read_text(encoding="utf-8")).get("step", 0)
        if step < saved[-1]:
            dist.say(f"{run}: its export is of step {step}; the newest checkpoint is {run}@{saved[-1]}")


def _split(text: str) -> tuple[Path, int | None]:
    """`RUN@N` as (RUN, N), where that is no path itself; `RUN@best` as the step of its lowest validation loss.

    Raises ValueError for a run that kept none.
    """
    run, at, step = text.rpartition("@")
    if at and step == "best" and not Path(text).exists() and Path(run).is_dir():
        note = Path(run) / "best.json"
        if not note.is_file():
            raise ValueError(f"run {text!r}: it kept no best checkpoint (train.validate.keep_best)")
        return Path(run), int(json.loads(note.read_text(encoding="utf-8"))["step"])
    if at and step.isdigit() and not Path(text).exists() and (Path(run) / "checkpoints").is_dir():
        return Path(run), int(step)
    return Path(text), None


def _exported(run: Path, step: int, key: str) -> Path:
    """A checkpoint as the folder that its run writes at the end; written anew when it is not the one it was."""
    checkpoint = files.kept(run, step) / f"step-{step}"
    if not checkpoint.is_dir():
        raise ValueError(f"{key}: {run} has no checkpoint of step {step}, only of {files.steps(run / 'checkpoints')}")
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{key} {str(run)!r}: checkpoints, but no config.yaml that says of what")
    told = {"checkpoint": files.digest(checkpoint / files.MANIFEST)}
    place = run / EXPORTS if os.access(run, os.W_OK) else Path(tempfile.mkdtemp(prefix="ldm-"))
    out, beside = place / f"step-{step}", place / f".step-{step}.tmp-{os.getpid()}"
    if _told(out) == told:
        return out
    place.mkdir(exist_ok=True)
    dist.say(f"{checkpoint}: written as a model into {out}")
    try:
        _write(run, step, beside)
        files.write_text(beside / _NOTE, json.dumps(told))
        if _told(out) != told:  # another process may have been faster
            shutil.rmtree(out, ignore_errors=True)
            beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out


def _told(folder: Path) -> Any:
    note = folder / _NOTE
    return json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None


def _write(run: Path, step: int, out: Path) -> None:
    tree = read(run / "config.yaml")
    hints = {"task": Task, "data": Data, "train": TrainConfig}
    task, data, train = (decode(cast("Any", hint), tree[name], name) for name, hint in hints.items())
    chosen = choose(run, step)
    assembly = assemble(task, data, train, int(tree.get("seed", 0)), 0)
    assembly.export(chosen.weights, out)
