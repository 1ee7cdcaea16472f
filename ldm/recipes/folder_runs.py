"""From a folder of pictures and a few choices to the whole config of a fine-tuning run, as plain data."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm.data.manifest import Manifest
from ldm.models import networks
from ldm.models.families import SD15, Family, family_of
from ldm.models.shipped import SHIPPED, named
from ldm.objectives.masked import LOSS_WEIGHT
from ldm.recipes.pictures import is_set
from ldm.recipes.sources import network_of, scheduler_of, vae_of

RATES = {
    "controlnet": (1.0e-5, 3.0e-4),
    "dreambooth": (5.0e-6, 1.0e-4),
    "dreambooth_lora": (1.0e-4, 4.0e-3),
    "dreambooth_pivotal": (1.0e-4, 4.0e-3),
    "ip_adapter": (1.0e-4, 3.0e-4),
    "inpaint": (1.0e-5, 3.0e-4),
    "instruct": (5.0e-5, 3.0e-4),
    "lora": (1.0e-4, 4.0e-3),
    "upscale": (5.0e-5, 3.0e-4),
    "textual_inversion": (5.0e-3, 1.0e-2),
}
"""Learning rate by method: of models of Stable Diffusion's size, and of the small one that the package ships."""
STEPS = {
    "controlnet": 10000,
    "dreambooth": 400,
    "dreambooth_lora": 500,
    "dreambooth_pivotal": 500,
    "ip_adapter": 10000,
    "inpaint": 10000,
    "instruct": 10000,
    "lora": 1000,
    "upscale": 10000,
    "textual_inversion": 500,
}


PAIRS: dict[str, dict[str, Any]] = {
    "inpaint": {"inpaint_mask": {"kind": "random_mask"}, "masked": {"kind": "masked"}},
    "instruct": {"original": {"kind": "stored", "cache": "latents"}},
    "upscale": {"small": {"kind": "small"}},
}
"""Of methods that tell the network a picture by more channels: the pairs that it is made of."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What all methods are asked; None is the method's own. `samples`: sample pictures every so many steps.

    `optim` and `options`: more of `train.optim` and `task.options`; `masks`: where those of a masked loss are.
    """

    method: str
    images: Path
    base: str = "emoji"
    name: str | None = None
    out: Path | None = None
    steps: int | None = None
    batch: int = 2
    accumulate: int = 1
    lr: float | None = None
    size: int | None = None
    seed: int = 0
    prompts: Sequence[str] = ()
    samples: int = 100
    stage: int = 1
    precision: str = "auto"
    text_precision: str = "fp32"
    cache: bool = True
    gradient_checkpointing: bool | str | None = None
    adapter: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    masks: str | None = None

    @functools.cached_property
    def family(self) -> Family | None:
        """The published family of the base, Stable Diffusion 1 for one that is not here; None of a shipped model."""
        if self.base in SHIPPED:
            return None
        try:
            return family_of(network_of(self.base), scheduler_of(self.base))
        except ValueError:  # loading it will say what is wrong
            if Path(self.base).exists():
                raise
            return SD15

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out if self.out is not None else Path("runs") / self.called

    @property
    def called(self) -> str:
        """The run's name."""
        return self.name if self.name is not None else f"{self.method}_{self.images.resolve().name}"

    @property
    def drawing(self) -> dict[str, Any]:
        """How samples and class pictures are drawn."""
        if self.family is None:
            return {"sampler": "dpmpp_2m", "steps": 25, "guidance": 3.0}
        return {"sampler": self.family.sampler, "steps": self.family.steps, "guidance": self.family.guidance}

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return own_side(self.base) if self.size is None else self.size

    @property
    def rate(self) -> float:
        """The learning rate."""
        large, small = RATES[self.method]
        if self.lr is not None or self.family is None:
            return small if self.lr is None else self.lr
        own = {"dreambooth": self.family.full_rate, "textual_inversion": large, "controlnet": large,
               "ip_adapter": large}  # fmt: skip
        return own.get(self.method, large if self.method in PAIRS else self.family.rate)

    @property
    def tuned(self) -> dict[str, Any]:
        """The adapter's settings, a LoRA's rank the family's where none is asked for."""
        if self.adapter.get("kind") == "pivotal":
            return self.adapter | {"lora": self._ranked(self.adapter["lora"])}
        return self._ranked(self.adapter) if self.adapter.get("kind") == "lora" else self.adapter

    def _ranked(self, lora: dict[str, Any]) -> dict[str, Any]:
        rank = 4 if self.family is None else self.family.rank
        return lora if lora.get("rank") is not None else lora | {"rank": rank}

    @property
    def recompute(self) -> bool | str:
        """What is computed again in the backward pass."""
        if self.gradient_checkpointing is not None:
            return self.gradient_checkpointing
        return self.family is not None and self.family.recompute


