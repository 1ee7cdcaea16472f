"""Recipes: YAML files in the form of `ldm train`'s configs, with a part `quality` that says what they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ldm.config import load as config
from ldm.config.schema import RunConfig, load_run
from ldm.data.mixture import main_source
from ldm.recipes.text_to_image import TextToImageTask
from ldm.words import near

FOLDER = Path(__file__).parent / "recipes"
JUDGES = ("clip_emoji", "efficientnet_lite0")
"""The networks that judge: one that gives a recipe a training signal does not judge it."""
TINY = (
    "task.network.block_out_channels=[32,32,32]", "task.network.attention_head_dim=[1,1,1]",
    "data.split=heldout", "train.batch=4", "train.validate.samples=8",
)  # fmt: skip
"""What makes a recipe run in a few seconds, to see that it does."""


@dataclass(frozen=True, kw_only=True)
class About:
    """The part `quality` of a recipe.

    `teachers`: networks other than the frozen autoencoder and text encoder that the training learns from, of `JUDGES`
    or others; figures of those judges are left out. `by`: whose program trains it. `rates`: one row for each such
    `train.optim.lr`.
    """

    title: str
    teachers: tuple[str, ...] = ()
    by: Literal["ldm", "diffusers"] = "ldm"
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.title:
            raise ValueError("title must not be empty")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One row: `name` is the file's, with @ and the rate where the file lists rates."""

    name: str
    about: About
    run: RunConfig
    written: dict[str, Any]
    """What the files say, without defaults, folders and what does not train: a run of other words is another run."""

    @property
    def task(self) -> TextToImageTask:
        assert isinstance(self.run.task, TextToImageTask)
        return self.run.task

    @property
    def prefix(self) -> bool:
        """Whether a shorter run is the beginning of a longer one, so that what is measured on the way is its end."""
        return self.run.train.optim.decay == "constant"


def names() -> list[str]:
    """All rows: base first, diffusers last."""
    files = [path.stem for path in FOLDER.glob("*.yaml")]
    order = {"base": 0, "common": 2, "diffusers": 3}
    return [row for f in sorted(files, key=lambda f: (order.get(f, 1), f)) for row in _rows(f)]


def find(asked: list[str]) -> list[str]:
    """Rows by their names, or by their file's for all its rates. Raises ValueError for one that there is not."""
    every, chosen = names(), []
    for name in asked:
        found = [n for n in every if n == name or n.partition("@")[0] == name]
        if not found:
            raise ValueError(f"recipe {name!r} is not one of {', '.join(every)}{near(name, every)}")
        chosen += [n for n in found if n not in chosen]
    return chosen


def load(name: str, *, tiny: bool = False, precision: str = "") -> Recipe:
    """A row's recipe, checked. Raises ValueError for a mistake in its file, and for teachers that it does not tell."""
    file, _, rate = name.partition("@")
    overrides = list(TINY if tiny else ())
    if tiny and config.read(FOLDER / f"{file}.yaml")["task"]["network"].get("kind", "unet") != "unet":
        overrides = overrides[2:]
    overrides += [f"train.optim.lr={rate}"] if rate else []
    overrides += [f"train.engine.precision={precision}"] if precision else []
    return read(FOLDER / f"{file}.yaml", overrides, name)


def read(path: Path, overrides: Sequence[str] = (), name: str = "") -> Recipe:
    """A recipe's file. Raises ValueError naming the key and what is allowed."""
    tree = config.read(path, overrides)
    about = config.decode(About, tree.pop("quality", {}), "quality")
    run = load_run(tree)
    if not isinstance(run.task, TextToImageTask):
        raise ValueError(f"{path}: task.kind: a recipe is of the task text_to_image, got {run.task.kind!r}")
    main_source(run.data)
    for key, judge in _named(config.encode(run.task)):
        if judge not in about.teachers:
            raise ValueError(f"{path}: task.{key} names {judge}, which judges: list it in quality.teachers")
    return Recipe(name=name or path.stem, about=about, run=run, written=_kept(tree, about))


def _kept(tree: Mapping[str, Any], about: About) -> dict[str, Any]:
    kept = copy.deepcopy({k: v for k, v in tree.items() if k not in ("name", "out", "seed")})
    for part, keys in (("task", ("cache",)), ("train", ("steps", "checkpoint", "log", "threads", "validate"))):
        for key in keys:
            kept[part].pop(key, None)
    kept["task"].get("samples", {}).pop("prompts", None)
    return {"by": about.by, **kept}


def _named(task: Mapping[str, Any], where: str = "") -> list[tuple[str, str]]:
    """Keys of a task whose values name a judge. The text encoder that conditions the network is no teacher."""
    found = []
    for key, value in task.items():
        if isinstance(value, Mapping):
            found += _named(value, f"{where}{key}.")
        elif isinstance(value, str) and f"{where}{key}" not in ("text", "vae"):
            found += [
                (f"{where}{key}", judge) for judge in JUDGES if judge in value or judge in value.replace("-", "_")
            ]
    return found


def _rows(file: str) -> list[str]:
    rates = config.decode(About, config.read(FOLDER / f"{file}.yaml").get("quality", {}), "quality").rates
    return [f"{file}@{rate_name(rate)}" for rate in rates] or [file]


def rate_name(rate: float) -> str:
    """1e-3, as rows are called."""
    mantissa, _, exponent = f"{rate:e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def placed(recipe: Recipe, out: Path, cache: Path, seed: int, steps: int) -> RunConfig:
    """The recipe's config for one run: its folder, the shared cache, its seed and number of steps."""
    run, train = recipe.run, recipe.run.train
    checkpoint = replace(train.checkpoint, every=1_000_000_000, keep=1, keep_every=0, asynchronous=False)
    log = replace(train.log, tensorboard=False, peak=1.0)
    guard = replace(train.guard, hang=0.0)  # measuring on a busy machine may take long
    train = replace(train, steps=steps, checkpoint=checkpoint, log=log, guard=guard, threads=0)
    return replace(run, out=out, seed=seed, task=replace(recipe.task, cache=cache), train=train)
