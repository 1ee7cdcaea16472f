"""The held-out samples of a run: another split, a folder of pictures, or a share of the run's own folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ldm.data.manifest import Manifest, resolve
from ldm.data.mixture import Data, main_source
from ldm.objectives.masked import LOSS_WEIGHT
from ldm.recipes.autoencoder import held_out
from ldm.recipes.picture_masks import WHITE
from ldm.recipes.pictures import is_set, prepare
from ldm.train.config import TrainConfig, ValidateConfig
from ldm.types import Batch


def share_of(train: TrainConfig, data: Data) -> float:
    """The share of a folder's pictures that is held out. Raises ValueError for data that would train on them too."""
    config = train.validate
    if config is None or not config.share:
        return 0.0
    source = main_source(data)
    if source.split != "train":
        raise ValueError(f"data.split: {source.split!r} holds the share train.validate.share too; write train")
    if config.split != "test":
        raise ValueError(f"train.validate.split: {config.split!r}; a share of a folder is the split test")
    return config.share


def held_out_batch(config: ValidateConfig, data: Data, captions: Sequence[str] | None, built: bool) -> Batch:
    """The samples that validate; `captions` of pictures that have none of their own, `built`: the data are no folder.

    Raises ValueError for what is not there.
    """
    if config.share and built:
        raise ValueError("train.validate.share: is of a folder of pictures (task.images); a built data set has splits")
    source = main_source(data)
    if config.images is not None:
        place = config.images
        if not place.is_dir():
            raise ValueError(f"train.validate.images: {str(place)!r}: no such folder")
        if not is_set(place):
            if config.path is None:
                raise ValueError("train.validate.path: missing; where the pictures of train.validate.images are "
                                 "prepared, such as ${out}/data/validation")  # fmt: skip
            masks = WHITE if LOSS_WEIGHT in source.pairs else None  # pictures that validate count whole
            prepare(place, config.path, captions, source.size, masks=masks)
            place = config.path
        source = replace(source, path=str(place), split="all")
        return held_out(source, "all", config.samples)
    splits = Manifest.read(resolve(source.path), source.remote).splits
    if config.split not in splits:
        raise ValueError(f"train.validate.split: {config.split!r} is none of {sorted(splits)}; validate a folder: "
                         "train.validate.images, or train.validate.share of the run's own")  # fmt: skip
    return held_out(data, config.split, config.samples)


def captions_of(task: Any) -> Sequence[str] | None:
    """What a method calls all its pictures, None where they have captions of their own."""
    if task.kind == "dreambooth":
        return [task.instance_prompt]
    return task.concepts[0].captions if task.kind == "textual_inversion" else None


def is_built(task: Any) -> bool:
    """Whether a task trains on a data set that is not written of a folder of pictures."""
    return task.kind != "textual_inversion" and getattr(task, "images", None) is None
