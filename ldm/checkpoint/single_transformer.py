"""Single files of SD3, FLUX.1, PixArt and Z-Image: the network in its authors' names, with or without the other parts.

A file that holds them all is laid out as ComfyUI's: `model.diffusion_model.`, `first_stage_model.` or `vae.`, and
`text_encoders.clip_l.`, `clip_g.` and `t5xxl.`. Ours carry their configs as JSON in the file's metadata.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.checkpoint import encoders, maps, weights
from ldm.checkpoint.families import FILES
from ldm.checkpoint.families.pixart import ALPHA, first
from ldm.checkpoint.folder import open_vae
from ldm.checkpoint.layouts import beside, say_left
from ldm.checkpoint.model_text import missing_t5, open_one, usual
from ldm.checkpoint.opened import Opened, OpenedText, shapes_of, title
from ldm.checkpoint.pairs import from_authors, to_authors
from ldm.checkpoint.pipelines import NAMES, numbered
from ldm.checkpoint.weights import Entry, Source
from ldm.config.load import decode, encode
from ldm.models import presets
from ldm.models.networks import AnyNetwork
from ldm.models.text.config import AnyText, MissingConfig, QwenConfig, T5Config, TextConfig
from ldm.models.transformers.pixart import PixArtConfig
from ldm.models.transformers.sd3 import SD3Config
from ldm.models.vae.autoencoder import AutoencoderConfig

log = logging.getLogger(__name__)
NETWORK, TEXT = "model.diffusion_model.", "text_encoders."
VAES = ("first_stage_model.", "vae.")
_TEXTS: dict[str, type[Any]] = {"clip": TextConfig, "t5": T5Config, "qwen": QwenConfig, "none": MissingConfig}
_RELATIVES = {
    "double_stream_modulation_img.": "FLUX.2",
    "distilled_guidance_layer.": "Chroma",
    "txt_in.individual_token_refiner.": "HunyuanVideo",
    "noise_refiner.0.attention.to_q.": "Z-Image in diffusers' names; put it into a folder `transformer` with its "
    "config.json, beside the other parts",
    "layers.0.adaLN_modulation.1.": "Lumina 2",
    "siglip_pad_token": "Z-Image-Omni, which is told pictures",
    "blocks.0.mlp.depth_conv.": "SANA",
    "double_layers.0.attn.w1q.": "AuraFlow",
    "transformer_blocks.0.attn.add_q_proj.": "a transformer in diffusers' names; put it into a folder `transformer` "
    "with its config.json, beside the other parts",
    "transformer_blocks.0.adaln_single.": "PixArt in diffusers' names",
}
"""Beginnings of names -> whose file it is instead."""
_FOUR_BITS = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


@dataclass(frozen=True)
class Given:
    """Where parts are that a file does not hold: a diffusers folder with text encoders; a folder or file of an
    autoencoder."""

    text: Path | None = None
    vae: Path | None = None


def kind_of(source: Source) -> str | None:
    """The kind of network in a file, None for one that is no transformer known here."""
    names = _network(source)
    for kind, files in FILES.items():
        if files.mark in names and relative(source) is None:
            return kind
    return None


def relative(source: Source) -> str | None:
    """Whose file it is, for families near to ours that are not known here."""
    names = _network(source)
    if any(name.endswith(_FOUR_BITS) for name in names):
        return "a model of 4-bit weights (bitsandbytes)"
    found = (who for start, who in _RELATIVES.items() if any(name.startswith(start) for name in names))
    return next(found, None)


def _network(source: Source) -> dict[str, Entry]:
    """The network's tensors without a prefix: all that are no other part's where none has one."""
    for prefix in (NETWORK, "diffusion_model."):
        if own := maps.under(prefix, source):
            return own
    return {k: e for k, e in source.items() if not k.startswith((*VAES, TEXT))}


def open_transformer(
    path: Path, source: Source, kind: str, told: Mapping[str, Any] | None, given: Given, *, lenient: bool
) -> Opened:
    """A file of a family; `told` is what its metadata say, `given` where missing parts are.

    Raises ValueError naming the parts that are neither in the file nor given, and tensors that are not known.
    """
    own, files = _network(source), FILES[kind]
    left: dict[str, list[str]] = {"network": [], "autoencoder": [], "text encoder": []}
    config = _settings(own, kind, told, path)
    own = {k: e for k, e in own.items() if k not in files.unused}
    network = maps.follow(from_authors(files.pairs(config)), own, f"{path}: {title(config)}", left["network"])
    missing: list[str] = []
    vae_config, vae = _autoencoder(source, config, told, given, path, left["autoencoder"], missing)
    text = _encoders(source, config, told, given, path, left["text encoder"], missing)
    if missing:
        raise ValueError(f"{path}: holds no {' and no '.join(missing)}")
    left = {part: [k for k in keys if not beside(k)] for part, keys in left.items()}
    say_left(path, left, len(source), lenient=lenient)
    scheduler = told["scheduler"] if told else usual_scheduler(config)
    return Opened(str(path), config, network, vae_config, vae, tuple(text), scheduler)


def _settings(own: Source, kind: str, told: Mapping[str, Any] | None, path: Path) -> Any:
    files = FILES[kind]
    if told:
        return decode(files.config, told["network"], f"{path}: network")
    try:
        other = files.unlike(own)
        found = None if other else files.settings(own, str(path))
    except (KeyError, ValueError) as error:
        what = f"no tensor {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not a whole {files.title}: {what}") from error
    if other:
        raise ValueError(f"{path}: it is {other}, and not known here")
    return found


def usual_autoencoder(config: AnyNetwork) -> AutoencoderConfig:
    """The family's."""
    return presets.AUTOENCODERS[FILES[config.kind].autoencoder(config)]


