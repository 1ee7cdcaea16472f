"""`ldm evaluate prompts`: CLIP score, retrieval, diversity prompt by prompt, CMMD of all, and a sheet of pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Draw = Callable[[argparse.Namespace, tuple[str, ...]], "tuple[Tensor, dict[str, Any]]"]


def add(parser: argparse.ArgumentParser, draw: Draw, protocol: Callable[..., dict[str, Any]]) -> None:
    """Options beside those of data and drawing; `draw` and `protocol` are those of all measures."""
    parser.add_argument("--each", type=int, default=4, help="pictures of each prompt (4)")
    parser.add_argument("--clip", default="clip_emoji", help="the judge: shipped CLIP or a run's export (clip_emoji)")
    parser.add_argument("--no-diversity", action="store_true", help="leave out the perceptual distance of pairs")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="pictures, a row a prompt, worst fit first")
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="the figures of each prompt")
    parser.set_defaults(run=lambda args: main(args, draw, protocol))


def main(args: argparse.Namespace, draw: Draw, protocol: Callable[..., dict[str, Any]]) -> int:
    """Draw, measure, print, write."""
    if args.each < 1:
        raise ValueError(f"each: must be at least 1, got {args.each}")

    from ldm.checkpoint.files import write_text
    from ldm.data.grid import sheet, to_pil
    from ldm.evaluate.features import EfficientNetLite0
    from ldm.recipes import measure, prompts
    from ldm.recipes.sources import load_clip, weights_hash

    drawn = measure.draw(args.data, args.split, args.count, seed=args.seed)
    clip, config = load_clip(measure.exported(args.clip))
    network = None if args.no_diversity or args.each < 2 else EfficientNetLite0()
    images, how = draw(args, tuple(c for c in drawn.captions for _ in range(args.each)))
    real = measure.real_pictures(args.data, args.split, drawn.ids, images.shape[-1])
    maps = None if network is None else network.perceptual_features
    rows = prompts.by_prompt(images, drawn.captions, args.each, clip, config, maps)
    found = prompts.summary(rows, images, real, clip, config)
    print(f"{len(rows)} prompts, {args.each} pictures each, data {args.data}, split {args.split}, by {args.clip}")
    for name, value in found.items():
        if value is not None:
            print(f"{name}: {value:.4f}")
    order = sorted(range(len(rows)), key=lambda i: rows[i].clip_score)
    print("fit worst: " + "; ".join(rows[i].prompt for i in order[:5]))
    _write(args.table, prompts.table(rows), write_text)
    if args.sheet is not None:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        shown = [j for i in order for j in range(i * args.each, (i + 1) * args.each)]
        sheet(to_pil(images[shown]), args.each).save(args.sheet)
        print(f"written: {args.sheet}")
    told = protocol(args, "prompts", len(rows)) | how | {"each": args.each, "clip": args.clip}
    told |= {"clip_weights": weights_hash(clip), "clip_size": config.image_size}
    told |= {"diversity_network": None if network is None else f"efficientnet_lite0@{images.shape[-1]}"}
    result = found | {"prompts": [vars(row) for row in rows]}
    _write(args.out, json.dumps({"protocol": told, "result": result}, indent=1, ensure_ascii=False) + "\n", write_text)
    return 0


def _write(path: Path | None, text: str, write_text: Callable[[Path, str], None]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        print(f"written: {path}")
