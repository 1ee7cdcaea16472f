"""The data of diffusers' scripts: folders of pictures, their captions, conditions and class pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.data.sources import CAPTION_FIELDS
from ldm.interop import common
from ldm.interop.scripts import Script
from ldm.interop.sheet import Sheet

_IMAGES = ("image", "file_name")


def read(sheet: Sheet, script: Script, out: Path, images: str | None) -> int | None:
    """Put `data` and the task's own part into the sheet; the samples of an epoch, None where they cannot be counted."""
    sheet.put("task.kind", script.method)
    folder = _folder(sheet, script, images)
    side = sheet.whole("resolution", 512)
    sheet.keep("resolution", "", side, "data.size")
    data: dict[str, Any] = {"kind": "shards", "path": "${out}/data/pictures", "size": side, "last": "wrap"}
    _crops(sheet, script, data)
    sheet.lacking("image_interpolation_mode", "not here: pictures are resized by Lanczos", ["lanczos"])
    for key, known in (("image_column", _IMAGES), ("caption_column", CAPTION_FIELDS)):
        if sheet.has(key) and sheet.text(key) not in known and script.method != "controlnet":
            sheet.refuse(key, f"{sheet.text(key)}: `ldm data build --{key.replace('_', '-')}` reads it into a data "
                         "set, which --images takes")  # fmt: skip
        sheet.leave("found by its usual name", key)
    own = {"dreambooth": _subject, "textual_inversion": _word, "controlnet": _conditioned}.get(script.method)
    if own is None:
        sheet.put("task.images", folder)
        sheet.put("data", data)
    else:
        own(sheet, folder, data, out)
    random = data.get("crop") == "random" or data.get("flip")
    sheet.put("task.cache", None if random else "${out}/cache")
    count = common.count(folder)
    if count is not None and script.method in ("textual_inversion", "dreambooth"):
        repeats = sheet.whole("repeats", 100 if script.method == "textual_inversion" else 1)
        count *= repeats
    sheet.leave("epochs alone are longer with it", "repeats")
    return count


def _folder(sheet: Sheet, script: Script, images: str | None) -> str:
    key = "instance_data_dir" if script.method == "dreambooth" else "train_data_dir"
    name = sheet.text("dataset_name")
    folder = images or sheet.text(key) or (name if Path(name).is_dir() else "")
    if name and folder and folder != name:
        sheet.leave(f"the pictures are in {folder}", "dataset_name")
    elif name and folder:
        sheet.keep("dataset_name", "", name, "task.images: a folder here")
    elif name:
        sheet.need(f"dataset_name: {name}: a hub's data set is not downloaded; download it and say --images FOLDER")
    else:
        if not folder:
            sheet.need(f"{key}: no folder of pictures; --images FOLDER tells it too")
    if sheet.has(key):
        sheet.keep(key, "", folder, "the pictures" if folder == sheet.text(key) else "instead, as it was asked for")
    return folder


def _crops(sheet: Sheet, script: Script, data: dict[str, Any]) -> None:
    center = sheet.flag("center_crop")
    if script.method == "controlnet":
        return  # theirs cuts the middle out, as here
    if script.method == "textual_inversion":
        data["flip"] = True  # theirs mirrors half of the pictures, whatever is asked
        data |= {} if center else {"fit": "stretch"}
        sheet.keep("center_crop", "data.fit", data.get("fit", "crop"), "" if center else "theirs stretches to a square")
        return
    data["crop"] = "center" if center else "random"
    sheet.keep("center_crop", "data.crop", data["crop"])
    if sheet.flag("random_flip"):
        data["flip"] = True
        sheet.keep("random_flip", "data.flip", True)
    sheet.leave("off", "random_flip")


