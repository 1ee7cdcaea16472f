"""`ldm evaluate inversion`: DDIM inversion of real pictures and back, against the autoencoder alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ldm.cli.measured import loaded, model_options


def add(verbs: Any) -> None:
    """Enter the verb."""
    p = verbs.add_parser(
        "inversion",
        help="how much DDIM inversion and drawing back changes a picture, compared with the autoencoder alone, in dB",
    )
    p.add_argument("--model", default="emoji", help="shipped model, run, diffusers folder or single file (emoji)")
    p.add_argument("--data", default="emoji", help="a shipped data set's name, a folder or a manifest (emoji)")
    p.add_argument("--split", default="heldout", help="as in train, heldout, compositional (heldout)")
    p.add_argument("--count", type=int, default=16, help="pictures (16)")
    p.add_argument("--seed", type=int, default=0, help="of the choice (0)")
    p.add_argument("--steps", type=int, default=250, help="steps each way (250)")
    p.add_argument("--refine", type=int, default=0, help="fixed-point iterations in each step, one more call each (0)")
    p.add_argument("--captions", action="store_true", help="under the pictures' captions instead of no prompt")
    p.add_argument("--batch", type=int, default=16, help="pictures at a time")
    model_options(p)
    p.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures and all settings here")
    p.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Measure and print."""
    from ldm import __version__
    from ldm.checkpoint.files import write_text
    from ldm.evaluate import measure
    from ldm.evaluate.roundtrip import round_trip

    drawn = measure.draw(args.data, args.split, args.count, seed=args.seed)
    pipeline = loaded(args.model, args)
    size = measure.side_of(pipeline)
    images = measure.real_pictures(args.data, args.split, drawn.ids, size)
    captions = drawn.captions if args.captions else [""] * len(images)
    found = round_trip(pipeline, images, captions, steps=args.steps, refine=args.refine, batch=args.batch)
    print(f"{len(images)} pictures of {size} pixels, data {args.data}, split {args.split}: {args.model}")
    print(f"autoencoder {found['psnr_autoencoder']:.2f} dB, after {args.steps} steps there and back ", end="")
    lost, worst = (round(found["lost"][k], 3) + 0.0 for k in ("mean", "worst"))  # no "-0.000"
    print(f"{found['psnr_round_trip']:.2f} dB: {lost:.3f} lost (worst {worst:.3f})")
    if args.out is not None:
        protocol = {
            "measure": "inversion", "version": __version__, "data": args.data, "split": args.split,
            "count": len(images), "seed": args.seed, "size": size, "model": args.model, "steps": args.steps,
            "refine": args.refine, "captions": args.captions, "sampler": "ddim", "guidance": 1.0,
            "weights": measure.model_hashes(pipeline), "precision": args.precision,
        }  # fmt: skip
        protocol |= {} if args.text_precision is None else {"text_precision": args.text_precision}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps({"protocol": protocol, "result": found}, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {args.out}")
    return 0
