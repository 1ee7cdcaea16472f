"""Text encoders of every kind in their folders: what a folder holds, and what is written.

CLIP's towers are in `towers`; T5 and Qwen3 keep transformers' names and their tokenizers' files as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.checkpoint import weights
from ldm.checkpoint.opened import OpenedText
from ldm.checkpoint.settings import read_json
from ldm.checkpoint.tokenizers import save_tokenizer
from ldm.checkpoint.towers import STEM, open_text, text_part
from ldm.checkpoint.weights import Source
from ldm.models.text import build_tokenizer, copy_tokenizer
from ldm.models.text.config import AnyText, MissingConfig, QwenConfig, T5Config, TextConfig
from ldm.models.text.pretrained import tokenizer_folder
from ldm.models.text.qwen import FORMS as QWEN_FORMS
from ldm.models.text.qwen import TITLE as QWEN_TITLE
from ldm.models.text.t5 import FORMS as T5_FORMS
from ldm.models.text.t5 import TITLE as T5_TITLE

log = logging.getLogger(__name__)
_KINDS = {
    "clip": ("clip_text_model", "clip"),
    "t5": ("t5",),
    "qwen": ("qwen3",),
}
"""`model_type` of each kind's config.json."""
_ARCHITECTURES = {
    "CLIPTextModel": "clip",
    "CLIPTextModelWithProjection": "clip",
    "T5EncoderModel": "t5",
    "T5ForConditionalGeneration": "t5",
    "Qwen3ForCausalLM": "qwen",
    "Qwen3Model": "qwen",
}
_T5_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
"""What transformers takes for keys that are absent; here for those that are null too."""
_T5_ACTIVATIONS = {"gated-gelu": ("gelu_new", True), "relu": ("relu", False)}
_T5_ONLY: dict[str, tuple[Any, ...]] = {"is_decoder": (False,), "quantization_config": (None,)}
_QWEN_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
}
_QWEN_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
}


def kind_of(folder: Path) -> str:
    """ "clip", "t5" or "qwen", by a folder's config.json. Raises ValueError for another model, naming it."""
    hf = read_json(folder / "config.json")
    named = next((kind for name, kind in _ARCHITECTURES.items() if name in (hf.get("architectures") or [])), None)
    told = hf.get("model_type")
    kind = next((k for k, types in _KINDS.items() if told in types), None) if told else named
    if kind is None:
        known = [types[0] for types in _KINDS.values()]
        raise ValueError(f"{folder}: model_type {told!r} is not one of {known}, the text encoders that are supported")
    return kind


def open_encoder(
    folder: Path, tokenizer: Path, like: AnyText, *, variant: str | None = None, lenient: bool = False
) -> OpenedText:
    """A text encoder from a folder, with the tokenizer of another, used as its family does.

    `like` says how: of a `TextConfig` `output` and `zero_empty`; of the others all that is no setting of the model
    itself, such as `max_length` and `masked`. Raises ValueError for a model of another kind than that, for tensors that
    are not known unless `lenient`, and naming the key for settings that are not supported.
    """
    kind = kind_of(folder)
    if kind != like.kind:
        raise ValueError(f"{folder}: holds a text encoder of kind {kind!r}, expected {like.kind!r}")
    if isinstance(like, TextConfig):
        output, zeros = like.output, like.zero_empty
        return open_text(folder, tokenizer, output=output, zero_empty=zeros, variant=variant, lenient=lenient)
    hf = read_json(folder / "config.json")
    source = weights.open_folder(folder, STEM, variant)
    left: list[str] = []
    if isinstance(like, T5Config):
        config: AnyText = replace(
            like, **t5_settings(hf, folder), tokenizer=tokenizer_folder(tokenizer, T5_TITLE, T5_FORMS)
        )
        native = t5_names(source, left)
    else:
        assert isinstance(like, QwenConfig)
        config = replace(
            like, **qwen_settings(hf, folder), tokenizer=tokenizer_folder(tokenizer, QWEN_TITLE, QWEN_FORMS)
        )
        native = qwen_names(source, left)
    if left:
        log.info("%s: not used: %s", folder, weights.listed(left))
    return OpenedText(config, native)


