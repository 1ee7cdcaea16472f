"""`ldm evaluate prompts`: CLIP score, retrieval, diversity prompt by prompt, CMMD of all, and a sheet of pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.evaluate.divided import Parts, Rows

Draw = Callable[..., "tuple[Rows, dict[str, Any], Parts | None]"]
"""(options, captions, describe, judge, *, each, pictures) -> rows of all pictures, how they were drawn, their files."""


def add(parser: argparse.ArgumentParser, draw: Draw, protocol: Callable[..., dict[str, Any]]) -> None:
    """Options beside those of data and drawing; `draw` and `protocol` are those of all measures."""
    parser.add_argument("--each", type=int, default=4, help="pictures of each prompt (4)")
    parser.add_argument(
        "--clip", default="clip_emoji", help="the judge: shipped CLIP, a run, or open_clip:ARCH:WEIGHTS (clip_emoji)"
    )
    parser.add_argument(
        "--no-diversity", action="store_true", help="leave out diversity, the perceptual distance between pairs"
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="write a contact sheet: a row for each prompt, worst fit first"
    )
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="write the figures of each prompt")
    parser.set_defaults(run=lambda args: main(args, draw, protocol))


def main(args: argparse.Namespace, draw: Draw, protocol: Callable[..., dict[str, Any]]) -> int:
    """Draw, measure, print, write."""
    from ldm import dist
    from ldm.checkpoint.files import write_text
    from ldm.data import decode
    from ldm.data.grid import sheet
    from ldm.evaluate import divided, measure, prompts
    from ldm.metrics import worth
    from ldm.metrics.features import EfficientNetLite0
    from ldm.recipes.sources import load_clip

    drawn = measure.draw(args.data, args.split, args.count, seed=args.seed)
    clip, config = load_clip(measure.exported(args.clip))
    network = None if args.no_diversity or args.each < 2 else EfficientNetLite0()
    maps = None if network is None else network.perceptual_features
    judge = measure.judge_protocol(args.clip, clip, config) | {"each": args.each, "diversity": network is not None}
    shown = None if args.sheet is None else args.sheet.with_suffix(".parts")
    captions = tuple(c for c in drawn.captions for _ in range(args.each))

    def describe(images: Tensor, part: range) -> Rows:
        return prompts.described(images, args.each, clip, config, maps)

    found_rows, how, parts = draw(args, captions, describe, judge, each=args.each, pictures=shown, clip=clip)
    size = how["size"]

    def real(part: range) -> Rows:
        pictures = measure.real_pictures(args.data, args.split, [drawn.ids[i] for i in part], size)
        return {"clip": measure.clip_features(pictures, clip, config)}

    real_rows = divided.described(len(drawn.ids), 64, real)
    if dist.rank():
        return 0
    rows = prompts.figures(found_rows, drawn.captions, args.each, clip, config)
    found = prompts.summary(rows, found_rows["clip"], real_rows["clip"])
    print(f"{len(rows)} prompts, {args.each} pictures each, data {args.data}, split {args.split}, by {args.clip}")
    for name, value in found.items():
        if value is not None:
            print(f"{name}: {value:.4f}")
    said = worth.discrepancy(len(captions), len(drawn.ids)) + worth.judged(how["judge_knows_text"])
    for line in said:
        print(f"warning: {line}")
    order = sorted(range(len(rows)), key=lambda i: rows[i].clip_score)
    print("fit worst: " + "; ".join(rows[i].prompt for i in order[:5]))
    _write(args.table, prompts.table(rows, args.each), write_text)
    if args.sheet is not None and parts is not None:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        chosen = [j for i in order for j in range(i * args.each, (i + 1) * args.each)]
        sheet([decode.picture(parts.picture(j).read_bytes()) for j in chosen], args.each).save(args.sheet)
        print(f"written: {args.sheet}")
        if args.keep is None:
            parts.remove(len(captions), max(args.each, args.batch // args.each * args.each))
    told = protocol(args, "prompts", len(rows)) | how | {k: v for k, v in judge.items() if k != "diversity"}
    told |= {"diversity_network": None if network is None else f"efficientnet_lite0@{size}"}
    result = found | {"prompts": [vars(row) for row in rows], "warnings": said}
    _write(args.out, json.dumps({"protocol": told, "result": result}, indent=1, ensure_ascii=False) + "\n", write_text)
    return 0


def _write(path: Path | None, text: str, write_text: Callable[[Path, str], None]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        print(f"written: {path}")
