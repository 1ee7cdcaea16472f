"""diffusers' example scripts: text_to_image, dreambooth, textual_inversion, controlnet, with and without LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.interop import common, diffusers_data, diffusers_flow
from ldm.interop.diffusers_keys import LACKING, LEFT_OUT
from ldm.interop.scripts import SCRIPTS, Script
from ldm.interop.sheet import Converted, Sheet
from ldm.interop.words import Call

NAME = "diffusers' scripts"


def convert(call: Call, *, images: str | None = None, base: str | None = None) -> Converted:
    """The config of a script's options; without the script's name it is told by them.

    Raises ValueError for a script that has no method here, and for what no run can do without.
    """
    sheet = Sheet(NAME, {**call.launcher, **call.options})
    script = _script(sheet, call.script)
    processes = sheet.whole("num_processes", 1)
    sheet.leave("counted into train.batch", "num_processes")
    out = Path(sheet.text("output_dir", script.out))
    sheet.keep("output_dir", "out", out.as_posix())
    sheet.put("name", out.name)
    model = base or sheet.text("pretrained_model_name_or_path")
    if not model:
        sheet.need("pretrained_model_name_or_path: missing; task.base=MODEL tells it too")
    sheet.keep("pretrained_model_name_or_path", "task.base", model, "as it was asked for" if base else "")
    batch, accumulate = sheet.whole("train_batch_size", script.batch), sheet.whole("gradient_accumulation_steps", 1)
    text = _adapter(sheet, script)
    pictures = diffusers_data.read(sheet, script, out, images)
    together = batch * accumulate * processes
    note = f"{batch} x {accumulate} accumulated x {processes} process(es)"
    if sheet.flag("with_prior_preservation") and script.method == "dreambooth":
        together, note = (
            2 * together,
            f"{note}, and as many class pictures: half of their loss, to Adam the same",
        )
    sheet.keep("train_batch_size", "train.batch", together, note)
    sheet.keep("gradient_accumulation_steps", "train.accumulate", accumulate)
    steps = _steps(sheet, script, pictures, batch * processes, accumulate)
    _optimizer(sheet, script, text, batch * accumulate * processes)
    _loss(sheet, script, model)
    _rest(sheet, script, model, pictures, batch * processes, accumulate, steps)
    sheet.put("train.ema", None)
    if sheet.flag("use_ema"):
        sheet.keep("use_ema", "train.ema", {"decay": 0.9999, "warmup": True})
    sheet.leave("off", "use_ema")
    for why, keys in LEFT_OUT.items():
        sheet.leave(why, *keys)
    sheet.leave("of Prodigy", *[key for key in sheet.given if key.startswith("prodigy_")])
    for key, (why, *neutral) in LACKING.items():
        sheet.lacking(key, why, neutral)
    return sheet.done()


def _script(sheet: Sheet, name: str) -> Script:
    """What the script trains. Raises ValueError for one that is not here."""
    if name in SCRIPTS:
        return SCRIPTS[name]
    if name:
        raise ValueError(f"{NAME}: {name}: not here; allowed are {', '.join(sorted(SCRIPTS))}")
    lora = sheet.has("rank")
    if sheet.has("placeholder_token"):
        return SCRIPTS["textual_inversion.py"]
    if sheet.has("instance_prompt"):
        return SCRIPTS["train_dreambooth_lora.py" if lora else "train_dreambooth.py"]
    if sheet.has("controlnet_model_name_or_path") or sheet.has("conditioning_image_column"):
        return SCRIPTS["train_controlnet.py"]
    return SCRIPTS["train_text_to_image_lora.py" if lora else "train_text_to_image.py"]


def _adapter(sheet: Sheet, script: Script) -> bool:
    """What trains; whether text encoders do."""
    text = sheet.flag("train_text_encoder")
    if script.method in ("textual_inversion", "controlnet"):
        return False
    if not script.lora:
        sheet.keep("train_text_encoder", "task.adapter", {"kind": "full", "text": text})
        return text
    rank = sheet.whole("rank", 4)
    sheet.put("task.adapter.kind", "lora")
    sheet.keep("rank", "task.adapter.rank", rank)
    alpha = sheet.number("lora_alpha", rank)
    sheet.keep("lora_alpha", "task.adapter.alpha", alpha, f"the scale is alpha / rank, {alpha / rank:g}")
    sheet.keep("lora_dropout", "task.adapter.dropout", sheet.number("lora_dropout"))
    sheet.keep("use_dora", "task.adapter.dora", sheet.flag("use_dora"))
    sheet.keep("train_text_encoder", "task.adapter.text", text)
    if sheet.has("lora_layers"):
        layers = [name.strip() for name in sheet.text("lora_layers").split(",") if name.strip()]
        sheet.keep("lora_layers", "task.adapter.targets", layers, "ends of layer names, as theirs")
    else:
        sheet.put("task.adapter.targets", ["attention"] if script.family in ("sd", "sdxl") else None)
    return text


def _steps(sheet: Sheet, script: Script, pictures: int | None, batch: int, accumulate: int) -> int:
    if sheet.has("max_train_steps") or (script.steps and not sheet.has("num_train_epochs")):
        steps = sheet.whole("max_train_steps", script.steps)
        sheet.keep("max_train_steps", "train.steps", steps)
        sheet.leave("max_train_steps is the one that counts", "num_train_epochs")
        return steps
    epochs = sheet.whole("num_train_epochs", script.epochs)
    steps = common.steps_of_epochs(sheet, "num_train_epochs", epochs, pictures, batch, accumulate)
    sheet.keep("num_train_epochs", "train.steps", steps, f"{epochs} epochs of {pictures} pictures")
    sheet.leave("num_train_epochs is the one that counts", "max_train_steps")
    return steps


def _optimizer(sheet: Sheet, script: Script, text: bool, samples: int) -> None:
    name, key = sheet.text("optimizer", "AdamW"), "optimizer"
    if sheet.flag("use_8bit_adam") and name.lower() == "adamw":
        name, key = "AdamW8bit", "use_8bit_adam"
    if name.lower() == "adam" and script.method in ("textual_inversion",):
        name = "AdamW"
    common.optimizer(sheet, key, name)
    prodigy = name.lower() == "prodigy"
    if prodigy:
        _prodigy(sheet)
    sheet.leave("told with the optimizer", "use_8bit_adam", "optimizer")
    rate = sheet.number("learning_rate", script.rate)
    note = ""
    if sheet.flag("scale_lr"):
        rate, note = rate * samples, f"times {samples} samples a step: scale_lr"
    sheet.keep("learning_rate", "train.optim.lr", rate, note)
    sheet.leave("in train.optim.lr", "scale_lr")
    if text and script.text_rate is not None and sheet.number("text_encoder_lr", script.text_rate) != rate:
        own = sheet.number("text_encoder_lr", script.text_rate)
        # theirs: Prodigy has one rate, the network's
        sheet.keep("text_encoder_lr", *(("", None) if prodigy else ("train.optim.rates.text", own)))
    sheet.leave("the same rate" if text else "text encoders do not train", "text_encoder_lr")
    sheet.keep("adam_beta1", "train.optim.betas", [sheet.number("adam_beta1", 0.9), sheet.number("adam_beta2", 0.999)])
    sheet.leave("in train.optim.betas", "adam_beta2")
    sheet.keep("adam_epsilon", "train.optim.eps", sheet.number("adam_epsilon", 1e-8))
    decay = 0.0 if script.method == "textual_inversion" else sheet.number("adam_weight_decay", script.decay)
    if script.method == "textual_inversion" and sheet.number("adam_weight_decay", script.decay):
        sheet.near(
            "adam_weight_decay", "train.optim.weight_decay", decay, "none for new words here: it pulls them to zero"
        )
    else:
        sheet.keep("adam_weight_decay", "train.optim.weight_decay", decay)
    warmup, cycles = sheet.whole("lr_warmup_steps", 500), sheet.number("lr_num_cycles", 1.0)
    power = sheet.number("lr_power", 1.0)
    common.schedule(
        sheet, "lr_scheduler", warmup_key="lr_warmup_steps", warmup=warmup, rate=rate, cycles=cycles, power=power
    )
    sheet.leave("told with lr_scheduler", "lr_num_cycles", "lr_power")
    clip = 0.0 if script.method == "textual_inversion" else sheet.number("max_grad_norm", 1.0)
    sheet.keep("max_grad_norm", "train.engine.clip", clip)


def _prodigy(sheet: Sheet) -> None:
    """Its settings, which their scripts have otherwise than the package where they say nothing."""
    for name, ours, usual in (
        ("use_bias_correction", "bias_correction", True),
        ("safeguard_warmup", "safeguard_warmup", True),
    ):
        sheet.keep(f"prodigy_{name}", f"train.optim.prodigy.{ours}", sheet.flag(f"prodigy_{name}", usual))
    if sheet.has("prodigy_beta3"):
        sheet.keep("prodigy_beta3", "train.optim.prodigy.beta3", sheet.number("prodigy_beta3"))
    if not sheet.flag("prodigy_decouple", True):
        sheet.refuse("prodigy_decouple", "false: weight decay is decoupled here")
    sheet.leave("as here", "prodigy_decouple")


def _loss(sheet: Sheet, script: Script, base: str) -> None:
    if script.family in ("sd3", "flux"):
        diffusers_flow.read(sheet, script.family)
    if script.family in ("sd", "sdxl") or sheet.has("snr_gamma"):
        common.min_snr(sheet, "snr_gamma")
    noise = sheet.number("noise_offset")
    if sheet.flag("offset_noise"):
        sheet.keep("offset_noise", "task.options.offset_noise", 0.1)
    elif script.family in ("sd", "sdxl"):
        sheet.keep("noise_offset", "task.options.offset_noise", noise)
    sheet.leave("off", "offset_noise")
    if sheet.has("input_perturbation"):
        sheet.keep("input_perturbation", "task.options.input_perturbation", sheet.number("input_perturbation"))
    sheet.keep("proportion_empty_prompts", "task.options.drop", sheet.number("proportion_empty_prompts"))
    if sheet.has("prediction_type"):
        common.prediction(sheet, "prediction_type", base, sheet.text("prediction_type"))


def _rest(
    sheet: Sheet, script: Script, base: str, pictures: int | None, batch: int, accumulate: int, steps: int
) -> None:
    """Precision, memory, samples, checkpoints."""
    common.precision(sheet, "mixed_precision", sheet.text("mixed_precision", "no"))
    recompute = "block" if sheet.flag("gradient_checkpointing") else "none"
    sheet.keep("gradient_checkpointing", "task.gradient_checkpointing", recompute)
    if sheet.has("allow_tf32") or sheet.text("mixed_precision", "no") == "no":
        sheet.keep("allow_tf32", "train.engine.tf32", sheet.flag("allow_tf32"))
    sheet.keep("dataloader_num_workers", "workers", sheet.whole("dataloader_num_workers"))
    sheet.keep("seed", "seed", sheet.whole("seed"), "" if sheet.has("seed") else "theirs is drawn anew each time")
    reports = sheet.texts("report_to")
    if {"wandb", "all"} & set(reports):
        sheet.keep("report_to", "train.log.wandb", True)
    sheet.leave("TensorBoard, as here", "report_to")
    prompts = sheet.texts("validation_prompt") or sheet.texts("validation_prompts")
    if script.method == "controlnet":
        prompts = diffusers_data.conditions(sheet, prompts)
    every = sheet.whole("validation_steps", 100) if script.method in ("controlnet", "textual_inversion") else 0
    if script.method not in ("controlnet", "textual_inversion") and prompts and pictures:
        every = sheet.whole("validation_epochs", script.validation) * common.epoch(pictures, batch, accumulate)
    drawing: dict[str, Any] = common.drawing(base) if base else {}
    sheet.put("task.samples", {"prompts": prompts, "every": min(every, steps), "settings": drawing})
    for key in ("validation_prompt", "validation_prompts"):
        if sheet.has(key):
            sheet.keep(key, "task.samples.prompts", prompts)
    for key in ("validation_epochs", "validation_steps"):
        if sheet.has(key):
            sheet.keep(key, "task.samples.every", min(every, steps))
    key = "save_steps" if script.method == "textual_inversion" else "checkpointing_steps"
    sheet.keep(key, "train.checkpoint.every", sheet.whole(key, 500))
    sheet.leave("the run's checkpoints have all", "checkpointing_steps")
    if sheet.has("checkpoints_total_limit"):
        sheet.keep("checkpoints_total_limit", "train.checkpoint.keep", sheet.whole("checkpoints_total_limit"))
    else:
        sheet.put("train.checkpoint.keep", 2)