def factor_of(base: str) -> int:
    """Pixels for each of the latents' along a side."""
    if (folder := named(base)).is_dir() and (folder / "adapter.json").is_file():
        return factor_of(json.loads((folder / "adapter.json").read_text(encoding="utf-8"))["base"])
    return 2 ** (len(vae_of(base).block_out_channels) - 1)


def own_side(base: str) -> int:
    """The side in pixels that a model draws by itself, without reading its weights."""
    with torch.device("meta"):
        network = networks.build(network_of(base))
    if (folder := named(base)).is_dir() and (folder / "adapter.json").is_file():
        return own_side(json.loads((folder / "adapter.json").read_text(encoding="utf-8"))["base"])
    config = vae_of(base)
    return network.side * 2 ** (len(config.block_out_channels) - 1)


def dreambooth(
    choices: Choices, *, identifier: str, noun: str, prior: dict[str, Any] | None, weight: float = 1.0, **task: Any
) -> dict[str, Any]:
    """DreamBooth; `prior` holds the settings of the class pictures, or is None."""
    prompts = choices.prompts or (f"a {identifier} {noun}", f"a red {identifier} {noun}", f"a {noun}", "a tree")
    side = choices.side
    sources: list[dict[str, Any]] = [{"data": _shards(choices, "subject", side)}]
    if prior is not None:
        sources.append({"data": _shards(choices, "class", side), "weight": weight})
        prior = prior | {"settings": choices.drawing}
    data = {"kind": "mixture", "sources": sources} if prior is not None else sources[0]["data"]
    own = {"images": str(choices.images), "identifier": identifier, "noun": noun, "prior": prior, **task}
    return _run(choices, "dreambooth", own | {"adapter": choices.tuned}, data, prompts)


def inversion(choices: Choices, *, token: str, max_norm: float, **concept: Any) -> dict[str, Any]:
    """Textual inversion of one concept."""
    prompts = choices.prompts or (token, f"a {token}", f"a red {token}", f"a {token} and a tree")
    own = {"concepts": [{"token": token, "images": str(choices.images), **concept}], "max_norm": max_norm}
    return _run(choices, "textual_inversion", own, _shards(choices, "subject", choices.side), prompts)


def lora(choices: Choices) -> dict[str, Any]:
    """LoRA on captioned pictures; a built set is trained on where it lies."""
    if is_set(choices.images):
        own: dict[str, Any] = {"adapter": choices.tuned}
        return _run(choices, "finetune", own, _own_shards(choices.images, choices.side), choices.prompts)
    own = {"images": str(choices.images), "adapter": choices.tuned}
    return _run(choices, "finetune", own, _shards(choices, "pictures", choices.side), choices.prompts)


def controlnet(
    choices: Choices, *, condition: str, start: str | None, conditions: Sequence[Path], drop: float
) -> dict[str, Any]:
    """A ControlNet on captioned pictures; `condition` is a kind of pair with its usual settings.

    A built set is trained on where it lies. Raises ValueError for stored conditions of a folder that is not built.
    """
    own, data = _of_images(choices, "--condition stored" if condition == "stored" else None)
    own |= {"start": start, "conditions": [str(path) for path in conditions], "options": {"drop": drop}}
    enlarged = {"enlarge": True} if condition == "small" else {}  # a ControlNet is shown the pictures' size
    data |= {"pairs": {"condition": {"kind": condition, **enlarged}}}
    return _run(choices, "controlnet", own, data, choices.prompts)


def ip_adapter(
    choices: Choices, *, image_encoder: str, form: str, start: str | None, references: Sequence[Path]
) -> dict[str, Any]:
    """An IP-Adapter on captioned pictures; a built set is trained on where it lies."""
    own, data = _of_images(choices, None)
    own |= {"image_encoder": image_encoder, "form": form, "start": start}
    own |= {"references": [str(path) for path in references]}
    return _run(choices, "ip_adapter", own, data, choices.prompts)


