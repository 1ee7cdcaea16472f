"""sd-scripts' data: `dataset_config` (general, datasets, subsets), or the folders that its arguments name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.sources import folder_repeats
from ldm.interop import common
from ldm.interop.prompts import read_prompts, samples_of
from ldm.interop.sheet import Sheet

OF_DATASET = ("resolution", "batch_size", "enable_bucket", "bucket_reso_steps", "min_bucket_reso", "max_bucket_reso",
              "bucket_no_upscale", "skip_image_resolution", "network_multiplier", "validation_split",
              "validation_seed")  # fmt: skip
HOLDING = ("general", "datasets")
_LACKING = {
    "bucket_no_upscale": "pictures that stay small: not here, all are brought to their bucket's size",
    "skip_image_resolution": "not here; `ldm data build --min-side` leaves small pictures out",
    "face_crop_aug_range": "crops around faces: not here",
    "token_warmup_min": "tags that come by and by: not here",
    "token_warmup_step": "tags that come by and by: not here",
    "caption_dropout_every_n_epochs": "not here; task.options.drop is a share",
    "metadata_file": "its file of all captions: not here; write them beside the pictures, or into a metadata.jsonl",
    "in_json": "its file of all captions: not here; write them beside the pictures, or into a metadata.jsonl",
    "resize_interpolation": "not here",
    "network_multiplier": "not here",
    "custom_attributes": "not here",
    "dataset_class": "not here",
}
_MET: dict[str, tuple[Any, ...]] = {"token_warmup_min": (1,), "token_warmup_step": (0,), "network_multiplier": (1,)}
_LEFT = ("cache_info", "validation_seed")
MASKS = ("alpha_mask", "conditioning_data_dir", "masked_loss")
"""Of a masked loss."""
_TAGS = ("keep_tokens_separator", "secondary_separator", "enable_wildcard", "color_aug", "validation_split")
"""Of captions and pictures, beside those that the readers name."""


@dataclass(frozen=True)
class Subset:
    """A folder with the settings that hold for it, its own over its data set's over the general ones."""

    folder: str
    settings: Mapping[str, Any]
    dataset: int
    legacy: bool = False

    def on(self, key: str) -> bool:
        """Whether a setting is on."""
        return str(self.settings.get(key, False)).lower() in ("true", "1")

    @property
    def reg(self) -> bool:
        """Whether its pictures are of the class, for regularisation."""
        return self.on("is_reg")

    @property
    def masks(self) -> str | None:
        """Where the masks of its pictures are, alpha or a folder, with a masked loss."""
        if self.on("alpha_mask"):
            return "alpha"
        return self.settings.get("conditioning_data_dir") or None

    @property
    def repeats(self) -> int:
        """How often its pictures come beside those that its name tells."""
        return int(self.settings.get("num_repeats", 1))

    @property
    def count(self) -> int | None:
        """Pictures an epoch, None where the folder is not here."""
        found = common.count(self.folder)
        return None if found is None else found * self.repeats


@dataclass
class Source:
    """What the rest needs of the data: the batch, pictures an epoch, and what makes caches of no use."""

    batch: int = 1
    pictures: int | None = None
    changes: str = ""
    remark: str = ""
    subsets: list[Subset] = field(default_factory=list)


def read(sheet: Sheet, data: Mapping[str, Any] | None, out: Path, *, images: str | None, inversion: bool) -> Source:
    """Put `data` and what it takes of `task` into the sheet."""
    subsets = _subsets(sheet, data, images)
    if not subsets:
        sheet.need("no folder of pictures: train_data_dir or dataset_config, or --images FOLDER")
        return Source()
    source = Source(subsets=subsets)
    batches = {int(s.settings.get("batch_size", sheet.whole("train_batch_size", 1))) for s in subsets}
    source.batch = max(batches)
    if len(batches) > 1:
        sheet.refuse("dataset_config", f"batch_size {sorted(batches)}: one batch for all data sets here")
    _checks(sheet, subsets)
    _masks(sheet, subsets)
    source.pictures = _pictures(subsets)
    drops = {float(s.settings.get("caption_dropout_rate", 0.0)) for s in subsets if not s.reg}
    if len(drops) > 1:
        sheet.refuse("caption_dropout_rate", f"{sorted(drops)}: one share for all folders here")
    _row(sheet, subsets, "caption_dropout_rate", "task.options.drop", max(drops, default=0.0))
    sheet.put("task.options.drop", max(drops, default=0.0))
    changing = ("shuffle_caption", "random_crop", "enable_wildcard", "color_aug")
    source.changes = ", ".join(k for k in changing if any(s.on(k) for s in subsets))
    if inversion:
        _inversion(sheet, subsets, out)
    else:
        _put(sheet, subsets, out, source)
    _explained(sheet, subsets)
    return source


