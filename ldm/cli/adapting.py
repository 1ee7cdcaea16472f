"""`--lora` and `--embedding` of verbs that draw."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import kept
from ldm.cli.options import Parser

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage


def add(p: Parser) -> None:
    """The options."""
    p.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="add a LoRA at a weight (1); may be repeated",
    )
    p.add_argument(
        "--embedding", action="append", default=[], metavar="PATH", help="add a textual-inversion file; may be repeated"
    )


def adapt(pipeline: TextToImage, args: argparse.Namespace, verb: str) -> None:
    """Load them."""
    for i, entry in enumerate(args.lora):
        path, strength = lora_of(entry)
        pipeline.load_lora(path, strength, name=f"{i} {path}", lenient=args.lenient)
    if args.embedding:
        kept.drop(pipeline)
    for path in args.embedding:
        words = " or ".join(map(repr, pipeline.load_embedding(path)))
        print(f"ldm {verb}: embedding {path}: called by {words}", file=sys.stderr)


def lora_of(entry: str) -> tuple[str, float]:
    """Path and weight; what stands behind the last colon is a weight unless the whole is a file."""
    path, colon, weight = entry.rpartition(":")
    if not colon or Path(entry).exists():
        return entry, 1.0
    with contextlib.suppress(ValueError):
        if math.isfinite(strength := float(weight)):
            return path, strength
    if Path(path).exists() or not Path(entry).suffix:
        raise ValueError(f"--lora {entry!r}: expected PATH or PATH:WEIGHT, such as style.safetensors:0.8")
    return entry, 1.0  # a file that is not there, whose name has a colon in it
