"""What the formats share: optimizers, learning-rate schedules, precisions, sample prompts, epochs in steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.data.pairing import ALPHA
from ldm.data.sources import captions_beside, find
from ldm.interop.sheet import Sheet
from ldm.objectives.masked import LOSS_WEIGHT
from ldm.recipes.folder_runs import Choices
from ldm.recipes.sources import scheduler_of

OPTIMIZERS = {
    "adamw": "adamw",
    "adamw8bit": "adamw8bit",
    "pagedadamw8bit": "adamw8bit",
    "lion": "lion",
    "adafactor": "adafactor",
    "came": "came",
    "prodigy": "prodigy",
    "adamwschedulefree": "adamw_schedule_free",
    "schedulefreeadamw": "adamw_schedule_free",
}
"""Their names in small letters, without `_` and the package before; what else they have is not here."""
_USUAL: dict[str, dict[str, Any]] = {
    "lion": {"weight_decay": 0.0, "betas": [0.9, 0.99]},
    "adafactor": {"weight_decay": 0.0},
    "came": {"weight_decay": 0.0},
    "prodigy": {"weight_decay": 0.0},
    "adamw_schedule_free": {"weight_decay": 0.0},
}
"""What their packages have where nothing is told, and ours has otherwise."""
_OWN: dict[str, dict[str, Any]] = {
    "adafactor": {"scale_parameter": bool, "relative_step": bool, "warmup_init": bool, "beta1": float,
                  "clip_threshold": float, "decay_rate": float},
    "came": {"clip_threshold": float},
    "prodigy": {"d0": float, "d_coef": float, "beta3": float, "growth_rate": float, "use_bias_correction": bool,
                "safeguard_warmup": bool},
    "adamw_schedule_free": {"r": float, "weight_lr_power": float},
}  # fmt: skip
"""Arguments of one optimizer, which are ours under train.optim.NAME (`schedule_free`)."""
_MEANT: dict[str, dict[str, Any]] = {"prodigy": {"decouple": True, "slice_p": 1, "fsdp_in_use": False}}
"""Arguments that change nothing at these values."""
SAMPLERS = {
    "ddim": "ddim", "ddpm": "ddpm", "pndm": "pndm", "plms": "plms", "lms": "lms", "k_lms": "lms", "euler": "euler",
    "k_euler": "euler", "euler_a": "euler_ancestral", "k_euler_a": "euler_ancestral", "heun": "heun",
    "dpm_2": "kdpm2", "k_dpm_2": "kdpm2", "dpmsolver": "dpm_solver_2m", "dpmsolver++": "dpmpp_2m", "lcm": "lcm",
    "flowmatch": "euler", "unipc": "unipc", "deis": "deis",
}  # fmt: skip
POLYNOMIAL_END = 1e-7
"""The rate at which diffusers' and transformers' polynomial schedule ends."""
SHIFTS = {"sd3": 3.0}
"""The flow's shift that a family's own scheduler has in training, where a density of times comes on top of it."""


def algorithm(name: str) -> str | None:
    """Ours of their name, None where it is not here."""
    return OPTIMIZERS.get(name.lower().replace("_", "").rpartition(".")[2])


def optimizer(sheet: Sheet, key: str, name: str, *, paged: str = "") -> None:
    """The algorithm, with what its package has where nothing is told. Refused where it is not here."""
    if (ours := algorithm(name)) is None:
        have = ", ".join(dict.fromkeys(OPTIMIZERS.values()))
        sheet.refuse(key, f"{name}: not here; train.optim.algorithm has {have}, muon and sgd")
        return
    note = "its pages are left out, which only save memory" if name.lower().startswith("paged") else paged
    sheet.keep(key, "train.optim.algorithm", ours, note)
    for setting, value in _USUAL.get(ours, {}).items():
        sheet.put(f"train.optim.{setting}", value)
    if ours == "adafactor":
        sheet.put("train.optim.adafactor", {"scale_parameter": True, "relative_step": True})


def optimizer_arguments(sheet: Sheet, key: str, given: Mapping[str, Any], ours: str = "adamw") -> None:
    """Keyword arguments of an optimizer: weight decay, betas, eps, and those of its own."""
    kept, lacking = {}, []
    own, meant = _OWN.get(ours, {}), _MEANT.get(ours, {})
    for name, value in given.items():
        text = str(value).strip().lower()
        try:
            if name == "weight_decay" or (name == "eps" and ours not in ("adafactor", "came")):
                kept[name] = float(value)
            elif name == "betas":
                parts = value if isinstance(value, (list, tuple)) else str(value).strip("()[] ").split(",")
                numbers = [float(v) for v in parts]
                kept[name] = numbers[:2]
                if ours == "came" and len(numbers) == 3:
                    kept["came.beta3"] = numbers[2]
            elif name in own and text != "none":
                place = "schedule_free" if ours == "adamw_schedule_free" else ours
                found = text in ("true", "1", "yes") if own[name] is bool else float(value)
                kept[f"{place}.{'bias_correction' if name == 'use_bias_correction' else name}"] = found
            elif name == "warmup_steps" and ours == "adamw_schedule_free":
                kept["warmup"] = int(float(value))
            elif text == str(meant.get(name)).lower():
                continue
            elif text not in ("false", "none") or name in meant:
                lacking.append(name)
        except ValueError as error:
            raise ValueError(f"{sheet.program}: {key}: {name}: expected numbers, got {value!r}") from error
    if lacking:
        have = ", ".join(["weight_decay", "betas", "eps", *own])
        sheet.refuse(key, f"{', '.join(lacking)}: not here; {have} are")
        return
    if kept.get("adafactor.warmup_init"):  # theirs turns the steps of its own on
        kept["adafactor.relative_step"] = True
    for name, value in kept.items():
        sheet.keep(key, f"train.optim.{name}", value)


def own_rate(sheet: Sheet) -> str:
    """Why the optimizer takes no schedule, "" where it does."""
    optim = sheet.tree.get("train", {}).get("optim", {})
    if optim.get("algorithm") == "adamw_schedule_free":
        return "schedule-free training has none"
    relative = optim.get("algorithm") == "adafactor" and optim["adafactor"]["relative_step"]
    return "Adafactor with relative_step makes its rate itself" if relative else ""


def schedule(sheet: Sheet, key: str, *, warmup_key: str, warmup: int, rate: float, cycles: float = 1.0,
             power: float = 1.0, course: Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """The learning rate's course after diffusers' names; `warmup` in optimizer steps.

    `course`: what some take, as `final`, `cooldown`, `timescale`. Told after the optimizer.
    """
    name, more = sheet.text(key, "constant"), dict(course or {})
    if why := own_rate(sheet):
        sheet.put("train.optim.decay", "constant")
        sheet.leave(why, key, warmup_key)
        return
    if name == "constant":
        sheet.keep(key, "train.optim.decay", "constant")
        if warmup:
            sheet.leave("their schedule `constant` has no warm-up, whatever is written", warmup_key)
        sheet.told(warmup_key)
        return
    final, why, own = float(more.get("final", 0.0)), "", dict[str, Any]()
    ours = {"constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear", "inverse_sqrt": "inverse_sqrt",
            "cosine_with_restarts": "cosine_restarts", "polynomial": "polynomial", "cosine_with_min_lr": "cosine",
            "warmup_stable_decay": "wsd"}.get(name)  # fmt: skip
    if name not in ("cosine_with_min_lr", "warmup_stable_decay"):
        final = 0.0
    if name == "cosine_with_restarts":
        ours, why = ("cosine", "one cycle, no restart") if cycles == 1 else (ours, "")
        own = {} if cycles == 1 else {"cycles": int(cycles)}
    elif name == "polynomial":
        final = min(1.0, POLYNOMIAL_END / rate)
        ours, why = ("linear", "of power 1, a line") if power == 1 else (ours, "")
        own = {} if power == 1 else {"power": power}
    elif name == "inverse_sqrt":
        own = {"timescale": int(more.get("timescale") or 0)}
    elif ours == "wsd":
        own = {"cooldown": int(more.get("cooldown", 0))}
        ours = None if not own["cooldown"] or cycles != 1 else ours
    if ours is None or (name == "cosine_with_min_lr" and cycles != 1):
        sheet.refuse(
            key,
            f"{name}: not here, or not as it is set; train.optim.decay has constant, cosine, linear, "
            "cosine_restarts, polynomial, rex, inverse_sqrt, and wsd with a number of steps to decay",
        )
        return
    sheet.keep(key, "train.optim.decay", ours, why)
    if final:
        sheet.put("train.optim.final", final)
    if own:
        sheet.put("train.optim.course", own)
    sheet.keep(warmup_key, "train.optim.warmup", warmup)


def precision(sheet: Sheet, key: str, name: str) -> None:
    """What is computed in: their fp16 is ours where there is a GPU, which it needs."""
    import torch

    names = {"no": "fp32", "fp32": "fp32", "float32": "fp32", "float": "fp32", "bf16": "bf16", "bfloat16": "bf16",
             "fp16": "fp16", "float16": "fp16"}  # fmt: skip
    ours = names.get(name.lower())
    if ours is None:
        sheet.refuse(key, f"{name}: not here; train.engine.precision has fp32, bf16 and fp16")
    elif ours == "fp16" and not torch.cuda.is_available():
        sheet.near(key, "train.engine.precision", "auto", "there is no GPU here, which fp16 needs: bf16 or fp32")
    else:
        sheet.keep(key, "train.engine.precision", ours)


def pairs(texts: Iterable[str], sign: str = "=") -> dict[str, str]:
    """Texts such as KEY=VALUE as keys and values."""
    return {text.partition(sign)[0]: text.partition(sign)[2] for text in texts}


def count(folder: str | Path) -> int | None:
    """Pictures of a folder times the repeats that its name tells, None where it is not here."""
    try:
        return sum(item.repeats for item in find(Path(folder), "none") if item.problem is None)
    except ValueError:
        return None


def captioned(folder: str | Path) -> tuple[int, int] | None:
    """How many pictures of a folder have captions, and how many have none; None where it is not here."""
    try:
        items = [item for item in find(Path(folder)) if item.problem is None]
    except ValueError:
        return None
    named = [item.caption_file is not None or bool(item.captions) for item in items]
    return sum(named), len(named) - sum(named)


def captions_with(folder: str | Path, words: tuple[str, ...]) -> str | None:
    """The name of a picture whose caption holds one of the words."""
    for item in find(Path(folder)):
        if item.problem is None and any(word in text for text, _ in captions_beside(item) for word in words):
            return item.name
    return None


def steps_of_epochs(sheet: Sheet, key: str, epochs: int, pictures: int | None, batch: int, accumulate: int) -> int:
    """Optimizer steps of so many epochs: each is its batches, rounded up, divided by the accumulation, rounded up.

    Without the pictures the sheet says that it needs them.
    """
    if pictures is None:
        sheet.need(
            f"{key}: {epochs} epochs are steps only where the pictures can be counted, and their folder is not here; "
            "give train.steps=N"
        )
        return 1
    return epochs * epoch(pictures, batch, accumulate)


def epoch(pictures: int, batch: int, accumulate: int) -> int:
    """Optimizer steps of an epoch."""
    return max(1, math.ceil(math.ceil(pictures / batch) / accumulate))


def drawing(base: str) -> dict[str, Any]:
    """How samples are drawn of a base where nothing is said."""
    return Choices(method="lora", images=Path(), base=base).drawing


def prediction(sheet: Sheet, key: str, base: str, wanted: str) -> None:
    """What the network predicts, which is the base's own: told as such, refused where the base says otherwise."""
    try:
        own = str(scheduler_of(base).get("prediction_type", "epsilon"))
    except (ValueError, OSError):
        sheet.near(key, "", None, f"the base's own files tell it; see that it is {wanted}")
        return
    if own == wanted:
        sheet.leave(f"the base's own files say so: {own}", key)
    else:
        sheet.refuse(key, f"{wanted}, but the base's own files say {own}, which is what trains")