def _subsets(sheet: Sheet, data: Mapping[str, Any] | None, images: str | None) -> list[Subset]:
    """All folders with their settings; arguments of the command line hold where the file says nothing."""
    known = {*OF_DATASET, *_LACKING, *_LEFT, *MASKS, *_TAGS, "caption_extension", "shuffle_caption", "keep_tokens",
             "flip_aug", "random_crop", "caption_dropout_rate", "caption_tag_dropout_rate", "caption_prefix",
             "caption_suffix", "caption_separator", "caption_extention", "class_tokens"}  # fmt: skip
    own = {k: v for k, v in sheet.given.items() if k in known}
    if "dataset_repeats" in sheet.given:
        own["num_repeats"] = sheet.whole("dataset_repeats", 1)
    sheet.told("dataset_config", "train_data_dir", "reg_data_dir", *own, "dataset_repeats")
    if images is not None:
        return [Subset(images, own, 0, legacy=True)]
    if data is None:
        folders = [(sheet.text("train_data_dir"), False), (sheet.text("reg_data_dir"), True)]
        return [Subset(f, own | {"is_reg": reg}, 0, legacy=True) for f, reg in folders if f]
    if extra := sorted(set(data) - set(HOLDING)):
        raise ValueError(f"{sheet.program}: {extra[0]!r}: a file of data sets has general and datasets")
    general, found = dict(data.get("general") or {}), []
    datasets: list[dict[str, Any]] = list(data.get("datasets") or [])
    for i, dataset in enumerate(datasets):
        above = own | general | {k: v for k, v in dataset.items() if k != "subsets"}
        for subset in dataset.get("subsets") or []:
            settings = above | subset
            found.append(Subset(str(settings.pop("image_dir", "")), settings, i))
    return found


def _masks(sheet: Sheet, subsets: Sequence[Subset]) -> None:
    """The masked loss: theirs multiplies by the mask and takes the mean of all places."""
    if not any(s.masks or s.on("masked_loss") for s in subsets):
        return
    key = next((k for k in MASKS if any(k in s.settings for s in subsets)), "masked_loss")
    own = [s for s in subsets if not s.reg]
    if not all(s.masks for s in own):
        sheet.refuse(key, "some folders have no masks (alpha_mask, conditioning_data_dir): all or none here")
        return
    if any(s.settings.get("conditioning_data_dir") for s in own) and not any(s.on("masked_loss") for s in own):
        sheet.refuse("conditioning_data_dir", "without masked_loss it is of ControlNets: `ldm finetune controlnet`")
        return
    common.masked(sheet)
    _row(sheet, subsets, key, "task.options.mask", "the mask's mean over each latent pixel")


def _checks(sheet: Sheet, subsets: Sequence[Subset]) -> None:
    """Refuse what is not here, once for each key; and keys that nobody knows."""
    known = {*OF_DATASET, *_LACKING, *_LEFT, *MASKS, *_TAGS, "num_repeats", "caption_extension", "caption_extention",
             "class_tokens", "is_reg", "shuffle_caption", "keep_tokens", "flip_aug", "random_crop",
             "caption_dropout_rate", "caption_tag_dropout_rate", "caption_prefix", "caption_suffix",
             "caption_separator"}  # fmt: skip
    for key in dict.fromkeys(k for s in subsets for k in s.settings):
        values = [s.settings[key] for s in subsets if key in s.settings]
        off = all(v in (None, False, "", []) or v in _MET.get(key, ()) for v in values)
        if key not in known:
            sheet.refuse(key, "not known here")
        elif key in _LACKING and not off:
            sheet.refuse(key, _LACKING[key])
    for subset in subsets:
        extension = str(subset.settings.get("caption_extension", ".caption")).lower().lstrip(".")
        if extension not in ("txt", "caption"):
            sheet.refuse("caption_extension", f".{extension}: captions are in .txt or .caption here; rename the files")
        if not subset.folder:
            sheet.need("a subset has no image_dir")
        named = folder_repeats(Path(subset.folder).name) if not subset.legacy else None
        if named is not None and len(subsets) > 1:
            sheet.refuse("image_dir", f"{subset.folder}: its name would be read as {named[0]} repeats here, which "
                         "theirs does not; rename the folder")  # fmt: skip


