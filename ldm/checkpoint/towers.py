"""Text towers as transformers' `CLIPTextModel(WithProjection)` with their tokenizers: settings read and written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ldm.checkpoint import maps, weights
from ldm.checkpoint.layouts import say_left
from ldm.checkpoint.opened import OpenedText
from ldm.checkpoint.settings import read_json
from ldm.checkpoint.tokenizers import Added, find_tokenizer
from ldm.models.text import Output, TextConfig, build_tokenizer

log = logging.getLogger(__name__)
STEM = "model"
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "intermediate_size": 2048,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
"""What transformers takes for keys that are absent; here for those that are null too."""
_ONLY = {"layer_norm_eps": 1e-5, "is_decoder": False, "add_cross_attention": False, "quantization_config": None}
_KINDS = ("clip_text_model", "clip")
_LEGACY_EOS = 2


def open_text(
    folder: Path,
    tokenizer: Path,
    *,
    output: Output = "last",
    zero_empty: bool = False,
    variant: str | None = None,
    lenient: bool = False,
) -> OpenedText:
    """A text tower from HF `CLIPTextModel(WithProjection)` files, with the tokenizer of another folder.

    Raises ValueError for another model, for tensors that are not known unless `lenient`, and naming the key for
    settings that are not supported.
    """
    hf = text_settings(read_json(folder / "config.json"), folder)
    source = maps.without_constants(weights.open_folder(folder, STEM, variant))
    left: list[str] = []
    native = maps.follow(maps.text_from_hf(source), source, str(folder), left)
    say_left(folder, {"text tower": left}, len(source), lenient=lenient)
    context, width, rows = hf["max_position_embeddings"], hf["hidden_size"], hf["vocab_size"]
    found = find_tokenizer(tokenizer, context)
    config = TextConfig(
        width=width,
        heads=hf["num_attention_heads"],
        layers=hf["num_hidden_layers"],
        mlp_width=hf["intermediate_size"] if hf["intermediate_size"] != 4 * width else None,
        context_length=context,
        vocab_size=rows,
        activation=hf["hidden_act"],
        projection=native["text_projection"].shape[1] if "text_projection" in native else None,
        output=output,
        pad=found.pad,
        bpe=found.bpe,
        zero_empty=zero_empty,
        max_length=found.length if found.length is not None and found.length < context else None,
        added=_with_rows(found.added, rows, tokenizer),
    )
    return OpenedText(replace(config, pooled_at=_pooled_at(hf["eos_token_id"], config, folder)), native)


def text_settings(hf: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The settings of a text model, those of a whole CLIP's text half too, with transformers' defaults.

    Raises ValueError naming the key for another model and for what is not supported.
    """
    known = set(hf.get("architectures") or []) & {"CLIPTextModel", "CLIPTextModelWithProjection"}
    kind = hf.get("model_type") or (_KINDS[0] if known else None)
    if kind not in _KINDS:
        raise ValueError(
            f"{where}: model_type {kind!r} is not 'clip_text_model'; only CLIP's text encoders are supported"
        )
    if kind == "clip":
        hf = {**hf, **(hf.get("text_config") or hf.get("text_config_dict") or {})}
    for key, only in _ONLY.items():
        if hf.get(key) not in (None, only):
            raise ValueError(f"{where}: {key} {hf[key]!r} is not supported; only {only!r} is")
    found = {**_DEFAULTS, **{k: v for k, v in hf.items() if v is not None}}
    for key in _DEFAULTS:
        if key not in ("hidden_act", "layer_norm_eps", "eos_token_id") and type(found[key]) is not int:
            raise ValueError(f"{where}: {key} {found[key]!r} is not a whole number")
    if found["hidden_act"] not in (known := ("gelu", "quick_gelu")):
        raise ValueError(f"{where}: hidden_act {found['hidden_act']!r} is not one of {list(known)}")
    return found


def _with_rows(added: tuple[Added, ...], rows: int, where: Path) -> tuple[Added, ...]:
    """Those that the text encoder has a vector for; the others are named in the log."""
    known = tuple(a for a in added if a.id < rows)
    if left := [a.text for a in added if a.id >= rows]:
        log.warning(
            "%s: added token(s) %s: the text encoder has no vector for them, they are read as words", where, left
        )
    return known


def _pooled_at(eos: Any, config: TextConfig, where: Path) -> Literal["end", "largest"]:
    """transformers takes the largest id of a prompt where `eos_token_id` is 2, as in files of before its 4.31."""
    end = build_tokenizer(config).end
    if eos == _LEGACY_EOS:
        return "largest" if any(a.id > end for a in config.added) else "end"
    if eos not in (end, _DEFAULTS["eos_token_id"]) and config.output == "penultimate":  # SDXL, which uses the vector
        raise ValueError(f"{where}: eos_token_id {eos!r} is not one of {[_LEGACY_EOS, end]}")
    return "end"


def text_part(tower: OpenedText, *, projected: bool) -> tuple[dict[str, Any], weights.Source]:
    """`config.json` and HF-named weights, those of the projection only if it is `projected`."""
    assert isinstance(tower.config, TextConfig)
    layers = tower.config.layers - (tower.config.output == "penultimate_norm")
    cut = (f"transformer.resblocks.{layers}.",) + (() if projected else ("text_projection",))
    source = {k: e for k, e in tower.source.items() if not k.startswith(cut)}
    hf = maps.follow(maps.text_to_hf(source), source, "text tower")
    config, vocabulary = tower.config, build_tokenizer(tower.config).vocab_size
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width or 4 * config.width,
        "num_attention_heads": config.heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": config.context_length,
        "vocab_size": config.vocab_size,
        "projection_dim": config.projection or config.width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if config.pad == "eot" else 0,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
    }, hf