def min_snr(sheet: Sheet, key: str) -> None:
    """Min-SNR: the same weight of the same error, for noise and velocity."""
    if sheet.has(key) and sheet.number(key) > 0:
        sheet.keep(key, "task.weighting", {"kind": "min_snr", "gamma": sheet.number(key)})
    else:
        sheet.leave("none, as here", key)


def on_top_of(shift: float, own: float) -> dict[str, Any]:
    """A logit-normal's mean and uniform times' shift that together with a schedule's `own` shift make `shift`."""
    rest = shift / own
    return {} if math.isclose(rest, 1.0) else {"mean": math.log(rest), "shift": rest}


def times(shape: str, *, shift: float = 1.0, own: float = 1.0, std: float = 1.0) -> dict[str, Any]:
    """A density of a flow's times: "sigmoid" is logit-normal, "uniform"; in all shifted by `shift`.

    logit of s u / (1 + (s - 1) u) is logit(u) + log s, so that both shapes are exact.
    """
    more = on_top_of(shift, own)
    if shape == "sigmoid":
        return {"kind": "logit_normal", "mean": more.get("mean", 0.0), "std": std}
    return {"kind": "shifted_uniform", "shift": more["shift"]} if more else {"kind": "uniform"}


def masks(where: str) -> str:
    """The option of `ldm data build` that reads the masks of a masked loss: alpha, or a folder's path."""
    place = where if where == ALPHA else Path(where).resolve().as_posix() + "/"
    return f' --pair {LOSS_WEIGHT}="{place}"'


def masked(sheet: Sheet, *, outside: float = 0.0, normalize: bool = False) -> dict[str, Any]:
    """Put the masked loss into the sheet; the pair that each data set then has."""
    sheet.put("task.options.mask", {"outside": outside, "normalize": normalize})
    return {LOSS_WEIGHT: {"kind": "stored", "channels": 1}}
