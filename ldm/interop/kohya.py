"""kohya's sd-scripts: the arguments of its training scripts, as a command line or a `--config_file`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.interop import common, kohya_adapter, kohya_blocks, kohya_data, kohya_loss
from ldm.interop.kohya_keys import LACKING, LEFT_OUT
from ldm.interop.sheet import Converted, Sheet

NAME = "kohya's sd-scripts"
SCRIPTS = {
    "train_network.py": ("sd", "lora"),
    "sdxl_train_network.py": ("sdxl", "lora"),
    "sd3_train_network.py": ("sd3", "lora"),
    "flux_train_network.py": ("flux", "lora"),
    "train_db.py": ("sd", "full"),
    "fine_tune.py": ("sd", "full"),
    "sdxl_train.py": ("sdxl", "full"),
    "sd3_train.py": ("sd3", "full"),
    "flux_train.py": ("flux", "full"),
    "train_textual_inversion.py": ("sd", "inversion"),
    "sdxl_train_textual_inversion.py": ("sdxl", "inversion"),
}
"""Its scripts: the family that they train, and how."""
MODULES = {"networks.lora": "", "networks.lora_fa": "", "networks.lora_flux": "flux", "networks.lora_sd3": "sd3",
           "lycoris.kohya": ""}  # fmt: skip
PARTS = ("clip_l", "clip_g", "t5xxl", "ae")
BLOCKS = ["attention", "feed_forward", "projection"]
"""What its LoRA corrects of a U-Net; with conv_dim the resnets too."""


TEXT_RATES = ("text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2", "learning_rate_te", "learning_rate_te1",
              "learning_rate_te2")  # fmt: skip
"""Its rates of text encoders."""


LORA_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")


def flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `--config_file`: its sections are for the eye, and their keys are one list."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= value if isinstance(value, dict) else {key: value}
    return found


def convert(
    given: Mapping[str, Any],
    data: Mapping[str, Any] | None,
    script: str = "",
    *,
    launcher: Mapping[str, Any] | None = None,
    images: str | None = None,
    base: str | None = None,
) -> Converted:
    """The config of its arguments and of the data set that `dataset_config` names.

    `images` and `base` are given otherwise, instead of theirs. Raises ValueError for what no run can do without.
    """
    sheet = Sheet(NAME, {**(launcher or {}), **given})
    processes = sheet.whole("num_processes", 1)
    sheet.leave("counted into train.batch", "num_processes")
    family, how = SCRIPTS.get(script, ("", ""))
    family = family or _family(sheet)
    how = how or ("inversion" if sheet.has("token_string") else "lora" if sheet.has("network_module") else "full")
    out = Path(sheet.text("output_dir", "runs")) / sheet.text("output_name", "last")
    sheet.keep("output_dir", "out", out.as_posix())
    sheet.keep("output_name", "name", out.name)
    model = _base(sheet, base)
    sheet.put("task.kind", "textual_inversion" if how == "inversion" else "finetune")
    text = _adapter(sheet, how, family)
    rate = _rates(sheet, how, text)
    source = kohya_data.read(sheet, data, out, images=images, inversion=how == "inversion")
    batch, accumulate = source.batch, sheet.whole("gradient_accumulation_steps", 1)
    sheet.keep("train_batch_size", "train.batch", batch * accumulate * processes,
               f"{batch} x {accumulate} accumulated x {processes} process(es)")  # fmt: skip
    sheet.keep("gradient_accumulation_steps", "train.accumulate", accumulate)
    steps = _steps(sheet, source, batch * processes, accumulate)
    _optimizer(sheet, rate, steps)
    if how == "inversion":
        sheet.near("token_string", "train.optim.weight_decay", 0.0, "none for new words here: it pulls them to zero")
    kohya_loss.read(sheet, family)
    _caches(sheet, source, text)
    _precision(sheet)
    _samples(sheet, model, source, batch * processes, accumulate)
    _saving(sheet, source, batch * processes, accumulate)
    kohya_data.validation(sheet, source, batch * processes, accumulate)
    sheet.keep("seed", "seed", sheet.whole("seed"), "" if sheet.has("seed") else "theirs is drawn anew each time")
    sheet.keep("max_data_loader_n_workers", "workers", sheet.whole("max_data_loader_n_workers", 0))
    sheet.put("train.ema", None)
    for note, keys in LEFT_OUT.items():
        sheet.leave(note, *keys)
    for key, (note, *neutral) in LACKING.items():
        sheet.lacking(key, note, neutral)
    return sheet.done()


def _family(sheet: Sheet) -> str:
    """By the module of its LoRA, or the parts that are named."""
    module = MODULES.get(sheet.text("network_module"), "")
    if module or not sheet.has("t5xxl"):
        return module or ("sdxl" if sheet.has("text_encoder_lr1") else "sd")
    return "sd3" if sheet.has("clip_g") else "flux"


def _base(sheet: Sheet, base: str | None) -> str:
    key = "pretrained_model_name_or_path"
    model = base or sheet.text(key)
    if not model:
        sheet.need(f"{key}: missing; is this the data set's half? Give the arguments' file, or task.base=MODEL")
    sheet.keep(key, "task.base", model, "as it was asked for" if base else "")
    for part in PARTS:
        if sheet.has(part) and base:
            sheet.leave("the base has its own", part)
        elif sheet.has(part):
            sheet.refuse(part, "a base is one model here: name a folder or hub id that has all parts, task.base=MODEL")
    sheet.leave("the base's own files tell its family", "v2")
    if sheet.flag("v_parameterization"):
        common.prediction(sheet, "v_parameterization", model, "v_prediction")
    return model


def _adapter(sheet: Sheet, how: str, family: str) -> bool:
    """What trains; whether text encoders do."""
    cached = sheet.flag("cache_text_encoder_outputs") or sheet.flag("cache_text_encoder_outputs_to_disk")
    if how == "inversion":
        _words(sheet)
        return False
    if how == "full":
        text = sheet.flag("train_text_encoder") and not cached
        sheet.put("task.adapter", {"kind": "full", "text": text})
        sheet.leave("task.adapter.text", "train_text_encoder")
        return text
    module = sheet.text("network_module", "networks.lora")
    if module not in MODULES or module == "networks.lora_fa":
        sheet.refuse(
            "network_module", f"{module}: not here; networks.lora (LoRA, with conv_dim LoCon) and lycoris.kohya are"
        )
    arguments = common.pairs(sheet.texts("network_args"))
    _lora_plus(sheet, arguments)
    rank, alpha = sheet.whole("network_dim", 4), sheet.number("network_alpha", 1.0)
    sheet.put("task.adapter.kind", "lora")
    kohya_adapter.read(sheet, module, arguments)
    if module in MODULES and module != "networks.lora_fa":
        _targets(sheet, family, rank, alpha, arguments)
    sheet.keep("network_dim", "task.adapter.rank", rank)
    if sheet.tree["task"]["adapter"].get("algo") == "oft":
        sheet.leave("a rotation has no scale", "network_alpha")
    else:
        sheet.keep("network_alpha", "task.adapter.alpha", alpha, f"the scale is alpha / rank, {alpha / rank:g}")
    only = sheet.flag("network_train_unet_only")
    text = not only and not cached and any(float(v) != 0 for v in sheet.texts("text_encoder_lr") or ["1"])
    why = "" if only or text else "their captions' states are cached" if cached else "their rate of it is 0"
    sheet.keep("network_train_unet_only", "task.adapter.text", text, why)
    return text


def _lora_plus(sheet: Sheet, arguments: dict[str, str]) -> None:
    """LoRA+ among the network's arguments, one ratio for all that trains."""
    ratios = {name: float(arguments.pop(name)) for name in LORA_PLUS if name in arguments}
    if sheet.has("loraplus_lr_ratio"):
        ratios["loraplus_lr_ratio"] = sheet.number("loraplus_lr_ratio")
    if not ratios:
        return
    key = "loraplus_lr_ratio" if sheet.has("loraplus_lr_ratio") else "network_args"
    if len(set(ratios.values())) > 1 or (len(ratios) == 1 and "loraplus_lr_ratio" not in ratios):
        sheet.refuse(key, f"{ratios}: one ratio for all that trains here, loraplus_lr_ratio")
    elif (ratio := next(iter(ratios.values()))) != 1:
        sheet.keep(key, "train.optim.rates.lora_plus", ratio)


