"""One run: what it is, where it lies, and whether it is done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.quality.rows import Recipe
from ldm.checkpoint.files import write_text

MARKS = (38.0, 75.0, 150.0, 300.0, 600.0, 1200.0, 1800.0)
"""Processor seconds at which every recipe is measured."""
QUICK = (0.3, 0.6)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How quality is measured: the same for every row.

    `pictures` of each split in `steps` network steps, retrieval among `candidates` captions, distance to `real`
    pictures, `held_out` pictures of the split that no recipe trains on.
    """

    pictures: int = 128
    steps: int = 20
    candidates: int = 64
    real: int = 1024
    held_out: int = 128
    seed: int = 0


TINY = Protocol(pictures=4, steps=2, candidates=4, real=8, held_out=4)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A recipe, a seed, a budget in processor seconds, with what is measured on the way to it."""

    recipe: str
    seed: int
    budget: float
    marks: tuple[float, ...]
    out: str
    threads: int = 1
    precision: str = ""
    quick: bool = False

    @staticmethod
    def of(told: dict[str, Any]) -> Spec:
        return Spec(**{**told, "marks": tuple(told["marks"])})

    def told(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def protocol(self) -> Protocol:
        return TINY if self.quick else Protocol()

    @property
    def name(self) -> str:
        return f"{self.recipe}-seed{self.seed}-{self.budget:g}s"

    @property
    def record(self) -> Path:
        return Path(self.out) / f"{self.name}.json"

    @property
    def work(self) -> Path:
        return Path(self.out) / "work" / self.name

    def identity(self, recipe: Recipe) -> dict[str, Any]:
        """What a finished run must have been, to be this one."""
        return {
            "recipe": json.loads(json.dumps(recipe.written)), "seed": self.seed, "budget": self.budget,
            "threads": self.threads, "protocol": dataclasses.asdict(self.protocol),
        }  # fmt: skip


def chosen(recipes: Sequence[Recipe], seeds: int, budgets: Sequence[float], **common: Any) -> list[Spec]:
    """The runs, short ones first. Of a recipe without decay the longest alone: it passes all other budgets' ends."""
    marks, found = tuple(sorted(set(budgets))), []
    for budget in marks:
        for seed in range(seeds):
            for recipe in recipes:
                if not recipe.prefix or budget == marks[-1]:
                    found.append(Spec(recipe=recipe.name, seed=seed, budget=budget, marks=marks, **common))
    return found


def finished(spec: Spec, recipe: Recipe) -> dict[str, Any] | None:
    """The run's record; None where it is not done, or was of another recipe or protocol."""
    if not spec.record.is_file():
        return None
    told = json.loads(spec.record.read_text(encoding="utf-8"))
    return told if told["identity"] == spec.identity(recipe) else None


def every(like: Spec, recipe: Recipe) -> list[dict[str, Any]]:
    """All finished records of a recipe as it is now, of any seed and budget; short ones and low seeds first."""
    found = []
    for path in Path(like.out).glob(f"{recipe.name}-seed*-*s.json"):
        told = json.loads(path.read_text(encoding="utf-8"))
        spec = dataclasses.replace(like, recipe=recipe.name, seed=told["seed"], budget=told["budget"])
        if (record := finished(spec, recipe)) is not None:
            found.append(record)
    return sorted(found, key=lambda r: (r["budget"], r["seed"]))


def write(spec: Spec, record: dict[str, Any]) -> None:
    """The whole file or nothing."""
    spec.record.parent.mkdir(parents=True, exist_ok=True)
    write_text(spec.record, json.dumps(record, indent=1))
