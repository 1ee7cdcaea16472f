"""The runs of a folder as the page shows them: what state each is in, read from its files alone."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoint import files
from ldm.checkpoint.lock import Owner, owner_of
from ldm.web import run as pages
from ldm.web.studio.queue import Job, Queue

SAMPLE_NOW = "sample-now"
"""The file that a trainer takes as: draw the sample pictures after this step."""
LABELS = {
    "trains": "training", "prepares": "preparing", "waiting": "waiting in the queue", "finished": "finished",
    "stopped": "stopped, saved", "failed": "failed", "idle": "not finished",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder, or one that a waiting job will make; `state` is a key of `LABELS`."""

    folder: Path
    name: str
    state: str
    job: Job | None
    owner: Owner | None
    step: int
    steps: int | None
    method: str
    base: str
    problem: str

    @property
    def active(self) -> bool:
        """Whether something works in it."""
        return self.state in ("trains", "prepares")

    @property
    def label(self) -> str:
        """Its name and state in one line."""
        of = f" {self.step} of {self.steps}" if self.state in ("trains", "stopped", "idle") and self.steps else ""
        return f"{self.name}  ({LABELS[self.state]}{of})"


def runs(queue: Queue) -> list[Run]:
    """All runs, those that work first, then the newest."""
    folders = {Path(job.run) for job in queue.jobs()}
    for one in queue.runs.glob("*"):
        if not one.name.startswith(".") and any((one / f).exists() for f in ("config.yaml", "log", "lock.json")):
            folders.add(one)
    found = [look(folder, queue) for folder in folders]
    return sorted(found, key=lambda r: (not r.active, r.state != "waiting", -_touched(r), r.name))


def _touched(run: Run) -> float:
    places = (run.folder / "log" / "metrics.jsonl", run.folder / "config.yaml", run.folder)
    return max([run.job.added if run.job else 0.0, *(p.stat().st_mtime for p in places if p.exists())])


def look(folder: Path, queue: Queue) -> Run:
    """One run."""
    job, owner = queue.of(folder), owner_of(folder)
    rows = tail(folder / "log" / "metrics.jsonl")
    step = max([int(row["step"]) for row in rows], default=0)
    step = max([step, *files.steps(folder / "checkpoints")])
    config = config_of(folder)
    task = config.get("task") or {}
    state, problem = "idle", ""
    if owner is not None or (job is not None and job.alive):
        state = "trains" if _trains(folder, job) else "prepares"
    elif job is not None and job.state == "waiting":
        state = "waiting"
    elif (folder / "done.json").is_file():
        state = "finished"
    elif job is not None and job.told in ("stopped", "failed"):
        state = job.told
        problem = queue.problem(job) if state == "failed" else ""
    elif files.steps(folder / "checkpoints"):
        state = "stopped"
    steps = (config.get("train") or {}).get("steps")
    return Run(
        folder, folder.name, state, job, owner, step, steps if isinstance(steps, int) else None, method_of(task),
        str(task.get("base") or ""), problem,
    )  # fmt: skip


def _trains(folder: Path, job: Job | None) -> bool:
    """Whether a step was made since the job's start; before, models and data are made ready."""
    log = folder / "log" / "metrics.jsonl"
    return log.is_file() and log.stat().st_size > 0 and (job is None or log.stat().st_mtime >= job.added)


def method_of(task: dict[str, Any]) -> str:
    """What a task trains, in words."""
    adapter = (task.get("adapter") or {}).get("kind")
    kind = str(task.get("kind") or "")
    words = {"lora": "LoRA", "pivotal": "LoRA and a word"}.get(str(adapter), "")
    if kind == "dreambooth":
        return f"DreamBooth{', ' + words if words else ''}"
    if kind == "finetune":
        return words or "all weights"
    return kind.replace("_", " ")


def config_of(folder: Path) -> dict[str, Any]:
    """The run's config, {} where it has none yet."""
    from omegaconf import OmegaConf

    path = folder / "config.yaml"
    with contextlib.suppress(OSError, ValueError):
        found = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
        return {str(k): v for k, v in found.items()} if isinstance(found, dict) else {}
    return {}


def tail(path: Path, size: int = 4000) -> list[dict[str, Any]]:
    """The last whole lines of a JSONL file."""
    rows = []
    with contextlib.suppress(OSError):
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            text = file.read().decode("utf-8", "replace")
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows


def sample_now(run: Run) -> str:
    """Ask for sample pictures after this step. Raises ValueError where nothing trains, or no prompt is drawn."""
    if not run.active:
        raise ValueError(f"{run.name}: does not train now, so it draws nothing; the tab Draw does")
    samples = (config_of(run.folder).get("task") or {}).get("samples") or {}
    if run.state == "trains" and not samples.get("prompts"):
        raise ValueError(f"{run.name}: was started without sample prompts, so there is nothing to draw")
    (run.folder / SAMPLE_NOW).touch()
    return f"touch {run.folder / SAMPLE_NOW}"


def again(run: Run, queue: Queue) -> Job:
    """Queue the run's own command once more, which goes on where it was. Raises ValueError where nothing is left."""
    if run.active or run.state == "waiting":
        raise ValueError(f"{run.name}: is {LABELS[run.state]} already")
    if run.state == "finished":
        raise ValueError(f"{run.name}: has finished")
    if run.job is not None:
        return queue.add(run.job.argv, run.folder)
    config = run.folder / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{run.name}: has no config.yaml to go on with")
    return queue.add(["train", str(config)], run.folder)


def said(run: Run, queue: Queue, most: int = 40) -> str:
    """The last lines that its processes printed, where the queue started them."""
    if run.job is None:
        return ""
    with contextlib.suppress(OSError):
        return "\n".join(queue.log(run.job).read_text(encoding="utf-8", errors="replace").splitlines()[-most:])
    return ""


def found(run: Run) -> pages.Found | None:
    """What its folder holds for curves and samples; None before its first step."""
    try:
        return pages.read(run.folder)
    except ValueError:
        return None


def samples(run: Run) -> list[tuple[int, Path]]:
    """(step, picture) of its sample pictures, the oldest first."""
    places = sorted((run.folder / "samples").glob("step-*.png"))
    return [(int(path.stem.removeprefix("step-")), path) for path in places]