def _pictures(subsets: Sequence[Subset]) -> int | None:
    """Samples an epoch; with pictures of the class as many of them again."""
    counts = [s.count for s in subsets if not s.reg]
    if any(c is None for c in counts):
        return None
    total = sum(c for c in counts if c is not None)
    return 2 * total if any(s.reg for s in subsets) else total


def _side(sheet: Sheet, subset: Subset) -> int:
    """The side of the pictures, of which "512", "512,512" and [512, 512] all tell."""
    value = subset.settings.get("resolution", 512)
    parts = [
        int(v) for v in (value if isinstance(value, (list, tuple)) else re.split(r"[,x ]+", str(value).strip("()[] ")))
    ]
    if len(set(parts)) > 1:
        sheet.refuse("resolution", f"{value}: sides of one length here, or buckets of such an area")
    return parts[0]


def _one(sheet: Sheet, subset: Subset, path: str) -> dict[str, Any]:
    """A folder's part of `data`."""
    settings = subset.settings
    found: dict[str, Any] = {"kind": "shards", "path": path, "size": _side(sheet, subset), "last": "wrap"}
    found |= {"buckets": True} if subset.on("enable_bucket") else {}
    found |= {"flip": True} if subset.on("flip_aug") else {}
    found |= {"crop": "random"} if subset.on("random_crop") else {}
    found |= {"repeats": subset.repeats} if subset.repeats > 1 else {}
    drop, shuffle = float(settings.get("caption_tag_dropout_rate", 0.0)), subset.on("shuffle_caption")
    before, after = (str(settings.get(f"caption_{end}") or "") for end in ("prefix", "suffix"))
    if shuffle or drop:
        tags = {
            "separator": settings.get("caption_separator", ","),
            "shuffle": shuffle,
            "keep": int(settings.get("keep_tokens", 0)),
            "dropout": drop,
        }
        more = {
            "prefix": before,
            "suffix": after,
            "keep_separator": settings.get("keep_tokens_separator"),
            "secondary": settings.get("secondary_separator"),
        }
        found["tags"] = tags | {k: str(v) for k, v in more.items() if v}
    elif before or after:
        found["template"] = f"{before + ' ' if before else ''}{{}}{' ' + after if after else ''}"
    if "mask" in sheet.tree.get("task", {}).get("options", {}):
        found["pairs"] = common.masked(sheet)
    found |= {"wildcards": True} if subset.on("enable_wildcard") else {}
    found |= {"colour": 0.05} if subset.on("color_aug") else {}
    return found | _uncaptioned(sheet, subset)


def _uncaptioned(sheet: Sheet, subset: Subset) -> dict[str, Any]:
    """`class_tokens`, which theirs takes for pictures without a caption file."""
    words = subset.settings.get("class_tokens")
    if not words or subset.legacy:
        return {}
    have = common.captioned(subset.folder)
    if have is None:
        sheet.refuse("class_tokens", f"{subset.folder}: not here, so nobody knows if its pictures have captions")
    elif have[0] and have[1]:
        sheet.refuse("class_tokens", f"{subset.folder}: {have[0]} pictures have captions, {have[1]} have none; "
                     f"write {words!r} into files beside these")  # fmt: skip
    elif have[1]:
        return {"template": f"{words}{{}}", "require_captions": False}
    return {}


