"""CompVis and Stability single files: one file with the U-Net, the autoencoder and the text towers, strict both ways.

Strangers' files are recognised by their shapes (SD 1.x, SD 2.x, SDXL base, their inpainting forms and editors). Ours
carry their configs as JSON in the file's metadata, so that a model of any shape comes back.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import maps, single_transformer, weights
from ldm.checkpoint.files import whole_file
from ldm.checkpoint.layouts import beside, cautions, one_layout, say_beside, say_left
from ldm.checkpoint.opened import Opened, OpenedText, shapes_of
from ldm.checkpoint.pipelines import check_text
from ldm.checkpoint.schedulers import scheduler_from_diffusers, scheduler_to_diffusers
from ldm.checkpoint.single_transformer import Given, kind_of, open_transformer, relative
from ldm.checkpoint.weights import Entry, Source
from ldm.config.load import decode, encode
from ldm.diffusion.augmentation import NoiseAugmentation
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.schedule import Discrete
from ldm.models import presets
from ldm.models.text import TextConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae.autoencoder import AutoencoderConfig

log = logging.getLogger(__name__)
UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
HF_ONE, OPEN_ONE = "cond_stage_model.transformer.", "cond_stage_model.model."
HF_TWO, OPEN_TWO = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
CONFIG = "ldm.config"
_FAMILIES = {768: "sd15", 1024: "sd21", 2048: "sdxl"}


def open_single(
    path: Path,
    *,
    ema: bool = False,
    prediction: str | None = None,
    lenient: bool = False,
    given: Given = Given(),  # noqa: B008
) -> Opened:
    """A `.safetensors` or `.ckpt` file; `ema` takes the averaged U-Net, `prediction` names what an SD 2.x one predicts.

    `given` says where the parts are that the file of a transformer does not hold. Raises ValueError for a file that is
    no known family, lacks the average asked for, or has keys left over, which `lenient` leaves out.
    """
    source, about = weights.open_file(path), weights.metadata(path)
    written = json.loads(about[CONFIG]) if CONFIG in about else {}
    kind = written["network"]["kind"] if "network" in written else kind_of(source) if not written else None
    if kind is not None:
        if ema or prediction is not None:
            raise ValueError(f"{path}: {'--ema' if ema else '--prediction'} is for files of U-Nets; this is another")
        return open_transformer(path, source, kind, written or None, given, lenient=lenient)
    if given.text is not None or given.vae is not None:
        raise ValueError(f"{path}: {'--text' if given.text else '--vae'} is for files of SD3, FLUX.1 and PixArt")
    source, turbo = one_layout(source, path)
    if CONFIG in about:
        unet_config, vae_config, texts, scheduler = _written(about[CONFIG], path)
    else:
        unet_config, vae_config, texts, scheduler = _recognised(source, about, path, prediction, turbo)
    left: dict[str, list[str]] = {"U-Net": [], "autoencoder": [], "text tower": []}
    names = _unet_names(unet_config)
    plan = maps.renaming(names, back=True)
    unet = maps.follow(plan, _unet_source(source, names, ema, path), f"{path}: U-Net", left["U-Net"])
    vae = _vae(source, vae_config, path, left["autoencoder"])
    text = tuple(OpenedText(c, _tower(source, i, c, path, left["text tower"])) for i, c in enumerate(texts))
    known = (UNET, VAE, "cond_stage_model.", "conditioner.embedders.")
    left["file"] = [k for k in source if not k.startswith(known) and not beside(k)]
    say_left(path, left, len(source), lenient=lenient)
    say_beside(source, path, ema=ema)
    told = json.loads(about[CONFIG]).get("augmentation") if CONFIG in about else None
    noise = None if told is None else decode(NoiseAugmentation, told, f"{path}: augmentation")
    return Opened(str(path), unet_config, unet, vae_config, vae, text, scheduler, noise)


def write_single(path: Path, model: Opened, *, dtype: torch.dtype | None = None) -> None:
    """Write one safetensors file, whole or not at all."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    bpe = [t.config.bpe for t in model.text if isinstance(t.config, TextConfig)]
    if own := [b for b in bpe if b not in ("standard", "emoji")]:
        raise ValueError(f"{path}: a single file carries no tokenizer; this model's own is {own[0]!r}")
    config = model.network_config
    if not isinstance(config, UNetConfig):
        check_text(model)
        out, about = single_transformer.tensors(model), {CONFIG: json.dumps(single_transformer.about(model))}
    else:
        out, about = tensors(model), _about(model)
        how = scheduler_from_diffusers(model.scheduler)
        zero = isinstance(how.schedule, Discrete) and how.schedule.zero_terminal_snr
        for line in cautions(how.prediction.kind, zero, len(model.text), config.time_cond_proj_dim is not None):
            log.warning("%s: %s", path, line)
    with whole_file(path) as new:
        weights.write_file(new, out, dtype=dtype, metadata=about)


