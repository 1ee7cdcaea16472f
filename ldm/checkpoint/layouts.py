"""The layouts of strangers' single files brought to one: names that tools change, markers, what is not the model."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ldm.checkpoint import weights
from ldm.checkpoint.weights import Entry, Source

log = logging.getLogger(__name__)
_TURBO = "conditioner.embedders.0.model.ln_final.weight"
# What such files carry beside the model: group -> names.
_BESIDE = {
    "averages of the weights (--ema takes them)": re.compile(r"model_ema\."),
    "schedule tables": re.compile(
        r"(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_\w+|log_one_minus_\w+|posterior_\w+|lvlb_weights|logvar|"
        r"scale_factor|denoiser\..*)$"
    ),
    "training state": re.compile(r"(global_step|epoch|first_stage_model\.loss\..*|.*\.num_batches_tracked)$"),
    "towers' constants": re.compile(r".*\.(position_ids|logit_scale|attn_mask)$"),
    "another tower": re.compile(r"cond_stage_model\.(model\.visual|transformer\.(vision_model|visual_projection))\."),
}
MARKERS = ("v_pred", "ztsnr")
_OTHER_SIGMAS = re.compile(r"edm_(mean|std)$|edm_vpred\.")
_RENAMED = (
    (re.compile(r"(cond_stage_model|text_encoders)\.clip_[lh]\."), "cond_stage_model."),
    (re.compile(r"text_encoders\.clip_g\."), "conditioner.embedders.1."),
    (re.compile(r"vae\.(?=(encoder|decoder|quant_conv|post_quant_conv)\.)"), "first_stage_model."),
)


def one_layout(source: Source, path: Path) -> tuple[dict[str, Entry], bool]:
    """The tensors under CompVis' names, and whether the file is laid out as SD-Turbo's (SD 2.1's tower as in SDXL's).

    Raises ValueError for markers of models with other noise levels.
    """
    if odd := sorted(k for k in source if _OTHER_SIGMAS.match(k)):
        raise ValueError(f"{path}: {odd[0]!r} marks a model of continuous noise levels (EDM), which is not known here")
    two = any(k.startswith(("conditioner.embedders.1.", "text_encoders.clip_g.")) for k in source)
    turbo = _TURBO in source and not two and source[_TURBO].shape[0] == 1024
    out = {}
    for key, entry in source.items():
        for pattern, new in _RENAMED:
            key = pattern.sub(new, key, count=1) if pattern.match(key) else key
        if two and key.startswith("cond_stage_model."):
            key = "conditioner.embedders.0." + key.removeprefix("cond_stage_model.")
        if turbo and key.startswith("conditioner.embedders.0."):
            key = "cond_stage_model." + key.removeprefix("conditioner.embedders.0.")
        out[key] = entry
    return out, turbo


def beside(key: str) -> bool:
    """Whether the tensor is no part of the model: averages, tables, training state, constants, markers."""
    return key in MARKERS or any(pattern.match(key) for pattern in _BESIDE.values())


def say_beside(source: Source, path: Path, *, ema: bool) -> None:
    """One line for all tensors that nothing uses."""
    counts = {group: sum(bool(p.match(k)) for k in source) for group, p in _BESIDE.items()}
    found = [f"{n} {group}" for group, n in counts.items() if n and not (ema and group.startswith("averages"))]
    if found:
        log.warning("%s: not used: %s", path, ", ".join(found))


def say_left(path: Path, left: dict[str, list[str]], total: int, *, lenient: bool) -> None:
    """Raise for tensors that no part knows, by part; with `lenient` name them."""
    parts = [f"{part}: not known {weights.listed(sorted(keys), 3)}" for part, keys in left.items() if keys]
    if not parts:
        return
    text = f"{path}: {total - sum(map(len, left.values()))} of {total} tensors fit; {'; '.join(parts)}"
    if not lenient:
        raise ValueError(f"{text}; {weights.LENIENT}")
    log.warning("%s: left out", text)


def cautions(kind: str, zero: bool, towers: int, told_guidance: bool) -> list[str]:
    """What a single file cannot tell ComfyUI and A1111 about its model, and what to set there.

    `kind` is the prediction, `zero` zero terminal SNR, `towers` the number of text towers.
    """
    said = []
    if kind == "v" and towers == 1:
        also = ' with "zsnr" on' if zero else ""
        said.append(
            "a single file of SD 1.x or SD 2.x cannot say that the model predicts v"
            f"{' with zero terminal SNR' if zero else ''}: in ComfyUI put ModelSamplingDiscrete (v_prediction){also} "
            "behind the loader; for A1111 put a .yaml of the same name with parameterization: v beside it"
        )
    elif zero and kind != "v":
        said.append("a single file cannot say zero terminal SNR without v prediction; ComfyUI: ModelSamplingDiscrete")
    elif kind not in ("v", "epsilon"):
        said.append(f"ComfyUI and A1111 cannot tell that the model predicts {kind}; they take epsilon")
    if told_guidance:
        said.append(
            "ComfyUI and A1111 ignore the guidance embedding (time_embed.cond_proj) and draw wrongly without it: use "
            "a diffusers folder, or distil into a LoRA"
        )
    return said
