"""Options of all methods of `ldm finetune` that change the config after the method made it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.cli.options import Parser


def add(p: Parser) -> None:
    """Held-out losses, sample pictures, captions."""
    p.add_argument("--sample-prompts", type=Path, metavar="FILE", help="sample prompts as kohya's scripts read them: a "
                   "line each, with --w --h --s --d --l --n; beside those of --prompt")  # fmt: skip
    p.add_argument("--no-first-samples", action="store_true", help="no sample pictures before the first step")
    p.add_argument("--validate", type=float, metavar="SHARE", help="hold this share of --images out and measure its "
                   "loss; not of a built data set, whose split test is taken")  # fmt: skip
    p.add_argument("--validation-images", type=Path, metavar="FOLDER", help="measure the loss of these pictures")
    p.add_argument("--validate-every", type=int, metavar="STEPS", help="how often (default: as the samples)")
    p.add_argument("--keep-best", action="store_true", help="keep the checkpoint of the lowest such loss: RUN@best")
    p.add_argument("--preserve", nargs="?", const="", metavar="CLASS", help="of a LoRA: keep the model's answers to "
                   "captions with the class's word in the place of --trigger (of dreambooth --class)")  # fmt: skip
    p.add_argument("--preserve-blank", action="store_true", help="of a LoRA: keep its answers to no words")
    p.add_argument("--trigger", default="", metavar="WORD",
                   help="a word for every caption: for [trigger] in it, or before one that lacks it")  # fmt: skip
    p.add_argument("--wildcards", action="store_true",
                   help="draw one of each {a|b|c} in captions at every step; captions are not cached then")  # fmt: skip


def applied(tree: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The config with what was asked for. Raises ValueError naming the option."""
    _samples(tree["task"]["samples"], args)
    _validation(tree, args)
    if args.preserve is not None and args.preserve_blank:
        raise ValueError("--preserve: with --preserve-blank; one of both")
    if args.preserve is not None:
        tree["task"]["preserve"] = {"kind": "class"} | ({"word": args.preserve} if args.preserve else {})
    if args.preserve_blank:
        tree["task"]["preserve"] = {"kind": "blank"}
    data = tree["data"]
    sources = [data] if "sources" not in data else [s["data"] for s in data["sources"]]
    if args.trigger:
        if args.method in ("dreambooth", "textual-inversion"):
            raise ValueError(f"--trigger {args.trigger!r}: {args.method} has a word of its own; leave it out")
        sources[0]["trigger"] = args.trigger
    if args.wildcards:
        if args.method in ("dreambooth", "textual-inversion"):
            raise ValueError(f"--wildcards: {args.method} has captions of its own; leave it out")
        sources[0]["wildcards"] = True
        tree["task"]["cache"] = None
    return tree


def _samples(samples: dict[str, Any], args: argparse.Namespace) -> None:
    if args.no_first_samples:
        samples["first"] = False
    if args.sample_prompts is None:
        return
    from ldm.interop.prompts import Prompt, read_prompts, samples_of

    read = read_prompts(args.sample_prompts)
    if odd := sorted({o for p in read for o in p.odd}):
        raise ValueError(f"--sample-prompts {str(args.sample_prompts)!r}: {', '.join(odd)}: not known; allowed are "
                         "--w --h --s --d --l --n")  # fmt: skip
    if not read:
        raise ValueError(f"--sample-prompts {str(args.sample_prompts)!r}: no prompt in it")
    found = samples_of([*[Prompt(p) for p in args.prompt], *read])
    samples["settings"] = samples["settings"] | found.pop("settings")
    samples |= found


def _validation(tree: dict[str, Any], args: argparse.Namespace) -> None:
    from ldm.recipes.pictures import is_set

    if args.validate is not None and args.validation_images is not None:
        raise ValueError("--validate: with --validation-images; one of both")
    asked = args.validate is not None or args.validation_images is not None
    if not asked and (args.keep_best or args.validate_every is not None):
        option = "--keep-best" if args.keep_best else "--validate-every"
        raise ValueError(f"{option}: of a held-out loss; add --validate SHARE or --validation-images FOLDER")
    if not asked:
        return
    every = args.samples_every if args.validate_every is None else args.validate_every
    found: dict[str, Any] = {"every": every, "times": 8, "keep_best": args.keep_best}
    if args.validation_images is not None:
        found |= {"images": str(args.validation_images), "path": f"{tree['out']}/data/validation"}
    elif not is_set(args.images):
        if args.validate is None or not 0 < args.validate < 1:
            raise ValueError(f"--validate {args.validate}: expected a share between 0 and 1, such as 0.1")
        found["share"] = args.validate
    tree["train"]["validate"] = found