def _targets(sheet: Sheet, family: str, rank: int, alpha: float, arguments: dict[str, str]) -> None:
    if family in ("flux", "sd3"):
        sheet.near("network_module", "task.adapter.targets", None, "the family's usual layers, q, k and v with a rank "
                   "each; theirs are all layers of the blocks, q, k and v together")  # fmt: skip
        if arguments:
            sheet.refuse("network_args", f"{', '.join(arguments)}: not here")
        return
    targets = list(BLOCKS)
    convolution = arguments.pop("conv_dim", None)
    conv_alpha = arguments.pop("conv_alpha", "1")
    if convolution is not None and (float(convolution) != rank or float(conv_alpha) != alpha):
        sheet.refuse("network_args", f"conv_dim {convolution}, conv_alpha {conv_alpha}: one rank and alpha here, "
                     f"{rank} and {alpha:g}, for all layers")  # fmt: skip
    elif arguments:
        sheet.refuse("network_args", f"{', '.join(arguments)}: not here")
    elif convolution is not None:
        targets += ["convolution", "time"]
    sheet.keep("network_module", "task.adapter.targets", targets)
    sheet.leave("told with network_module", "network_args")


def _words(sheet: Sheet) -> None:
    """Textual inversion: one concept."""
    token = sheet.text("token_string")
    sheet.put("task.max_norm", 0.0)  # theirs has no bound
    style, thing = sheet.flag("use_style_template"), sheet.flag("use_object_template")
    if not (style or thing):
        sheet.refuse("token_string", "with captions of the pictures: new words train with templates here; say "
                     "use_object_template or use_style_template")  # fmt: skip
    learn = "style" if style else "object"
    concept = {"token": token, "vectors": sheet.whole("num_vectors_per_token", 1), "learn": learn, "images": "",
               "initializer": sheet.text("init_word").split()}  # fmt: skip
    sheet.put("task.concepts", [concept])
    for key, ours in (("token_string", "token"), ("num_vectors_per_token", "vectors"), ("init_word", "initializer")):
        if key not in ("token_string",) or style or thing:
            sheet.keep(key, "", concept[ours], f"task.concepts[0].{ours}")
    for key in ("use_object_template", "use_style_template"):
        if sheet.flag(key):
            sheet.near(key, "", learn, "task.concepts[0].learn: templates of other words than theirs")
    sheet.lacking("weights", "going on from an embedding: not here")


