"""What all tabs share: the folders, the commands, the queue, and what lists offer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm.models.shipped import PARTS, SHIPPED, STUDENTS
from ldm.web.studio.commands import Commands
from ldm.web.studio.places import Places
from ldm.web.studio.queue import Queue
from ldm.web.studio.runs import Run, config_of, look, runs


@dataclass(frozen=True)
class Studio:
    """One page's state; all else is in files."""

    places: Places
    commands: Commands
    queue: Queue

    def runs(self) -> list[Run]:
        """All runs, those that work first; the worker is started again where it is gone and jobs wait."""
        if (self.queue.folder / "jobs").is_dir():
            self.queue.work()
        return runs(self.queue)

    def run(self, name: str | None) -> Run:
        """By its name. Raises ValueError where there is none."""
        if not name:
            raise ValueError("run: none is chosen; the tab Train starts one")
        folder = self.places.runs / name
        if folder.parent != self.places.runs or not (folder.is_dir() or self.queue.of(folder)):
            raise ValueError(f"run {name!r}: not in {self.places.short(self.places.runs)}")
        return look(folder, self.queue)

    def run_choices(self) -> list[tuple[str, str]]:
        """(label, name) for a list."""
        return [(run.label, run.name) for run in self.runs()]

    def bases(self) -> list[str]:
        """Models to start a training from."""
        shipped = [name for name in SHIPPED if name not in PARTS and name not in STUDENTS.values()]
        return [*shipped, *self.places.models()]

    def models(self) -> list[str]:
        """Models to draw with: runs that have something to draw with first."""
        drawn = [self.places.short(r.folder) for r in self.runs() if _draws(r.folder)]
        return [*drawn, *(name for name in SHIPPED if name not in PARTS), *self.places.models(), *self._single()]

    def loras(self) -> list[str]:
        """Files that may be LoRAs or embeddings, and runs that made some."""
        own = [self.places.short(r.folder) for r in self.runs() if (r.folder / "export" / "adapter.json").is_file()]
        return [*own, *self.places.files()]

    def _single(self) -> list[str]:
        return [file for file in self.places.files() if Path(file).stat().st_size > 1_000_000_000]


def _draws(folder: Path) -> bool:
    export = folder / "export"
    if (config_of(folder).get("task") or {}).get("kind") in ("controlnet", "ip_adapter"):
        return False  # which draw beside a model
    return (
        (export / "adapter.json").is_file()
        or (export / "model_index.json").is_file()
        or any((folder / "checkpoints").glob("step-*"))
    )
