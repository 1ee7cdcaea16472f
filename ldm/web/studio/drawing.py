"""From what the form of drawing says to the commands that draw: one, two to compare, or a grid over two settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

MOST = 64
"""Pictures, and places of a grid, of one request."""
SETTINGS = {
    "guidance": "Guidance", "steps": "Steps", "sampler": "Sampler", "seed": "Seed", "negative": "Negative prompt",
    "prompt": "Prompt", "lora": "LoRA weight", "strength": "Strength",
}  # fmt: skip
"""What a grid may vary, with the page's words."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the page holds; None is the model's own. `loras`: (file, weight). `picture`, `mask`: files."""

    model: str
    prompt: str
    out: str
    negative: str = ""
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    count: int = 1
    size: tuple[int, int] | None = None
    loras: tuple[tuple[str, float], ...] = ()
    embeddings: tuple[str, ...] = ()
    picture: str | None = None
    mask: str | None = None
    strength: float | None = None


def command(form: Form, *more: str) -> list[str]:
    """`ldm sample`, or `ldm edit img2img|inpaint` where a picture is given. Raises ValueError for what cannot be."""
    prompt = form.prompt.strip()
    if not prompt:
        raise ValueError("prompt: it is empty; write what to draw")
    if not 1 <= form.count <= MOST:
        raise ValueError(f"pictures: must be in [1, {MOST}], got {form.count}")
    verb = ["sample"] if form.picture is None else ["edit", "img2img" if form.mask is None else "inpaint"]
    words = [prompt] if form.picture is None else [form.picture, *([form.mask] if form.mask else []), prompt]
    argv = [*verb, *words, "--model", form.model]
    for option, value in (
        ("--negative", form.negative.strip() or None), ("--sampler", form.sampler), ("--steps", form.steps),
        ("--guidance", None if form.guidance is None else f"{form.guidance:g}"), ("--seed", form.seed),
        ("--count", form.count if form.count > 1 or more else None),
    ):  # fmt: skip
        if value is not None:
            argv += [option, str(value)]
    if form.size is not None:
        argv += ["--size", *map(str, dict.fromkeys(form.size) if form.size[0] == form.size[1] else form.size)]
    if form.picture is not None and form.strength is not None:
        argv += ["--strength", f"{form.strength:g}"]
    for path, weight in form.loras:
        argv += ["--lora", f"{path}:{weight:g}"]
    for path in form.embeddings:
        argv += ["--embedding", path]
    return [*argv, *more, "--out", form.out]


@dataclass(frozen=True)
class Place:
    """One command of several, and what its picture is called."""

    label: str
    form: Form


def beside(form: Form, base: str) -> list[Place]:
    """The same noise and words by the base and by the tuned model."""
    if form.loras:
        return [Place("without the LoRAs", replace(form, loras=())), Place("with", form)]
    if base == form.model:
        raise ValueError(f"compare: {form.model!r} is a base itself; choose a run as model, or add a LoRA")
    return [
        Place(f"base: {Path(base).name}", replace(form, model=base)),
        Place(f"tuned: {Path(form.model).name}", form),
    ]


def grid(form: Form, axes: Sequence[tuple[str, str]]) -> tuple[list[Place], int]:
    """Every combination of the values of one or two settings, one picture each; the number of columns.

    An axis is a key of `SETTINGS` and values between commas (of prompts: `|`). Raises ValueError for a value that its
    setting does not take.
    """
    told = [(key, values(key, text)) for key, text in axes if key and text.strip()]
    if not told:
        raise ValueError("grid: choose a setting and write its values, such as 2, 4, 8")
    if len({key for key, _ in told}) < len(told):
        raise ValueError(f"grid: {SETTINGS[told[0][0]]} is chosen twice")
    total = 1
    for _, found in told:
        total *= len(found)
    if total > MOST:
        raise ValueError(f"grid: {total} pictures are more than {MOST}")
    places = []
    for combination in itertools.product(*(found for _, found in told)):
        chosen = dict(zip((key for key, _ in told), combination, strict=True))
        label = " · ".join(f"{SETTINGS[key]} {value:g}" if isinstance(value, float) else f"{SETTINGS[key]} {value}"
                           for key, value in chosen.items())  # fmt: skip
        places.append(Place(label, _changed(replace(form, count=1), chosen)))
    return places, len(told[-1][1])


def _changed(form: Form, chosen: Mapping[str, Any]) -> Form:
    chosen = dict(chosen)
    weight = chosen.pop("lora", None)
    if weight is not None:
        if not form.loras:
            raise ValueError("grid: LoRA weight: no LoRA is chosen")
        form = replace(form, loras=((form.loras[0][0], weight), *form.loras[1:]))
    if "strength" in chosen and form.picture is None:
        raise ValueError("grid: Strength: no picture to start from is given")
    return replace(form, **chosen)


def values(key: str, text: str) -> list[Any]:
    """The values that a text lists. Raises ValueError naming the setting and the value."""
    words = [word.strip() for word in text.split("|" if key in ("prompt", "negative") else ",")]
    words = [word for word in words if word]
    if key in ("prompt", "negative", "sampler"):
        return words
    kind = int if key in ("steps", "seed") else float
    try:
        return [kind(word) for word in words]
    except ValueError:
        expected = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"grid: {SETTINGS[key]}: expected {expected} between commas, got {text!r}") from None


def pictures(lines: Sequence[str]) -> list[Path]:
    """The pictures that a command's output names, without contact sheets."""
    found = [Path(line.strip()) for line in lines if line.strip().endswith(".png")]
    return [path for path in found if not path.name.startswith("grid")]


def record(path: Path) -> dict[str, Any]:
    """The settings that `ldm` wrote into a picture; {} without."""
    import json

    from ldm.data.decode import notes

    try:
        told = json.loads(notes(path)[0].get("ldm", "{}"))
    except (ValueError, OSError):
        return {}
    return told if isinstance(told, dict) else {}


def whole_only(settings: Mapping[str, Any]) -> str:
    """Why a picture of these settings cannot be drawn again alone, nor its settings be put into the form; "" if so."""
    if "command" in settings:
        return "An edited picture is drawn again with all of its command, which stands above."
    return "" if "index" in settings and "prompt" in settings else "A picture without the settings of `ldm sample`."


def told(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A picture's settings in words; those that are off are left out."""
    if "command" in settings:
        import shlex

        return [("Command", shlex.join(["ldm", *map(str, settings["command"])]))]
    names = {
        "prompt": "Prompt", "negative": "Negative", "model": "Model", "sampler": "Sampler", "steps": "Steps",
        "guidance": "Guidance", "seed": "Seed", "index": "Number", "size": "Size", "lora": "LoRAs",
        "embedding": "Embeddings", "precision": "Precision", "weights": "Weights (hash)",
    }  # fmt: skip
    rows = []
    for key, name in names.items():
        value = settings.get(key)
        if value not in (None, "", []):
            shown = (
                " x ".join(map(str, value)) if key == "size" else ", ".join(value) if isinstance(value, list) else value
            )
            rows.append((name, str(shown)))
    return rows


def mask_of(layers: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image | None:
    """White where anything was drawn, black elsewhere; None where nothing was."""
    mask = Image.new("L", size, 0)
    for layer in layers:
        drawn = layer.convert("RGBA").getchannel("A").resize(size, Image.Resampling.NEAREST)
        mask.paste(255, (0, 0), drawn.point([0, *[255] * 255]))
    return mask if mask.getbbox() else None
