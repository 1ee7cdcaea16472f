"""ostris' ai-toolkit: a YAML or JSON of `job: extension`, whose first process trains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.interop import ai_toolkit_data, common
from ldm.interop.prompts import of_line, of_row, samples_of
from ldm.interop.sheet import Converted, Sheet

NAME = "ai-toolkit"
TRAINERS = ("sd_trainer", "diffusion_trainer", "ui_trainer")
ARCHITECTURES = {
    "is_flux": "flux", "flux": "flux", "is_v3": "sd3", "sd3": "sd3", "is_xl": "sdxl", "sdxl": "sdxl", "sd1": "sd",
    "sd15": "sd", "is_v2": "sd", "sd2": "sd", "zimage": "zimage", "is_pixart": "pixart", "is_pixart_sigma": "pixart",
    "pixart": "pixart",
}  # fmt: skip
"""Its flags and names of architectures that are here; others (Wan, Qwen-Image, Chroma, ...) are not."""
SHIFTS = {**common.SHIFTS, "zimage": 6.0}
_LEFT: dict[str, tuple[str, ...]] = {
    "logging": ("log_dir", "performance_log_every", "logging", "sqlite_db_path"),
    "about files that are written": (
        "save.dtype", "save.push_to_hub", "save.hf_repo_id", "save.hf_private", "save.save_format", "save.save_root",
        "save.hf_private", "meta",
    ),
    "about the machine": (
        "device", "train.xformers", "train.sdp", "train.unload_text_encoder", "train.cache_text_embeddings",
        "train.low_vram", "model.low_vram", "model.dtype", "model.vae_dtype", "model.te_dtype",
        "model.layer_offloading",
        "model.layer_offloading_text_encoder_percent", "model.layer_offloading_transformer_percent", "model.compile",
        "model.model_kwargs", "model.qtype", "model.qtype_te", "train.attention_backend", "train.switch_boundary_every",
    ),
    "samples are drawn before, while and after": (
        "sample.sample_start_step", "sample.ext", "sample.format", "sample.fps",
        "sample.num_frames", "train.force_first_sample", "sample.network_multiplier", "sample.neg",
    ),
}  # fmt: skip
_LACKING: dict[str, tuple[Any, ...]] = {
    "train.content_or_style": ("not here: times as train.timestep_type has them", "balanced"),
    "train.content_or_style_reg": ("not here", "balanced"),
    "train.inverted_mask_prior": ("the model's own outputs outside of masks: not here",),
    "train.noise_multiplier": ("not here", 1),
    "train.img_multiplier": ("not here", 1),
    "train.weight_jitter": ("not here", 0),
    "train.short_and_long_captions": ("not here",),
    "train.random_noise_shift": ("not here", 0),
    "train.random_noise_multiplier": ("not here", 0),
    "train.loss_target": ("not here", "noise"),
    "train.linear_timesteps": ("weights of times: not here",),
    "train.linear_timesteps2": ("weights of times: not here",),
    "train.do_cfg": ("not here",),
    "train.bypass_guidance_embedding": ("not here",),
    "train.lr_scheduler_params": ("not here",),
    "train.reg_weight": ("told by data.sources here", 1),
    "train.start_step": ("not here",),
    "model.vae_path": ("another autoencoder than the base's: not here",),
    "model.assistant_lora_path": ("a LoRA beside training (of distilled models): not here",),
    "model.lora_path": ("a LoRA merged into the base: `ldm convert` does it",),
    "model.accuracy_recovery_adapter": ("not here",),
    "model.arch": ("not here; flux, sd3, sdxl, sd1, zimage and pixart are",),
    "model.use_text_encoder_1": ("not here", True),
    "model.use_text_encoder_2": ("not here", True),
    "adapter": ("adapters of its own: not here",),
    "embedding": ("new words beside: `ldm finetune dreambooth --pivotal`",),
    "slider": ("sliders: not here",),
    "decorator": ("not here",),
    "guidance": ("not here",),
}
"""Why it is refused, then the values that are met all the same."""


def convert(tree: Mapping[str, Any], *, images: str | None = None, base: str | None = None) -> Converted:
    """The config of a job. Raises ValueError for a process that does not train, and for what no run can do without."""
    config = tree.get("config") or {}
    processes = config.get("process") or [{}]
    process = dict(processes[0])
    kind = process.pop("type", None)
    if kind not in TRAINERS:
        raise ValueError(f"{NAME}: config.process[0].type: {kind!r}: not here; allowed are {', '.join(TRAINERS)}")
    if len(processes) > 1:
        raise ValueError(f"{NAME}: config.process: {len(processes)} processes; one run each here, write one a file")
    datasets = process.pop("datasets", None) or []
    name = str(config.get("name") or "run")
    sheet = Sheet(NAME, _dotted(process))
    out = Path(sheet.text("training_folder", "output")) / name
    sheet.keep("training_folder", "out", out.as_posix(), "config.name is the run's")
    sheet.put("name", name)
    sheet.put("task.kind", "finetune")
    model, family = _model(sheet, base)
    _network(sheet, family)
    trigger = sheet.text("trigger_word")
    batch, accumulate, steps = _steps(sheet)
    source = ai_toolkit_data.read(sheet, datasets, out, trigger, images)
    sheet.keep("train.batch_size", "train.batch", batch * accumulate, f"{batch} x {accumulate} accumulated")
    _optimizer(sheet)
    _times(sheet, family, model)
    cache, note = ("${out}/cache", "") if source.cached and not source.changes else (None, source.changes)
    sheet.put("task.cache", cache)
    recompute = "block" if sheet.flag("train.gradient_checkpointing", True) else "none"
    sheet.keep("train.gradient_checkpointing", "task.gradient_checkpointing", recompute, note)
    common.precision(sheet, "train.dtype", sheet.text("train.dtype", "fp32"))
    _samples(sheet, model, trigger, name, steps)
    _saving(sheet)
    for why, keys in _LEFT.items():
        sheet.leave(why, *keys, *[k for k in sheet.given if k.split(".")[0] in keys])
    for key, (why, *neutral) in _LACKING.items():
        for given in [k for k in sheet.given if k == key or k.startswith(f"{key}.")]:
            sheet.lacking(given, why, neutral)
    _preservation(sheet)
    sheet.leave("of output preservation, which is off", *[k for k in sheet.given if "_preservation_" in k])
    return sheet.done()


def _preservation(sheet: Sheet) -> None:
    """The model's own outputs as regularisation: the class's word for the trigger, or no words."""
    for kind, name in (("class", "diff_output"), ("blank", "blank_prompt")):
        key = f"train.{name}_preservation"
        if not sheet.flag(key):
            sheet.leave("off", key)
            continue
        if "preserve" in sheet.tree["task"]:
            sheet.refuse(key, "beside train.diff_output_preservation: one of both here")
            continue
        sheet.keep(key, "task.preserve.kind", kind)
        weight = f"{key}_multiplier"
        sheet.keep(weight, "task.preserve.weight", sheet.number(weight, 1.0))
        if kind == "class":
            word = f"{key}_class"
            sheet.keep(word, "task.preserve.word", sheet.text(word, "person"))


def _dotted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of two levels as one: train.lr."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and key in ("network", "save", "train", "model", "sample", "logging")
        found |= {f"{key}.{k}": v for k, v in value.items()} if nested else {key: value}
    return found


def _model(sheet: Sheet, base: str | None) -> tuple[str, str]:
    key = "model.name_or_path"
    model = base or sheet.text(key)
    if not model:
        sheet.need(f"{key}: missing; task.base=MODEL tells it too")
    if not base and model.startswith(("http:", "https:")):
        sheet.refuse(key, f"{model}: an address; download the file and give its path, task.base=FILE")
        sheet.put("task.base", model)
    else:
        sheet.keep(key, "task.base", model, "as it was asked for" if base else "")
    arch = sheet.text("model.arch")
    flags = [k.removeprefix("model.") for k in sheet.given if k.startswith("model.is_") and sheet.flag(k)]
    names = [n for n in (arch.split(":")[0], *flags) if n]
    for flag in flags:
        if flag == "is_v_pred":
            common.prediction(sheet, "model.is_v_pred", model, "v_prediction")
        elif flag not in ARCHITECTURES:
            sheet.refuse(f"model.{flag}", "not here; flux, sd3, sdxl, sd1, zimage and pixart are")
    family = next((ARCHITECTURES[n] for n in names if n in ARCHITECTURES), "" if arch else "sd")
    if family:
        sheet.leave("the base's own files tell its family", "model.arch", *[f"model.{f}" for f in flags])
    sheet.leave("off", *[k for k in sheet.given if k.startswith("model.is_") and not sheet.flag(k)])
    if sheet.flag("model.quantize") or sheet.flag("model.quantize_te"):
        which = "model.quantize" if sheet.flag("model.quantize") else "model.quantize_te"
        sheet.near(
            which, "train.engine.frozen", "int8", "all that does not train, in 8 bits with a scale for each output"
        )
    sheet.leave("off, or with train.engine.frozen", "model.quantize", "model.quantize_te")
    return model, family


def _network(sheet: Sheet, family: str) -> None:
    """A LoRA, or all weights where there is no network."""
    text = sheet.flag("train.train_text_encoder")
    if not sheet.flag("train.train_unet", True):
        sheet.refuse("train.train_unet", "false: the network trains here")
    sheet.leave("the network trains", "train.train_unet")
    if not any(key.startswith("network.") for key in sheet.given):
        sheet.put("task.adapter", {"kind": "full", "text": text})
        sheet.keep("train.train_text_encoder", "task.adapter.text", text)
        return
    kind = sheet.text("network.type", "lora").lower()
    if kind not in ("lora", "locon", "lokr"):
        sheet.refuse("network.type", f"{kind}: not here; lora and lokr are")
    sheet.put("task.adapter.kind", "lora")
    _kin(sheet, kind)
    key = "network.rank" if sheet.has("network.rank") else "network.linear"
    rank = sheet.whole(key, 4)
    sheet.keep(key, "task.adapter.rank", rank)
    other = "network.linear_alpha" if sheet.has("network.linear_alpha") else "network.alpha"
    alpha = sheet.number(other, 1.0)
    sheet.keep(other, "task.adapter.alpha", alpha, f"the scale is alpha / rank, {alpha / rank:g}")
    convolution = sheet.whole("network.conv", 0)
    if family in ("sd", "sdxl"):
        targets = ["attention", "feed_forward", "projection"]
        if convolution and (convolution != rank or sheet.number("network.conv_alpha", convolution) != alpha):
            sheet.refuse(
                "network.conv", f"{convolution}: one rank and alpha here, {rank} and {alpha:g}, for all layers"
            )
        targets += ["convolution", "time"] if convolution else []
        sheet.keep("network.type", "task.adapter.targets", targets)
    elif kind in ("lora", "locon", "lokr"):
        sheet.near(
            "network.type", "task.adapter.targets", None, "the family's usual layers; theirs are all of the blocks"
        )
    sheet.leave("told with network.type", "network.conv", "network.conv_alpha", "network.type", "network.alpha",
                "network.linear", "network.linear_alpha")  # fmt: skip
    sheet.keep("train.train_text_encoder", "task.adapter.text", text)


def _kin(sheet: Sheet, kind: str) -> None:
    """LoKr, layers by their names, dropout, and a file to go on from."""
    if kind == "lokr":
        sheet.put("task.adapter.algo", "lokr")
        sheet.keep("network.lokr_factor", "task.adapter.factor", sheet.whole("network.lokr_factor", -1))
        full = sheet.flag("network.lokr_full_rank")
        sheet.keep("network.lokr_full_rank", "task.adapter.full_matrix", full)
    sheet.leave("of LoKr", "network.lokr_factor", "network.lokr_full_rank")
    if share := sheet.number("network.dropout"):
        sheet.near("network.dropout", "task.adapter.rank_dropout", share,
                   "of ranks, by sample; theirs is of single numbers of the small side")  # fmt: skip
    sheet.leave("off", "network.dropout")
    if sheet.has("network.pretrained_lora_path"):
        sheet.keep("network.pretrained_lora_path", "task.adapter.start", sheet.text("network.pretrained_lora_path"))
    key, told = "network.network_kwargs", dict(sheet.given.get("network.network_kwargs") or {})
    for theirs, ours in (("only_if_contains", "include"), ("ignore_if_contains", "exclude")):
        if names := told.pop(theirs, None):
            sheet.put(f"task.adapter.{ours}", [re.escape(str(n)) for n in names])
    if told:
        sheet.refuse(key, f"{', '.join(told)}: not here; only_if_contains and ignore_if_contains are")
    elif sheet.has(key):
        sheet.keep(key, "", list(sheet.given[key]), "task.adapter.include and exclude")


def _steps(sheet: Sheet) -> tuple[int, int, int]:
    """(batch, accumulated, optimizer steps): with `gradient_accumulation_steps` theirs counts each micro-batch."""
    batch, steps = sheet.whole("train.batch_size", 1), sheet.whole("train.steps", 1000)
    old, new = sheet.whole("train.gradient_accumulation_steps", 1), sheet.whole("train.gradient_accumulation", 1)
    accumulate = old if old > 1 else new
    note = ""
    if old > 1:
        steps, note = -(-steps // old), f"theirs counts micro-batches, of which {old} are a step here"
    sheet.keep("train.steps", "train.steps", steps, note)
    key = "train.gradient_accumulation_steps" if old > 1 or new == 1 else "train.gradient_accumulation"
    sheet.keep(key, "train.accumulate", accumulate)
    sheet.leave("1", "train.gradient_accumulation", "train.gradient_accumulation_steps")
    return batch, accumulate, steps


def _optimizer(sheet: Sheet) -> None:
    name = sheet.text("train.optimizer", "adamw")
    common.optimizer(sheet, "train.optimizer", name)
    arguments, ours = dict(sheet.given.get("train.optimizer_params") or {}), common.algorithm(name)
    if ours is not None:
        adam = name.lower().startswith("adam") or ours == "prodigy"
        sheet.put("train.optim.eps", 1e-6 if adam else 1e-8)  # theirs for every Adam
        if ours == "adafactor":  # theirs turns both off unless they are asked for
            sheet.put("train.optim.adafactor", {"scale_parameter": False, "relative_step": False})
        if arguments:
            common.optimizer_arguments(sheet, "train.optimizer_params", arguments, ours)
    sheet.leave("none, or of an optimizer that is not here", "train.optimizer_params")
    rate = sheet.number("train.lr", 1e-6)
    low = ours == "prodigy" and rate < 0.1
    sheet.keep("train.lr", "train.optim.lr", 1.0 if low else rate, "theirs takes 1 for less than 0.1" if low else "")
    _part_rates(sheet, rate)
    common.schedule(sheet, "train.lr_scheduler", warmup_key="train.lr_warmup_steps",
                    warmup=sheet.whole("train.lr_warmup_steps"), rate=rate)  # fmt: skip
    sheet.keep("train.max_grad_norm", "train.engine.clip", sheet.number("train.max_grad_norm", 1.0))
    ema = sheet.given.get("train.ema_config") or {}
    on = bool(ema.get("use_ema"))
    averaged = {"decay": float(ema.get("ema_decay", 0.99)), "warmup": False}
    sheet.keep("train.ema_config", "train.ema", averaged if on else None)


def _part_rates(sheet: Sheet, rate: float) -> None:
    """Rates of the network and of text encoders."""
    text = sheet.flag("train.train_text_encoder")
    own = sheet.number("train.unet_lr", rate)
    if own != rate:
        sheet.keep("train.unet_lr", "train.optim.lr", own)
    words = sheet.number("train.text_encoder_lr", rate)
    if text and words != own:
        key = "train.text_encoder_lr" if sheet.has("train.text_encoder_lr") else "train.lr"
        sheet.keep(key, "train.optim.rates.text", words)
    sheet.leave("the same, or of what does not train", "train.unet_lr", "train.text_encoder_lr", "train.embedding_lr",
                "train.adapter_lr")  # fmt: skip


def _times(sheet: Sheet, family: str, model: str) -> None:
    """Noise, times and weights of the loss."""
    flow = family in ("sd3", "flux", "zimage")
    scheduler = sheet.text("train.noise_scheduler", "ddpm")
    if flow != (scheduler == "flowmatch") and scheduler in ("flowmatch", "ddpm"):
        sheet.refuse("train.noise_scheduler", f"{scheduler}: the base's own process is what trains here")
    else:
        sheet.leave("the base's own process is what trains", "train.noise_scheduler")
    if flow:
        own = 3.0 if family == "zimage" and "turbo" in model.lower() else SHIFTS.get(family, 1.0)
        note = f"the schedule's own shift {own:g} comes on top" if own != 1 else ""
        how = sheet.text("train.timestep_type", "sigmoid")
        found: dict[str, Any] | None = {
            "sigmoid": common.times("sigmoid", own=own),
            "linear": common.times("uniform", own=own),
            "shift": common.times("uniform") if family != "flux" else {"kind": "flux_shift", "base": "uniform"},
            "flux_shift": common.times("uniform") if family != "flux" else {"kind": "flux_shift", "base": "uniform"},
        }.get(how)
        if found is None:
            sheet.refuse("train.timestep_type", f"{how}: not here; sigmoid, linear and shift are")
        else:
            sheet.keep("train.timestep_type", "task.density", found, note)
        if family == "flux":
            sheet.put("task.options.guidance", 1.0)  # what theirs tells the network
    sheet.leave("of flows", "train.timestep_type")
    common.min_snr(sheet, "train.min_snr_gamma")
    if sheet.has("train.snr_gamma"):
        sheet.refuse("train.snr_gamma", "a weight by SNR that is not min-SNR: not here; min_snr_gamma is")
    _range_and_shape(sheet, flow)
    sheet.keep("train.noise_offset", "task.options.offset_noise", sheet.number("train.noise_offset"))


def _range_and_shape(sheet: Sheet, flow: bool) -> None:
    """The range of times, which theirs counts from the noise, and what an error costs."""
    low, high = sheet.whole("train.min_denoising_steps"), sheet.whole("train.max_denoising_steps", 1000)
    if (low, high) != (0, 1000):
        key = "train.min_denoising_steps" if low else "train.max_denoising_steps"
        if flow:
            sheet.refuse(key, "of a flow: not here as theirs; task.options.min_timestep and max_timestep are")
        else:
            sheet.put("task.options.max_timestep", 1000 - low)
            sheet.keep(key, "task.options.min_timestep", 1000 - high, "theirs counts from the noise")
    sheet.leave("all times, or told together", "train.min_denoising_steps", "train.max_denoising_steps")
    kind = sheet.text("train.loss_type", "mse")
    if kind in ("mse", "mae"):
        sheet.keep("train.loss_type", "task.options.loss", {"kind": "l1" if kind == "mae" else "mse"})
    else:
        sheet.refuse("train.loss_type", f"{kind}: not here; mse and mae are")


def _samples(sheet: Sheet, base: str, trigger: str, name: str, steps: int) -> None:
    rows = sheet.given.get("sample.samples") or []
    lines = [of_line(text, "sample.prompts") for text in sheet.texts("sample.prompts")]
    read = lines + [of_row(row, "sample.samples") for row in rows]
    odd = sorted({o for prompt in read for o in prompt.odd})
    found = samples_of(read)
    prompts = [t.replace("[trigger]", trigger or "[trigger]").replace("[name]", name) for t in found["prompts"]]
    alike = found.pop("settings")
    settings: dict[str, Any] = common.drawing(base) if base else {}
    sampler = common.SAMPLERS.get(sheet.text("sample.sampler"))
    settings |= {"sampler": sampler} if sampler else {}
    for key, ours, value in (
        ("sample.sample_steps", "steps", sheet.whole("sample.sample_steps", 20)),
        ("sample.guidance_scale", "guidance", sheet.number("sample.guidance_scale", 7.0)),
        ("sample.seed", "seed", sheet.whole("sample.seed", 0)),
    ):
        settings[ours] = value
        sheet.keep(key, "", value, f"task.samples.settings.{ours}")
    if sheet.has("sample.width") or sheet.has("sample.height"):
        settings["size"] = [sheet.whole("sample.height", 512), sheet.whole("sample.width", 512)]
        sheet.keep("sample.width", "", settings["size"], "task.samples.settings.size, height first")
    if sheet.text("sample.neg") and sheet.given.get("sample.neg") is not False:
        settings["negative"] = sheet.text("sample.neg")
        sheet.keep("sample.neg", "", settings["negative"], "task.samples.settings.negative")
    sheet.leave("with sample.width", "sample.height")
    settings |= alike
    walk = sheet.flag("sample.walk_seed")
    sheet.keep("sample.walk_seed", "", walk, "task.samples.walk_seed")
    sheet.leave("told with the prompts", "sample.sampler", "sample.guidance_rescale")
    every = min(sheet.whole("sample.sample_every", 100), steps)
    more = {"first": not sheet.flag("train.skip_first_sample"), "walk_seed": walk}
    sheet.put("task.samples", found | {"prompts": prompts, "every": every, "settings": settings} | more)
    sheet.keep("train.skip_first_sample", "", more["first"], "task.samples.first")
    key = "sample.samples" if rows else "sample.prompts"
    note = f"{', '.join(odd)} of single prompts are left out: not known here" if odd else ""
    sheet.keep(key, "task.samples.prompts", prompts, note, "near" if odd else "kept")
    sheet.leave("beside those of sample.samples", "sample.prompts")
    sheet.keep("sample.sample_every", "task.samples.every", every)
    if sheet.flag("train.disable_sampling"):
        sheet.put("task.samples.prompts", [])
        sheet.put("task.samples.own", [])
    sheet.leave("no prompts" if sheet.flag("train.disable_sampling") else "off", "train.disable_sampling")


def _saving(sheet: Sheet) -> None:
    sheet.keep("save.save_every", "train.checkpoint.every", sheet.whole("save.save_every", 1000))
    sheet.keep("save.max_step_saves_to_keep", "train.checkpoint.keep", sheet.whole("save.max_step_saves_to_keep", 5))