def _put(sheet: Sheet, subsets: Sequence[Subset], out: Path, source: Source) -> None:
    """One folder trains as it is found; several, and buckets, are built first."""
    first = subsets[0]
    plain = not first.on("enable_bucket") and not _uncaptioned(Sheet(sheet.program, {}), first)
    if len(subsets) == 1 and plain:
        sheet.put("task.images", first.folder)
        sheet.put("data", _one(sheet, first, "${out}/data/pictures"))
        if "pairs" in sheet.tree["data"]:
            sheet.put("task.masks", first.masks)
        return
    parts = []
    for i, subset in enumerate(subsets):
        one = _one(sheet, subset, f"${{out}}/data/{i}")
        sheet.before.append(_build(sheet, subset, one, (out / "data" / str(i)).as_posix()))
        parts.append(one)
    if len(parts) == 1:
        sheet.put("data", parts[0])
        source.remark = "; buckets make a few batches more" if parts[0].get("buckets") else ""
        return
    weight = sheet.number("prior_loss_weight", 1.0)
    shares = _shares(sheet, subsets)
    sources = [{"data": p, "share": share} | ({"weight": weight} if s.reg else {})
               for p, s, share in zip(parts, subsets, shares, strict=True)]  # fmt: skip
    apart = any(p.get("buckets") for p in parts) or len({p["size"] for p in parts}) > 1
    sheet.put("data", {"kind": "mixture", "per": "batch" if apart else "sample", "sources": sources})
    if apart:
        sheet.near(
            "dataset_config", "data.per", "batch", "each batch is of one folder; theirs mixes a data set's folders"
        )
    if any(s.reg for s in subsets):
        sheet.keep("prior_loss_weight", "", weight, "weight of the class pictures' source")