def t5_settings(hf: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """A T5's settings as `T5Config` has them, with transformers' defaults; those that change nothing are left out.

    Raises ValueError naming the key for what is not supported.
    """
    _check_only(hf, _T5_ONLY, where)
    found = _with_defaults(hf, _T5_DEFAULTS, where)
    if (known := found["feed_forward_proj"]) not in _T5_ACTIVATIONS:
        raise ValueError(f"{where}: feed_forward_proj {known!r} is not one of {list(_T5_ACTIVATIONS)}")
    for key, only in zip(("dense_act_fn", "is_gated_act"), _T5_ACTIVATIONS[known], strict=True):
        if hf.get(key, only) not in (only, None):
            raise ValueError(f"{where}: {key} {hf[key]!r} is not {only!r}, which feed_forward_proj {known!r} has")
    return found


def qwen_settings(hf: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """A Qwen3's settings as `QwenConfig` has them, as `t5_settings`."""
    _check_only(hf, _QWEN_ONLY, where)
    if others := sorted({str(t) for t in hf.get("layer_types") or []} - {"full_attention"}):
        raise ValueError(f"{where}: layer_types {others[0]!r} is not supported; only 'full_attention' is")
    # transformers 4 writes rope_theta with rope_scaling, 5 writes rope_parameters with both
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise ValueError(f"{where}: rope_type {kind!r} is not supported; only 'default' is")
    found = _with_defaults(hf, _QWEN_DEFAULTS, where)
    return found | {"rope_theta": float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)}


def _check_only(hf: Mapping[str, Any], rules: Mapping[str, tuple[Any, ...]], where: Path | str) -> None:
    for key, only in rules.items():
        if hf.get(key) is not None and hf[key] not in only:
            raise ValueError(f"{where}: {key} {hf[key]!r} is not supported; only {only[0]!r} is")


def _with_defaults(hf: Mapping[str, Any], defaults: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    found = {key: default if hf.get(key) is None else hf[key] for key, default in defaults.items()}
    for key, default in defaults.items():
        value, kind = found[key], type(default)
        if kind is float and type(value) is int:
            found[key] = float(value)
        elif type(value) is not kind:
            named = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[kind]
            raise ValueError(f"{where}: {key} {value!r} is not {named}")
    return found


def t5_names(source: Source, left: list[str] | None = None) -> dict[str, weights.Entry]:
    """A T5 file's tensors by native name: the encoder's, with the embedding once.

    A decoder's and its head's are put into `left`.
    """
    out: dict[str, weights.Entry] = {}
    for name, entry in source.items():
        if name == "lm_head.weight" or name.startswith("decoder."):
            if left is not None:
                left.append(name)
        elif name != "encoder.embed_tokens.weight":
            out[name] = entry
    if "shared.weight" not in out and "encoder.embed_tokens.weight" in source:
        out["shared.weight"] = source["encoder.embed_tokens.weight"]
    return out


def qwen_names(source: Source, left: list[str] | None = None) -> dict[str, weights.Entry]:
    """A Qwen3 file's tensors by native name, without the head, which is put into `left`."""
    out: dict[str, weights.Entry] = {}
    for name, entry in source.items():
        if name == "lm_head.weight":
            if left is not None:
                left.append(name)
        else:
            out[name.removeprefix("model.")] = entry
    return out


def encoder_part(opened: OpenedText, *, projected: bool = True) -> tuple[dict[str, Any], Source]:
    """`config.json` and the tensors by the names that transformers reads; `projected` as `text_part` has it.

    Raises ValueError for an encoder that is left out.
    """
    config = opened.config
    if isinstance(config, T5Config):
        return _t5_json(config), opened.source
    if isinstance(config, QwenConfig):
        return _qwen_json(config), {f"model.{name}": entry for name, entry in opened.source.items()}
    if isinstance(config, MissingConfig):
        raise ValueError("text encoder: one that is left out has nothing to write")
    return text_part(opened, projected=projected)


def encoder_classes(config: AnyText, *, projected: bool = True) -> tuple[str | None, str | None]:
    """transformers' classes of an encoder and its tokenizer, as `model_index.json` names them; None where it is left
    out.
    """
    if isinstance(config, T5Config):
        return "T5EncoderModel", "T5TokenizerFast"
    if isinstance(config, QwenConfig):
        return "Qwen3ForCausalLM", "Qwen2TokenizerFast"
    if isinstance(config, MissingConfig):
        return None, None
    return "CLIPTextModelWithProjection" if projected else "CLIPTextModel", "CLIPTokenizer"


def write_tokenizer(folder: Path, config: AnyText) -> None:
    """The files of an encoder's tokenizer. Raises ValueError where the encoder has none."""
    if isinstance(config, TextConfig):
        save_tokenizer(folder, build_tokenizer(config), config.added)
        return
    if isinstance(config, MissingConfig):
        raise ValueError("tokenizer: a text encoder that is left out has none")
    title, forms = (T5_TITLE, T5_FORMS) if isinstance(config, T5Config) else (QWEN_TITLE, QWEN_FORMS)
    copy_tokenizer(tokenizer_folder(config.tokenizer, title, forms), folder)


def _t5_json(config: T5Config) -> dict[str, Any]:
    activation, gated = _T5_ACTIVATIONS[config.feed_forward_proj]
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **{key: getattr(config, key) for key in _T5_DEFAULTS},
        "dense_act_fn": activation,
        "is_gated_act": gated,
        "num_decoder_layers": config.num_layers,
        "is_encoder_decoder": True,
        "dropout_rate": 0.1,
        "classifier_dropout": 0.0,
        "initializer_factor": 1.0,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def _qwen_json(config: QwenConfig) -> dict[str, Any]:
    """The head is not kept, and nothing here uses it: the file says that it is the embedding's."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{key: getattr(config, key) for key in _QWEN_DEFAULTS},
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_window_layers": config.num_hidden_layers,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "use_cache": True,
    }
