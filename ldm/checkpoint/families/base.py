"""What is told of the files of one family of transformers, everything in one place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.checkpoint.lora_layers import Table
from ldm.checkpoint.pairs import Pair
from ldm.checkpoint.weights import Source
from ldm.models.text.config import AnyText

PICTURES = ("feature_extractor", "image_encoder")
"""Parts that pipelines name and that are not read here."""


def nothing_else(source: Source) -> str | None:
    """Of a family without relatives under the same names."""
    return None


@dataclass(frozen=True, kw_only=True)
class Files:
    """How files of one family of transformers are laid out, and name what is in them.

    `title`: the family's. `config`: the class of its network's settings, whose `kind` is the family's key.

    Folders in diffusers' layout: `pipelines` that are read, the first is written where `pipeline` chooses none;
    `network`: classes of the network, the first is written; `forms`: others' forms of its config turned into ours;
    `text`: the kind of each text encoder, of which the first `needed` must be there, and `texts`, how the family uses
    them (`pipeline` is the folder's, where one tells it); `nothing`: parts that its pipeline names and does not have.

    Single files: `mark`, a tensor that tells the family; `pairs`, all tensors of a network; `settings`, what the
    shapes of a file (the second is what messages call it) tell; `unlike`, whose file it is instead where shapes tell a
    relative; `unused`: tensors that are no weights; `encoders`: what stands behind `text_encoders.`; `vae`: the
    beginning of the autoencoder's names, `autoencoder` its preset, `scheduler` the published one's settings.

    LoRA files: `layers`, the authors' table of the network's layers; `more`, tables of further names; `also`, the
    authors' layers under other names; `marks`: a name, with underscores, that tells the family; `header` of kohya's
    files, None where kohya's scripts know no such network.
    """

    title: str
    config: type[Any]
    pipelines: tuple[str, ...]
    pipeline: Callable[[Any, tuple[AnyText, ...]], str] | None = None
    network: tuple[str, ...]
    forms: Callable[[dict[str, Any], str], dict[str, Any]]
    text: tuple[str, ...]
    needed: int
    texts: Callable[[Any, str | None], tuple[AnyText, ...]]
    nothing: tuple[str, ...] = ()
    mark: str
    pairs: Callable[[Any], list[Pair]]
    settings: Callable[[Source, str], Any]
    unlike: Callable[[Source], str | None] = nothing_else
    unused: tuple[str, ...] = ()
    encoders: tuple[str, ...]
    vae: str = "vae."
    autoencoder: Callable[[Any], str]
    scheduler: Callable[[Any], dict[str, Any]]
    layers: Callable[[Any], Table]
    more: tuple[Callable[[Any], Table], ...] = ()
    also: Mapping[str, str] = field(default_factory=dict)
    marks: re.Pattern[str]
    header: Callable[[Any], dict[str, str]] | None