def tensors(model: Opened) -> dict[str, Entry]:
    """What a single file of a model with a U-Net holds."""
    assert isinstance(model.network_config, UNetConfig)
    names = _unet_names(model.network_config)
    out = maps.prefixed(UNET, maps.follow(maps.renaming(names), model.network, "U-Net"))
    vae = maps.renaming(maps.vae_to_compvis(model.vae, len(model.vae_config.block_out_channels)))
    out |= maps.prefixed(VAE, maps.follow(vae, model.vae, "autoencoder"))
    for i, tower in enumerate(model.text):
        out |= _tower_out(tower, i, len(model.text))
    settings = scheduler_from_diffusers(model.scheduler)
    if len(model.text) > 1 and settings.prediction.kind == "v":  # by these names other tools know such an SDXL model
        zero = isinstance(settings.schedule, Discrete) and settings.schedule.zero_terminal_snr
        out |= weights.of_state({k: torch.zeros(1) for k in ["v_pred"] + ["ztsnr"] * zero})
    return out


def _about(model: Opened) -> dict[str, str]:
    """The file's metadata."""
    config = {
        "unet": encode(model.network_config),
        "vae": encode(model.vae_config),
        "text": [encode(t.config) for t in model.text],
        "scheduler": dict(model.scheduler),
    }
    if model.augmentation is not None:
        config["augmentation"] = encode(model.augmentation)
    return {
        CONFIG: json.dumps(config),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.prediction_type": scheduler_from_diffusers(model.scheduler).prediction.kind,
    }


def _written(text: str, path: Path) -> tuple[UNetConfig, AutoencoderConfig, tuple[TextConfig, ...], dict[str, Any]]:
    data = json.loads(text)
    return (
        decode(UNetConfig, data["unet"], f"{path}: unet"),
        decode(AutoencoderConfig, data["vae"], f"{path}: vae"),
        tuple(decode(TextConfig, t, f"{path}: text") for t in data["text"]),
        data["scheduler"],
    )


def _recognised(
    source: Source, about: dict[str, str], path: Path, prediction: str | None, turbo: bool
) -> tuple[UNetConfig, AutoencoderConfig, tuple[TextConfig, ...], dict[str, Any]]:
    first, last, keys = f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight", re.compile(r".*\.attn2\.to_k\.weight$")
    widths = {source[k].shape[1] for k in source if k.startswith(UNET) and keys.match(k)}
    if first not in source or last not in source or len(widths) != 1 or not widths <= set(_FAMILIES):
        hint = "; a refiner is not known here" if widths == {1280} else ""
        hint = f"; it is {who}" if (who := relative(source)) else hint or f"; {_seen(source)}"
        families = "SD 1.x, SD 2.x, SDXL base, SD3, FLUX.1 or PixArt"
        raise ValueError(f"{path}: not recognised as a single file of {families}{hint}")
    family = _FAMILIES[widths.pop()]
    unet = replace(presets.UNETS[family], in_channels=source[first].shape[1], out_channels=source[last].shape[0])
    label = f"{UNET}label_emb.0.0.weight"
    if family == "sd21" and label in source:
        width = source[label].shape[1]
        unet = replace(unet, class_embed_type="projection", projection_class_embeddings_input_dim=width)
    texts = tuple(t for t in presets.TEXTS[family] if isinstance(t, TextConfig))
    if family == "sd21":
        layers = max(maps.text_layers(maps.under(OPEN_ONE, source)), maps.hf_layers(maps.under(HF_ONE, source)))
        if not layers:
            raise ValueError(f"{path}: no text tower number 1")
        texts = (replace(texts[0], layers=layers, output="penultimate_norm" if layers == 24 else "last"),)
        if not any(k.startswith((f"{OPEN_ONE}text_projection", f"{HF_ONE}text_projection")) for k in source):
            texts = (replace(texts[0], projection=None),)
    vae = presets.AUTOENCODERS["kl_f8_sdxl" if family == "sdxl" else "kl_f8"]
    if turbo and prediction is None:  # only SD-Turbo's file is laid out so; it predicts epsilon at trailing times
        log.warning("%s: laid out as SD-Turbo's: epsilon, and 1 to 4 steps at guidance 1 are its own", path)
        scheduler = scheduler_to_diffusers(Discrete(), PREDICTIONS["epsilon"])
        return unet, vae, texts, scheduler | {"timestep_spacing": "trailing"}
    kind = _prediction(source, about, path, family, prediction)
    zero = ("ztsnr" in source or about.get("ss_zero_terminal_snr") == "True") and kind == "v"
    return unet, vae, texts, scheduler_to_diffusers(Discrete(zero_terminal_snr=zero), PREDICTIONS[kind])


