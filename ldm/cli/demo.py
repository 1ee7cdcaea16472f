"""`ldm demo`: the main job on the embedded data, and a page that shows it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ldm.cli.options import Parser


def parser() -> Parser:
    """Options of the verb."""
    parser = Parser(
        prog="ldm demo",
        description="Train a small text-to-image model on the embedded emoji and write a gallery page.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the demo's config, such as train.steps=100"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder")
    parser.add_argument("--procs", type=int, default=2, help="training processes")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    return parser


def main(argv: list[str]) -> int:
    """Train a small model, draw, measure, and write the gallery; running it again goes on where it stopped."""
    args = parser().parse_words(argv)
    if args.procs < 1:
        raise ValueError(f"--procs: must be at least 1, got {args.procs}")

    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {line}", file=sys.stderr, flush=True)

    say("loading ...")
    from ldm.config.schema import load_run
    from ldm.data.mixture import main_source
    from ldm.demo import run as demo
    from ldm.models.shipped import ASSETS, DEFAULT
    from ldm.pipeline import Settings, TextToImage

    file = ASSETS / "demo.yaml"
    overrides = [f"out={args.out}", f"task.cache={args.out / 'cache'}", *args.overrides]
    config = load_run(file, overrides)
    settings = Settings(sampler="dpmpp_2m", steps=20, guidance=3.0, seed=args.seed, batch=32)
    shipped = TextToImage.load(DEFAULT, precision="auto")
    args.out.mkdir(parents=True, exist_ok=True)
    job = demo.Demo(config, args.out, shipped, demo.Scorer("clip_emoji", main_source(config.data).path), settings, say)
    page = demo.run(job, file, overrides, args.procs)
    say("done")
    print(f"contact sheet: {(args.out / 'contact_sheet.png').resolve()}")
    print(f"gallery page:  {page.resolve()}")
    return 0