def _shares(sheet: Sheet, subsets: Sequence[Subset]) -> list[Any]:
    """By size; pictures of the class come as often as all others together."""
    if not any(s.reg for s in subsets):
        return ["size"] * len(subsets)
    counts = [s.count or 0 for s in subsets]
    own = [c for c, s in zip(counts, subsets, strict=True) if not s.reg]
    classes = [c for c, s in zip(counts, subsets, strict=True) if s.reg]
    if len(own) == 1 and len(classes) == 1:
        return [1, 1]
    if 0 in counts:
        sheet.need("is_reg: the shares of several folders are counted, and not all of them are here")
        return [1] * len(subsets)
    scaled = [c * (sum(own) if s.reg else sum(classes)) for c, s in zip(counts, subsets, strict=True)]
    divisor = math.gcd(*scaled)
    return [c // divisor for c in scaled]


def _build(sheet: Sheet, subset: Subset, one: Mapping[str, Any], place: str) -> str:
    """The command that makes a folder's data set."""
    command = f'ldm data build "{subset.folder}" {place}'
    side = one["size"]
    if "require_captions" in one:
        command += " --without-captions"
    if "pairs" in one:  # class pictures are opaque
        command += common.masks(subset.masks or "alpha")
    if not one.get("buckets"):
        return f"{command} --size {side}"
    step = int(subset.settings.get("bucket_reso_steps", 64))
    least, most = int(subset.settings.get("min_bucket_reso", 256)), int(subset.settings.get("max_bucket_reso", 1024))
    ratio = max(1.0, min((most / side) ** 2, (side / least) ** 2))  # the longest whose sides lie between the two
    if side % step:
        sheet.refuse("bucket_reso_steps", f"{step}: no divisor of the resolution {side}")
    return f"{command} --buckets {side} --bucket-step {step} --bucket-ratio {ratio:g} --bucket-least 1"


def _inversion(sheet: Sheet, subsets: Sequence[Subset], out: Path) -> None:
    if len(subsets) > 1:
        sheet.refuse("dataset_config", "several folders for one word: one here")
    concepts = sheet.tree["task"]["concepts"]
    concepts[0]["images"] = subsets[0].folder
    one = _one(sheet, subsets[0], "${out}/data/subject")
    if one.pop("buckets", None):
        sheet.near("enable_bucket", "data.buckets", False, "new words train on squares here")
    for key in ("tags", "template", "require_captions"):
        one.pop(key, None)  # templates are the captions
    sheet.put("data", one)


def _row(sheet: Sheet, subsets: Sequence[Subset], key: str, ours: str, value: Any, note: str = "") -> None:
    """A row for a key that some folder sets."""
    if any(key in s.settings for s in subsets):
        own = Sheet(sheet.program, {key: next(s.settings[key] for s in subsets if key in s.settings)})
        own.keep(key, "", value, note)
        row = own.rows[0]
        sheet.rows.append(type(row)(row.key, row.value, "kept", ours, row.given, note))
    sheet.told(key)


def _explained(sheet: Sheet, subsets: Sequence[Subset]) -> None:
    """Rows of what the folders' settings became."""
    where = "data" if len(subsets) == 1 else "data.sources"
    refused = {row.key for row in sheet.rows}

    def first(key: str) -> Any:
        return next((s.settings[key] for s in subsets if key in s.settings), None)

    sheet.rows += [_told(sheet, "image_dir", s.folder, "class pictures" if s.reg else "pictures") for s in subsets]
    for key, ours, note in (
        ("resolution", "size", ""),
        ("num_repeats", "repeats", ""),
        ("flip_aug", "flip", ""),
        ("random_crop", "crop", ""),
        ("shuffle_caption", "tags.shuffle", ""),
        ("keep_tokens", "tags.keep", "of shuffled captions"),
        ("caption_tag_dropout_rate", "tags.dropout", ""),
        ("caption_separator", "tags.separator", ""),
        ("caption_prefix", "template", "with shuffled tags data.tags.prefix"),
        ("caption_suffix", "template", "with shuffled tags data.tags.suffix"),
        ("keep_tokens_separator", "tags.keep_separator", "of shuffled captions"),
        ("secondary_separator", "tags.secondary", "of shuffled captions"),
        ("enable_wildcard", "wildcards", ""),
        ("class_tokens", "template", "of pictures that have no captions"),
        ("enable_bucket", "buckets", "the data set is built first"),
        ("bucket_reso_steps", "", "ldm data build --bucket-step"),
        ("min_bucket_reso", "", "ldm data build --bucket-ratio"),
        ("max_bucket_reso", "", "ldm data build --bucket-ratio"),
        ("caption_extension", "", "both .txt and .caption are read"),
    ):
        if key not in refused:
            _row(sheet, subsets, key, f"{where}.{ours}" if ours else "", first(key), note)
    if any(s.on("color_aug") for s in subsets):
        sheet.near("color_aug", "", 0.05, f"{where}.colour: brightness, contrast and saturation at every step; theirs "
                   "turns the hue, and changes gamma in a third of the pictures")  # fmt: skip
    sheet.told("color_aug")


def _told(sheet: Sheet, key: str, value: str, note: str) -> Any:
    own = Sheet(sheet.program, {key: value})
    own.keep(key, "", value, note)
    return own.rows[0]


def prompts(sheet: Sheet, settings: dict[str, Any]) -> dict[str, Any]:
    """The prompts of a file, with settings of their own; what all of them set alike goes into `settings`."""
    key = "sample_prompts"
    path = sheet.text(key)
    if not path:
        return {"prompts": []}
    if not Path(path).is_file():
        sheet.near(key, "", None, "its file is not here; write task.samples.prompts")
        return {"prompts": []}
    read = read_prompts(Path(path))
    found = samples_of(read)
    settings |= found.pop("settings")
    odd = sorted({o for p in read for o in p.odd})
    note = f"{', '.join(odd)} of single prompts are left out: not known here" if odd else ""
    sheet.keep(key, "task.samples.prompts", found["prompts"], note, "near" if odd else "kept")
    return found


def validation(sheet: Sheet, source: Source, batch: int, accumulate: int) -> None:
    """`validation_split`: a share of the folder, whose loss is measured at fixed times."""
    shares = {float(s.settings.get("validation_split") or 0) for s in source.subsets}
    share, every = max(shares, default=0.0), 0
    if not share:
        sheet.leave("no validation_split", "validate_every_n_steps", "validate_every_n_epochs", "validation_split")
        return
    if len(source.subsets) > 1 or sheet.tree["task"].get("images") is None:
        sheet.refuse("validation_split", f"{share:g}: of one folder without buckets here; build the data with a split "
                     "test (ldm data build --split), and write train.validate")  # fmt: skip
        return
    if sheet.has("validate_every_n_steps"):
        every = sheet.whole("validate_every_n_steps")
    elif source.pictures:
        every = sheet.whole("validate_every_n_epochs", 1) * common.epoch(source.pictures, batch, accumulate)
    sheet.put("train.validate", {"share": share, "every": every, "times": 8})
    sheet.told("validation_split")
    own = Sheet(sheet.program, {"validation_split": share})
    own.near("validation_split", "", share, "train.validate.share, at eight fixed times; theirs takes four others")
    row = own.rows[0]
    sheet.rows.append(type(row)(row.key, row.value, "near", "train.validate.share", row.given, row.note))
    for key in ("validate_every_n_steps", "validate_every_n_epochs"):
        if sheet.has(key):
            sheet.keep(key, "", every, "train.validate.every")