def _seen(source: Source) -> str:
    """Which names a file has, by their beginnings."""
    starts = [".".join(k.split(".")[:2]) for k in sorted(source)]
    groups = list(dict.fromkeys(re.sub(r"\.\d+$", "", s) for s in starts))
    return f"its {len(source)} tensors are {', '.join(groups[:8])}{' and others' if len(groups) > 8 else ''}"


def _prediction(source: Source, about: dict[str, str], path: Path, family: str, asked: str | None) -> str:
    if asked is not None:
        if asked not in PREDICTIONS:
            raise ValueError(f"prediction {asked!r} is not one of {sorted(PREDICTIONS)}")
        return asked
    told = {"v": "v", "v_prediction": "v", "epsilon": "epsilon"}.get(about.get("modelspec.prediction_type", ""))
    if "v_pred" in source or about.get("ss_v_parameterization") == "True":
        return "v"
    if told:
        return told
    step = source.get("global_step")
    if family == "sd21" and step is not None and step.shape.numel() == 1 and int(step.read()) == 875_000:
        return "epsilon"  # the published 512 px base
    if family == "sd21":
        log.warning("%s: nothing tells if this SD 2.x model predicts v or epsilon; v is taken (768 px models do)", path)
        return "v"
    return "epsilon"


def _unet_names(config: UNetConfig) -> maps.Names:
    attend = [t.startswith("CrossAttn") for t in config.up_block_types]
    return maps.unet_to_compvis(shapes_of(config), config.per_level("layers_per_block"), attend)


def _unet_source(source: Source, names: maps.Names, ema: bool, path: Path) -> dict[str, Entry]:
    """The U-Net's tensors; averages have names without dots."""
    if not ema:
        return maps.under(UNET, source)
    averages = {other: EMA + f"diffusion_model.{other}".replace(".", "") for other in names.values()}
    if missing := sorted(v for v in averages.values() if v not in source):
        raise ValueError(f"{path}: EMA weights asked for, but missing {weights.listed(missing)}")
    return {other: source[flat] for other, flat in averages.items()}


def _vae(source: Source, config: AutoencoderConfig, path: Path, left: list[str]) -> dict[str, Entry]:
    plan = maps.renaming(maps.vae_to_compvis(shapes_of(config), len(config.block_out_channels)), back=True)
    inner = maps.compvis_vae({k: e for k, e in maps.under(VAE, source).items() if not beside(VAE + k)})
    return maps.follow(plan, inner, f"{path}: autoencoder", left)


def _tower(source: Source, index: int, config: TextConfig, path: Path, left: list[str]) -> dict[str, Entry]:
    """A text tower with native names, whichever way it is stored; without a projection that nothing uses."""
    found: dict[str, Entry] = {}
    for prefix in (HF_ONE, HF_TWO) if index == 0 else ("conditioner.embedders.1.transformer.",):
        if not found and (hf := maps.without_constants(maps.under(prefix, source))):
            found = maps.follow(maps.text_from_hf(hf), hf, f"{path}: text tower", left)
    for prefix in (OPEN_ONE, "conditioner.embedders.0.model.") if index == 0 else (OPEN_TWO,):
        if not found and (tower := maps.without_constants(maps.under(prefix, source))):
            found = maps.open_text(tower)
    if not found:
        raise ValueError(f"{path}: no text tower number {index + 1}")
    if config.projection is None and found.pop("text_projection", None) is not None:
        log.info("%s: not used: the text tower's projection", path)
    left += sorted(set(found) - set(known := shapes_of(config)))
    return {k: e for k, e in found.items() if k in known}


def _tower_out(tower: OpenedText, index: int, count: int) -> dict[str, Entry]:
    """OpenCLIP's towers are stored with its names, CLIP-L with Hugging Face's, which have no projection here."""
    openclip = isinstance(tower.config, TextConfig) and tower.config.pad == "zero"
    start = f"conditioner.embedders.{index}." if count > 1 else "cond_stage_model."
    if openclip:
        return maps.prefixed(start + "model.", tower.source)
    source = {k: e for k, e in tower.source.items() if k != "text_projection"}
    return maps.prefixed(start + "transformer.", maps.follow(maps.text_to_hf(source), source, "text tower"))