def _rates(sheet: Sheet, how: str, text: bool) -> float:
    """The network's rate, and others for text encoders and blocks."""
    rate = sheet.number("learning_rate", 2e-6)
    key = "unet_lr" if how == "lora" and sheet.has("unet_lr") else "learning_rate"
    usual, rate = rate, sheet.number(key, rate)
    sheet.keep(key, "train.optim.lr", rate)
    if key == "unet_lr":
        sheet.leave("unet_lr is the one that counts", "learning_rate")
    sheet.leave("as learning_rate", "unet_lr")
    names = [name for name in TEXT_RATES if sheet.has(name)]
    if not text:
        sheet.leave("text encoders do not train", *names)
        names = []
    own = [float(value) for name in names for value in sheet.texts(name)]
    if text and not own and key == "unet_lr":
        own = [usual]  # theirs: what has no rate of its own takes learning_rate
    if any(value != rate for value in own):
        # text_encoder_lr1 alone leaves the second encoder at learning_rate
        own += [usual] if names in (["text_encoder_lr1"], ["learning_rate_te1"]) else []
        own = [usual, *own] if names in (["text_encoder_lr2"], ["learning_rate_te2"]) else own
        told: Any = own[0] if len(set(own)) == 1 else own
        sheet.keep(names[0] if names else "learning_rate", "train.optim.rates.text", told)
        sheet.leave("in train.optim.rates.text", *names)
    sheet.leave("the same rate", *names)
    if sheet.has("block_lr"):
        kohya_blocks.rates(sheet, rate)
    return rate


def _steps(sheet: Sheet, source: kohya_data.Source, batch: int, accumulate: int) -> int:
    if sheet.has("max_train_epochs"):
        epochs = sheet.whole("max_train_epochs")
        steps = common.steps_of_epochs(sheet, "max_train_epochs", epochs, source.pictures, batch, accumulate)
        sheet.keep("max_train_epochs", "train.steps", steps,
                   f"{epochs} epochs of {source.pictures} pictures" + source.remark)  # fmt: skip
        sheet.leave("max_train_epochs is the one that counts", "max_train_steps")
    else:
        steps = sheet.whole("max_train_steps", 1600)
        sheet.keep("max_train_steps", "train.steps", steps)
        sheet.leave("max_train_steps is the one that counts", "max_train_epochs")
    return steps


def _optimizer(sheet: Sheet, rate: float, steps: int) -> None:
    key = "optimizer_type"
    name = sheet.text(key, "")
    for flag, other in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if sheet.flag(flag):
            key, name = flag, name or other
    common.optimizer(sheet, key, name or "AdamW")
    sheet.leave("off", "use_8bit_adam", "use_lion_optimizer")
    arguments, ours = common.pairs(sheet.texts("optimizer_args")), common.algorithm(name or "AdamW")
    if arguments and ours is not None:
        common.optimizer_arguments(sheet, "optimizer_args", arguments, ours)
    elif sheet.has("optimizer_args"):
        sheet.leave("of an optimizer that is not here" if arguments else "none", "optimizer_args")
    warmup = sheet.number("lr_warmup_steps")
    warmup = int(warmup * steps) if 0 < warmup < 1 else int(warmup)
    cycles, power = sheet.number("lr_scheduler_num_cycles", 1.0), sheet.number("lr_scheduler_power", 1.0)
    cooldown = sheet.number("lr_decay_steps")
    course = {"cooldown": int(cooldown * steps) if 0 < cooldown < 1 else int(cooldown),
              "final": sheet.number("lr_scheduler_min_lr_ratio"),
              "timescale": sheet.number("lr_scheduler_timescale")}  # fmt: skip
    common.schedule(
        sheet, "lr_scheduler", warmup_key="lr_warmup_steps", warmup=warmup, rate=rate, cycles=cycles, power=power,
        course=course,
    )  # fmt: skip
    sheet.leave("told with lr_scheduler, or of another", "lr_scheduler_num_cycles", "lr_scheduler_power",
                "lr_decay_steps", "lr_scheduler_min_lr_ratio", "lr_scheduler_timescale")  # fmt: skip
    sheet.keep("max_grad_norm", "train.engine.clip", sheet.number("max_grad_norm", 1.0))