def _subject(sheet: Sheet, folder: str, data: dict[str, Any], out: Path) -> None:
    """DreamBooth: the subject, and with prior preservation class pictures."""
    prompt = sheet.text("instance_prompt")
    words = prompt.split()
    if not words:
        sheet.need("instance_prompt: missing")
        words = ["sks", "thing"]
    sheet.put("task.images", folder)
    sheet.put("task.identifier", words[-2] if len(words) > 1 else words[-1])
    sheet.put("task.noun", words[-1])
    sheet.keep("instance_prompt", "task.prompt", prompt)
    subject = data | {"path": "${out}/data/subject"}
    if not sheet.flag("with_prior_preservation"):
        sheet.put("task.prior", None)
        sheet.put("data", subject)
        sheet.leave("without prior preservation", "with_prior_preservation", "class_data_dir", "class_prompt",
                    "num_class_images", "prior_loss_weight", "sample_batch_size")  # fmt: skip
        return
    prior: dict[str, Any] = {"prompt": sheet.text("class_prompt"), "count": sheet.whole("num_class_images", 100)}
    settings = common.drawing(sheet.tree["task"].get("base") or "emoji") | {
        "batch": sheet.whole("sample_batch_size", 4)
    }
    prior["settings"] = settings
    if sheet.has("class_data_dir"):
        prior["folder"] = sheet.text("class_data_dir")
        sheet.keep("class_data_dir", "", prior["folder"], "task.prior.folder")
    sheet.keep("class_prompt", "", prior["prompt"], "task.prior.prompt")
    sheet.keep("num_class_images", "", prior["count"], "task.prior.count")
    sheet.keep("sample_batch_size", "", prior["settings"]["batch"], "task.prior.settings.batch")
    sheet.keep("with_prior_preservation", "task.prior", prior)
    weight = sheet.number("prior_loss_weight", 1.0)
    class_data = data | {"path": "${out}/data/class"}
    sources = [{"data": subject}, {"data": class_data, "weight": weight}]
    sheet.put("data", {"kind": "mixture", "sources": sources})
    sheet.keep("prior_loss_weight", "", weight, "data.sources[1].weight")


def _word(sheet: Sheet, folder: str, data: dict[str, Any], out: Path) -> None:
    """Textual inversion."""
    token = sheet.text("placeholder_token")
    if not token:
        sheet.need("placeholder_token: missing")
    vectors = sheet.whole("num_vectors", 1)
    learn = sheet.text("learnable_property", "object")
    concept = {"token": token, "vectors": vectors, "initializer": sheet.text("initializer_token").split(),
               "images": folder, "learn": learn}  # fmt: skip
    sheet.put("task.concepts", [concept])
    sheet.put("task.max_norm", 0.0)  # theirs has no bound
    sheet.put("data", data | {"path": "${out}/data/subject"})
    sheet.keep("placeholder_token", "", token, "task.concepts[0].token")
    sheet.keep("initializer_token", "", concept["initializer"], "task.concepts[0].initializer")
    sheet.keep("num_vectors", "", vectors, "task.concepts[0].vectors")
    sheet.near("learnable_property", "", learn, "task.concepts[0].learn: templates of other words than theirs")


def _conditioned(sheet: Sheet, folder: str, data: dict[str, Any], out: Path) -> None:
    """ControlNet: pictures and conditions are built into a data set first."""
    place = (out / "data" / "pictures").as_posix()
    column = sheet.text("conditioning_image_column", "conditioning_image")
    command = f'ldm data build "{folder}" {place} --size {data["size"]} --pair condition={column}'
    for key, known in (("image_column", "image"), ("caption_column", "text")):
        if sheet.text(key, known) != known:
            command += f" --{key.replace('_', '-')} {sheet.text(key)}"
    sheet.before.append(command)
    sheet.keep("conditioning_image_column", "", column, "ldm data build --pair")
    sheet.put("data", data | {"pairs": {"condition": {"kind": "stored"}}})
    start = sheet.text("controlnet_model_name_or_path") or None
    sheet.keep("controlnet_model_name_or_path", "task.start", start)


def conditions(sheet: Sheet, prompts: list[str]) -> list[str]:
    """The prompts of a ControlNet's samples, with a picture each: one of either stands for all of the other."""
    pictures = sheet.texts("validation_image")
    if len(pictures) == 1:
        pictures = pictures * max(1, len(prompts))
    if len(prompts) == 1:
        prompts = prompts * len(pictures)
    sheet.put("task.conditions", pictures)
    if sheet.has("validation_image"):
        sheet.keep("validation_image", "task.conditions", pictures)
    return prompts