def usual_scheduler(config: AnyNetwork) -> dict[str, Any]:
    """The scheduler's settings that the family was published with, for Z-Image those of its Turbo."""
    return FILES[config.kind].scheduler(config)


def _autoencoder(
    source: Source,
    config: AnyNetwork,
    told: Mapping[str, Any] | None,
    given: Given,
    path: Path,
    left: list[str],
    missing: list[str],
) -> tuple[AutoencoderConfig, Source]:
    like = decode(AutoencoderConfig, told["vae"], f"{path}: vae") if told else usual_autoencoder(config)
    for prefix in VAES:
        if own := {k: e for k, e in maps.under(prefix, source).items() if not beside(prefix + k)}:
            if given.vae is not None:
                log.warning("%s: has an autoencoder of its own; %s is not used", path, given.vae)
            return like, authors_vae(own, like, f"{path}: autoencoder", left)
    if given.vae is not None:
        return vae_at(given.vae, like)
    missing.append("autoencoder (--vae FOLDER or FILE gives it; vae= in Python)")
    return like, {}


def vae_at(where: Path, like: AutoencoderConfig) -> tuple[AutoencoderConfig, Source]:
    """An autoencoder from its folder, from a model's folder, or from a file of one such as FLUX.1's `ae.safetensors`.

    A file has the settings `like`. Raises ValueError for what is none of these.
    """
    if where.is_dir():
        folder = where / "vae" if (where / "vae").is_dir() else where
        return open_vae(folder)
    source = weights.open_file(where)
    for prefix in VAES:
        source = maps.under(prefix, source) or source
    if any(k.startswith("encoder.down_blocks.") for k in source):
        return like, maps.modern_vae(source)
    return like, authors_vae({k: e for k, e in source.items() if not beside(k)}, like, f"{where}: autoencoder")


def authors_vae(
    source: Source, config: AutoencoderConfig, what: str, left: list[str] | None = None
) -> dict[str, Entry]:
    """Native names of an autoencoder in CompVis' names, which Stability and Black Forest Labs have too."""
    plan = maps.renaming(maps.vae_to_compvis(shapes_of(config), len(config.block_out_channels)), back=True)
    return maps.follow(plan, maps.compvis_vae(source), what, left)


