"""Options of verbs that open a model: which of its weights are read, and what its network predicts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ldm.cli.options import Parser

if TYPE_CHECKING:
    from ldm.pipeline.loading import Which


def add(p: Parser) -> None:
    """The options, with the names of `ldm convert`."""
    p.add_argument("--variant", help="of a folder: read the weights of this variant, such as fp16")
    p.add_argument("--ema", action="store_true", help="of a single file: read its averaged weights, if it holds both")
    p.add_argument("--prediction", choices=("epsilon", "v"),
                   help="what an SD 2.x single file predicts")  # fmt: skip


def which(args: argparse.Namespace) -> Which:
    """What was asked for; nothing of what was not."""
    asked: Which = {}
    if args.variant:
        asked["variant"] = args.variant
    if args.ema:
        asked["ema"] = True
    if args.prediction:
        asked["prediction"] = args.prediction
    return asked