def _caches(sheet: Sheet, source: kohya_data.Source, text: bool) -> None:
    key = "cache_latents_to_disk" if sheet.has("cache_latents_to_disk") else "cache_latents"
    wanted = sheet.flag("cache_latents") or sheet.flag("cache_latents_to_disk")
    cache, note = ("${out}/cache", "captions too, unless text encoders train") if wanted else (None, "")
    if wanted and source.changes:
        cache, note = None, f"{source.changes} makes another picture or caption each time; the result is the same"
    sheet.keep(key, "task.cache", cache, note)
    sheet.leave("task.cache", "cache_latents", "cache_latents_to_disk")
    sheet.leave("with task.cache", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")
    recompute = "block" if sheet.flag("gradient_checkpointing") else "none"
    sheet.keep("gradient_checkpointing", "task.gradient_checkpointing", recompute)


def _precision(sheet: Sheet) -> None:
    common.precision(sheet, "mixed_precision", sheet.text("mixed_precision", "no"))
    eight = [key for key in ("fp8_base", "fp8_base_unet", "fp8_scaled") if sheet.flag(key)]
    for key in eight:
        sheet.near(key, "train.engine.frozen", "int8", "8 bits with a scale for each output, not floating point")
    sheet.leave("off", *[key for key in ("fp8_base", "fp8_base_unet", "fp8_scaled") if key not in eight])
    if sheet.flag("deepspeed"):
        sheet.keep("zero_stage", "train.engine.zero_stage", sheet.whole("zero_stage", 2))
        for key, ours in (
            ("offload_optimizer_device", "offload_optimizer"),
            ("offload_param_device", "offload_parameters"),
        ):
            if sheet.text(key, "none").lower() != "none":
                sheet.keep(key, f"train.engine.{ours}", True)
    sheet.leave("DeepSpeed is what divides here", "deepspeed", "zero_stage", "offload_optimizer_device",
                "offload_param_device")  # fmt: skip


def _samples(sheet: Sheet, base: str, source: kohya_data.Source, batch: int, accumulate: int) -> None:
    settings = common.drawing(base) if base else {}
    name = sheet.text("sample_sampler", "ddim")
    if (sampler := common.SAMPLERS.get(name)) and sheet.has("sample_sampler"):
        settings["sampler"] = sampler
        sheet.keep("sample_sampler", "", sampler, "task.samples.settings.sampler")
    sheet.leave("not here; samples are drawn with the family's own", "sample_sampler")
    found = kohya_data.prompts(sheet, settings)
    sheet.put("task.samples", {**found, "every": 0, "settings": settings, "first": sheet.flag("sample_at_first")})
    sheet.leave("task.samples.first", "sample_at_first")
    if sheet.has("sample_every_n_steps"):
        sheet.keep("sample_every_n_steps", "task.samples.every", sheet.whole("sample_every_n_steps"))
    elif sheet.has("sample_every_n_epochs") and source.pictures:
        every = sheet.whole("sample_every_n_epochs") * common.epoch(source.pictures, batch, accumulate)
        sheet.keep("sample_every_n_epochs", "task.samples.every", every)
    sheet.leave("samples are drawn at the end", "sample_every_n_epochs", "sample_every_n_steps")


def _saving(sheet: Sheet, source: kohya_data.Source, batch: int, accumulate: int) -> None:
    if sheet.has("save_every_n_steps"):
        sheet.keep("save_every_n_steps", "train.checkpoint.every", sheet.whole("save_every_n_steps"))
    elif sheet.has("save_every_n_epochs") and source.pictures:
        every = sheet.whole("save_every_n_epochs") * common.epoch(source.pictures, batch, accumulate)
        sheet.keep("save_every_n_epochs", "train.checkpoint.every", every)
    sheet.put("train.checkpoint.keep", 2)
    sheet.leave("a checkpoint every 1000 steps, the last two stay", "save_every_n_epochs", "save_every_n_steps")
