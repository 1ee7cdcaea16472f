"""ai-toolkit's `datasets`: folders, each in one or several resolutions, in buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.interop import common
from ldm.interop.sheet import Sheet
from ldm.objectives.masked import LOSS_WEIGHT

_LEFT = ("cache_latents", "cache_latents_to_disk", "type", "cache_clip_vision_to_disk", "num_frames",
         "cache_text_embeddings", "num_workers", "prefetch_factor", "shrink_video_to_frames", "do_i2v",
         "fps")  # fmt: skip
_LACKING: dict[str, tuple[Any, ...]] = {
    "default_caption": ("captions of pictures without any: write them into files",),
    "random_triggers": ("not here",),
    "random_scale": ("not here",),
    "scale": ("not here", 1),
    "network_weight": ("not here", 1),
    "flip_y": ("not here",),
    "augments": ("augmentation: not here",),
    "augmentations": ("augmentation: not here",),
    "shuffle_augmentations": ("augmentation: not here",),
    "control_path": ("conditions: `ldm data build --pair`, `ldm finetune controlnet`",),
    "control_path_1": ("conditions: not here",),
    "control_path_2": ("conditions: not here",),
    "control_path_3": ("conditions: not here",),
    "controls": ("conditions: not here",),
    "inpaint_path": ("not here",),
    "invert_mask": ("masks are white where is learned here: invert the files",),
    "unconditional_path": ("not here",),
    "poi": ("not here",),
    "clip_image_path": ("not here",),
}


@dataclass
class Source:
    """Whether theirs caches latents, and what makes caches of no use."""

    cached: bool = False
    changes: str = ""


def read(sheet: Sheet, datasets: Sequence[Mapping[str, Any]], out: Path, trigger: str, images: str | None) -> Source:
    """Put `data` into the sheet: a set for each folder and resolution, built by commands that come before."""
    datasets = [dict(d) for d in datasets]
    if images is not None:
        datasets = [dict(datasets[0] if datasets else {}, folder_path=images)]
    if not datasets:
        sheet.need("datasets: no folder of pictures; --images FOLDER tells it too")
        return Source()
    source = Source(cached=any(d.get("cache_latents") or d.get("cache_latents_to_disk") for d in datasets))
    drops = {float(d.get("caption_dropout_rate", 0.0)) for d in datasets}
    if len(drops) > 1:
        sheet.refuse("datasets.caption_dropout_rate", f"{sorted(drops)}: one share for all folders here")
    sheet.put("task.options.drop", max(drops))
    parts, weights = [], []
    masked = [bool(d.get("alpha_mask") or d.get("mask_path")) for d in datasets]
    if any(masked) and not all(masked):
        sheet.refuse("datasets.mask_path", "some folders have masks and some have none: all or none here")
    least = {float(d.get("mask_min_value", 0.0)) for d in datasets} if any(masked) else {0.0}
    if len(least) > 1:
        sheet.refuse("datasets.mask_min_value", f"{sorted(least)}: one weight outside for all folders here")
    if all(masked):
        common.masked(sheet, outside=max(least), normalize=True)
    for number, dataset in enumerate(datasets):
        told = Sheet(sheet.program, {f"datasets[{number}].{k}": v for k, v in dataset.items()})
        made = _parts(told, f"datasets[{number}].", dataset, trigger, out, len(parts))
        parts += made
        weights += [bool(dataset.get("is_reg"))] * len(made)
        told.leave("with task.cache, or of other kinds of data", *[f"datasets[{number}].{k}" for k in _LEFT])
        for key, (why, *neutral) in _LACKING.items():
            told.lacking(f"datasets[{number}].{key}", why, neutral)
        done = told.done()
        sheet.rows += done.rows
        sheet.before += done.before
    _trigger(sheet, trigger)
    source.changes = ", ".join(name for name in ("tags", "crop") if any(name in p for p in parts))
    if any(weights):
        sheet.refuse("datasets.is_reg", "pictures of the class: `ldm finetune dreambooth` has them, in equal shares")
    mixed = [{"data": p, "share": "size"} for p in parts]
    sheet.put("data", parts[0] if len(parts) == 1 else {"kind": "mixture", "per": "batch", "sources": mixed})
    return source


def _parts(
    sheet: Sheet, at: str, dataset: Mapping[str, Any], trigger: str, out: Path, first: int
) -> list[dict[str, Any]]:
    """One folder's sets, one for each resolution."""
    key = "dataset_path" if dataset.get("dataset_path") and not dataset.get("folder_path") else "folder_path"
    folder = sheet.text(at + key)
    if not folder:
        raise ValueError(f"{sheet.program}: {at}folder_path: missing")
    sheet.keep(at + key, "", folder, "built by the commands before")
    sheet.leave("folder_path is the one that counts", at + "dataset_path")
    sizes = sorted({int(float(v)) for v in sheet.texts(at + "resolution")} or {512})
    sheet.keep(at + "resolution", "", sizes, "a data set for each" if len(sizes) > 1 else "data.size")
    extension = sheet.text(at + "caption_ext", "txt").lstrip(".").lower()
    if extension not in ("txt", "caption"):
        sheet.refuse(at + "caption_ext", f".{extension}: captions are in .txt or .caption here; rename the files")
    sheet.leave("both .txt and .caption are read", at + "caption_ext", at + "caption_type")
    tail: dict[str, Any] = {"last": "wrap"}
    buckets = sheet.flag(at + "buckets", True)
    tail |= {"buckets": True} if buckets else {}
    sheet.keep(at + "buckets", "", buckets, "ldm data build --buckets")
    repeats = sheet.whole(at + "num_repeats", 1)
    tail |= {"repeats": repeats} if repeats > 1 else {}
    sheet.keep(at + "num_repeats", "", repeats, "data.repeats")
    for name, ours in (("flip_x", {"flip": True}), ("random_crop", {"crop": "random"})):
        if sheet.flag(at + name):
            tail |= ours
            sheet.keep(at + name, "", True, f"data.{next(iter(ours))}")
        sheet.leave("off", at + name)
    shuffle, rate = sheet.flag(at + "shuffle_tokens"), sheet.number(at + "token_dropout_rate")
    if shuffle or rate:
        keep = sheet.whole(at + "keep_tokens", 0)
        tail["tags"] = {"separator": ",", "shuffle": shuffle, "keep": keep, "dropout": rate}
        sheet.keep(at + "shuffle_tokens", "", shuffle, "data.tags.shuffle")
        sheet.keep(at + "token_dropout_rate", "", rate, "data.tags.dropout")
    sheet.leave("data.tags.keep", at + "keep_tokens")
    sheet.leave("off", at + "shuffle_tokens", at + "is_reg", at + "token_dropout_rate")
    drop = sheet.number(at + "caption_dropout_rate")
    sheet.keep(at + "caption_dropout_rate", "", drop, "task.options.drop")
    masks = _masks(sheet, at, dataset, tail)
    word = sheet.text(at + "trigger_word") or trigger
    tail |= {"trigger": word} if word else {}
    sheet.keep(at + "trigger_word", "", word, "data.trigger")
    step = sheet.whole(at + "bucket_tolerance", 64)
    sheet.leave("ldm data build --bucket-step", at + "bucket_tolerance")
    parts = []
    for i, size in enumerate(sizes, start=first):
        place = (out / "data" / str(i)).as_posix()
        how = (
            f"--buckets {size} --bucket-step {step} --bucket-ratio 4 --bucket-least 1" if buckets else f"--size {size}"
        )
        sheet.before.append(f'ldm data build "{folder}" {place} {how}{masks}')
        parts.append({"kind": "shards", "path": f"${{out}}/data/{i}", "size": size} | tail)
    return parts


def _masks(sheet: Sheet, at: str, dataset: Mapping[str, Any], tail: dict[str, Any]) -> str:
    """The masked loss of a folder, and the option that reads its masks."""
    where = "alpha" if dataset.get("alpha_mask") else dataset.get("mask_path")
    if not where:
        sheet.leave("of masks", at + "mask_min_value")
        return ""
    key = at + ("alpha_mask" if dataset.get("alpha_mask") else "mask_path")
    sheet.keep(key, "", where, "task.options.mask, divided by the mask's mean as theirs is")
    sheet.keep(at + "mask_min_value", "", sheet.number(at + "mask_min_value"), "task.options.mask.outside")
    tail["pairs"] = {LOSS_WEIGHT: {"kind": "stored", "channels": 1}}
    return common.masks(str(where))


def _trigger(sheet: Sheet, trigger: str) -> None:
    """A word for [trigger] in a caption, or before one that lacks it; theirs and ours are one rule."""
    if trigger:
        sheet.keep("trigger_word", "", trigger, "data.trigger")
    else:
        sheet.leave("none", "trigger_word")
