"""The text encoders of a whole model in its folder: which stand where, and how their family uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from ldm.checkpoint import encoders, towers, weights
from ldm.checkpoint.families import FILES
from ldm.checkpoint.index import encoders_there, two_towers
from ldm.checkpoint.opened import OpenedText
from ldm.checkpoint.pipelines import numbered
from ldm.checkpoint.settings import read_json, write_json
from ldm.models.networks import AnyNetwork
from ldm.models.shipped import text_home
from ldm.models.text import (
    AnyText,
    MissingConfig,
    Output,
    TextConfig,
)
from ldm.models.transformers.sd3 import SD3Config

OUTPUT = "ldm_output"
"""A key of ours in a tower's `config.json`: which of its states condition, where it is not as the family has it."""


def usual(config: AnyNetwork, pipeline: str | None = None) -> tuple[AnyText, ...]:
    """How a family of transformers uses its text encoders: settings of which those that a folder tells are replaced."""
    return FILES[config.kind].texts(config, pipeline)


def open_encoders(
    folder: Path, index: Mapping[str, Any], config: AnyNetwork, *, variant: str | None = None, lenient: bool = False
) -> tuple[OpenedText, ...]:
    """All text encoders of a folder of a transformer; zeros for SD3's T5 where it is left out beside two towers.

    Raises ValueError naming one that is missing and needed.
    """
    there = encoders_there(index, config.kind, folder)
    out = []
    for i, like in enumerate(usual(config, index.get("_class_name"))):
        if there[i]:
            out.append(open_one(folder, i, like, variant=variant, lenient=lenient))
    if isinstance(config, SD3Config) and there == [True, True, False]:
        out.append(missing_t5(config))
    return tuple(out)


def missing_t5(config: SD3Config) -> OpenedText:
    """What stands in the place of SD3's T5."""
    return OpenedText(MissingConfig(width=config.joint_attention_dim), {})


def open_one(
    folder: Path, place: int, like: AnyText, *, variant: str | None = None, lenient: bool = False
) -> OpenedText:
    """The encoder of a place in a model's folder, used as `like` says."""
    home = text_home(folder)
    where, tokenizer = home / numbered("text_encoder", place), home / numbered("tokenizer", place)
    if isinstance(like, TextConfig):
        output = read_json(where / "config.json").get(OUTPUT, like.output)
        if output not in get_args(Output):
            raise ValueError(f"{where}: {OUTPUT} {output!r} is not one of {list(get_args(Output))}")
        like = replace(like, output=output)
    found = encoders.open_encoder(where, tokenizer, like, variant=variant, lenient=lenient)
    if isinstance(like, TextConfig) and like.projection is None and getattr(found.config, "projection", None):
        assert isinstance(found.config, TextConfig)
        source = {k: e for k, e in found.source.items() if k != "text_projection"}
        return OpenedText(replace(found.config, projection=None), source)  # FLUX.1 takes the vector as it is
    return found


def open_towers(
    folder: Path, index: Mapping[str, Any], *, variant: str | None = None, lenient: bool = False
) -> tuple[OpenedText, ...]:
    """The one or two CLIP towers of a U-Net's folder."""
    two = two_towers(index, folder)
    zeros = two and bool(index.get("force_zeros_for_empty_prompt", True))
    output: Output = "penultimate" if two else "last"
    text, home = [], text_home(folder)
    for i in range(1 + two):
        where, tokenizer = home / numbered("text_encoder", i), home / numbered("tokenizer", i)
        text.append(
            towers.open_text(where, tokenizer, output=output, zero_empty=zeros, variant=variant, lenient=lenient)
        )
    return tuple(text)


def write_one(folder: Path, place: int, tower: OpenedText, like: AnyText | None, projected: bool, **how: Any) -> None:
    """An encoder with its tokenizer into a model's folder.

    `like` is how the family uses it; `how` goes to `weights.write_folder`.
    """
    where = folder / numbered("text_encoder", place)
    told, source = encoders.encoder_part(tower, projected=projected)
    if isinstance(tower.config, TextConfig) and isinstance(like, TextConfig) and tower.config.output != like.output:
        told |= {OUTPUT: tower.config.output}
    encoders.write_tokenizer(folder / numbered("tokenizer", place), tower.config)
    where.mkdir()
    write_json(where / "config.json", told)
    weights.write_folder(where, towers.STEM, source, **how)