def concat(
    choices: Choices, method: str, *, pictures: Sequence[Path], masks: Sequence[Path], drop: float | None
) -> dict[str, Any]:
    """All weights of a base that is told a picture by more channels, on captioned pictures and their pairs."""
    pairs = PAIRS[method]
    if method == "upscale":
        pairs = {"small": pairs["small"] | {"factor": factor_of(choices.base)}}
    own, data = _of_images(choices, method if any(p["kind"] == "stored" for p in pairs.values()) else None)
    usual = 0.05 if method == "instruct" else 0.1
    told: dict[str, Any] = {"kind": method}
    told |= {"drop": drop, "both": drop} if method == "instruct" and drop is not None else {}
    own |= {"adapter": choices.adapter, "options": {"drop": usual if drop is None else drop, "concat": told}}
    made = _run(choices, "finetune", own, data | {"pairs": pairs}, choices.prompts)
    drawn = {"pictures": [str(p) for p in pictures], "masks": [str(p) for p in masks]}
    made["task"]["samples"] |= {key: paths for key, paths in drawn.items() if paths}
    return made


def _of_images(choices: Choices, stored: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the task is told of them, the data) of a folder or a built set, which is trained on where it lies.

    Raises ValueError for a folder where `stored`, as messages call it, takes pairs of a built set.
    """
    if is_set(choices.images):
        return {}, _own_shards(choices.images, choices.side)
    if stored is not None:
        raise ValueError(f"{stored}: {str(choices.images)!r} is a folder of pictures; `ldm data build` reads "
                         "pairs from it into a data set, which --images takes")  # fmt: skip
    return {"images": str(choices.images)}, _shards(choices, "pictures", choices.side)


def _own_shards(path: Path, side: int) -> dict[str, Any]:
    """The data of a built set: its split to train on, in its buckets if it has them."""
    manifest = Manifest.read(path)
    if manifest.cached is not None:
        raise ValueError(f"--images: {str(path)!r} holds cached latents; name the data set it was made from")
    split = "train" if "train" in manifest.splits else "all"
    told = {"kind": "shards", "path": str(path), "split": split, "size": side, "last": "wrap"}
    return told | ({"buckets": True} if all(s.bucket is not None for s in manifest.split(split)) else {})


def _shards(choices: Choices, name: str, side: int) -> dict[str, Any]:
    return {"kind": "shards", "path": str(choices.folder / "data" / name), "size": side, "last": "wrap"}


def _with_masks(data: Any) -> Any:
    """The data with the pair that weighs the loss, of each source."""
    if "sources" in data:
        return data | {"sources": [source | {"data": _with_masks(source["data"])} for source in data["sources"]]}
    weight = {LOSS_WEIGHT: {"kind": "stored", "channels": 1}}
    return data | {"pairs": data.get("pairs", {}) | weight}


def _run(choices: Choices, kind: str, own: dict[str, Any], data: Any, prompts: Sequence[str]) -> dict[str, Any]:
    steps = choices.steps if choices.steps is not None else STEPS[choices.method]
    words = choices.method in ("textual_inversion", "dreambooth_pivotal")
    task = {
        "kind": kind,
        "base": choices.base,
        "text_precision": choices.text_precision,
        "cache": str(choices.folder / "cache") if choices.cache else None,
        "gradient_checkpointing": choices.recompute,
        "samples": {"prompts": list(prompts), "every": choices.samples, "settings": choices.drawing},
    }
    if choices.options:  # whose share of dropped captions is none where a method says nothing
        usual = {"drop": 0.1 if kind == "ip_adapter" else 0.0}
        own = own | {"options": usual | own.get("options", {}) | choices.options}
    if choices.masks is not None:
        own = own | ({} if is_set(choices.images) else {"masks": choices.masks})
        data = _with_masks(data)
    return {
        "name": choices.called,
        "out": str(choices.folder),
        "seed": choices.seed,
        "task": task | own,
        "data": data,
        "train": {
            "steps": steps,
            "batch": choices.batch,
            "accumulate": choices.accumulate,
            "optim": {"lr": choices.rate, "weight_decay": 0.0 if words else 0.01} | choices.optim,
            "engine": {"zero_stage": choices.stage, "precision": choices.precision},
            "ema": None,
            "checkpoint": {"every": 100, "keep": 2},
        },
    }