def _encoders(
    source: Source,
    config: AnyNetwork,
    told: Mapping[str, Any] | None,
    given: Given,
    path: Path,
    left: list[str],
    missing: list[str],
) -> list[OpenedText]:
    """All text encoders: each from the file, or else from the folder that is given."""
    files, out, lost = FILES[config.kind], [], []
    likes: tuple[AnyText, ...] = usual(config, ALPHA if isinstance(config, PixArtConfig) and first(config) else None)
    if told:
        likes = tuple(decode(_TEXTS[t["kind"]], t, f"{path}: text") for t in told["text"])
    for i, like in enumerate(likes):
        own = maps.under(f"{TEXT}{files.encoders[i]}.", source)
        own = {k.removeprefix("transformer."): e for k, e in own.items() if not beside("." + k)}
        if own and isinstance(like, (T5Config, QwenConfig, TextConfig)):
            out.append(_encoder(own, like, i, given, path, left))
        elif isinstance(like, MissingConfig):
            out.append(OpenedText(like, {}))
        elif given.text is not None and (given.text / numbered("text_encoder", i)).is_dir():
            out.append(open_one(given.text, i, like))
        elif isinstance(config, SD3Config) and i == 2:
            log.warning("%s: holds no T5: zeros stand in its place; --text FOLDER gives it (text= in Python)", path)
            out.append(missing_t5(config))
        else:
            lost.append(f"{files.encoders[i]} ({NAMES[like.kind]})")
    if lost:
        where = f"{given.text} lacks them too" if given.text else "--text FOLDER gives them; text= in Python"
        missing.append(f"text encoder {', '.join(lost)} ({where})")
    return out


def _encoder(
    own: Source, like: T5Config | QwenConfig | TextConfig, i: int, given: Given, path: Path, left: list[str]
) -> OpenedText:
    """A text encoder that the file holds; the tokenizers of T5 and Qwen3 are in no file."""
    if isinstance(like, (T5Config, QwenConfig)):
        found = None
        if given.text is not None and (given.text / numbered("tokenizer", i)).is_dir():
            found = open_one(given.text, i, like).config
        if isinstance(found, (T5Config, QwenConfig)):
            like = found
        if like.tokenizer is None or not like.tokenizer.is_dir():
            raise ValueError(
                f"{path}: holds a {NAMES[like.kind]} and, as all single files, no tokenizer for it: --text FOLDER "
                "gives one (text= in Python), a diffusers folder of the family"
            )
        names = encoders.t5_names if isinstance(like, T5Config) else encoders.qwen_names
        return OpenedText(like, names(own, left))
    hf = maps.without_constants(own)
    native = maps.follow(maps.text_from_hf(hf), hf, f"{path}: text encoder", left)
    projection = native["text_projection"].shape[1] if "text_projection" in native else None
    if like.projection is None and projection is not None:
        del native["text_projection"]
        projection = None
    return OpenedText(replace(like, projection=projection), native)


def about(model: Opened) -> dict[str, Any]:
    """What the metadata of our own files say."""
    return {
        "network": encode(model.network_config),
        "vae": encode(model.vae_config),
        "text": [encode(t.config) for t in model.text],
        "scheduler": dict(model.scheduler),
    }


def tensors(model: Opened) -> dict[str, Entry]:
    """What a single file of the model holds. Raises ValueError for text encoders that such a file has no names for."""
    config = model.network_config
    files = FILES[config.kind]
    plan = to_authors(files.pairs(config))
    out = maps.prefixed(NETWORK, maps.follow(plan, model.network, title(config)))
    vae = maps.renaming(maps.vae_to_compvis(model.vae, len(model.vae_config.block_out_channels)))
    out |= maps.prefixed(files.vae, maps.follow(vae, model.vae, "autoencoder"))
    for tower, name in zip(model.text, files.encoders, strict=False):
        if isinstance(tower.config, MissingConfig):
            continue
        source = tower.source
        if isinstance(tower.config, TextConfig):
            source = maps.follow(maps.text_to_hf(source), source, "text encoder")
        if isinstance(tower.config, QwenConfig):
            source = maps.prefixed("model.", source)
        out |= maps.prefixed(f"{TEXT}{name}.transformer.", source)
    return out
