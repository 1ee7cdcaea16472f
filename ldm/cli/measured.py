"""The options of a measure's model, and the model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ldm.cli.options import TEXT_PRECISION_HELP, TEXT_PRECISIONS

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage


def model_options(parser: argparse.ArgumentParser) -> None:
    """How it draws: its size, precisions and device."""
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of its pictures (the model's own)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="fp32", help="of the network")
    parser.add_argument("--text-precision", choices=TEXT_PRECISIONS, help=TEXT_PRECISION_HELP + " (as --precision)")
    parser.add_argument("--device", help="that draws: cpu, cuda, ...; default: a GPU if there is one")


def loaded(source: str, args: argparse.Namespace) -> TextToImage:
    """The model, by these options. Raises ValueError for a size that it cannot draw."""
    from ldm import dist
    from ldm.pipeline import TextToImage
    from ldm.recipes.models import usable

    pipeline = TextToImage.load(
        usable(source, "--model"), device=args.device or dist.device(), precision=args.precision,
        text_precision=args.text_precision,
    )  # fmt: skip
    if args.size is not None:
        pipeline.pixels = (args.size, args.size)
        pipeline.latent_shape(None)
    return pipeline
