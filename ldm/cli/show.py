"""`ldm show noising IMAGE`: what the forward process does to it; `ldm show run RUN [--live]`: a page of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm.cli.options import Parser
from ldm.words import near


def parser() -> Parser:
    """Options of the verb."""
    p = Parser(
        prog="ldm show", description="Pictures and pages that explain: how noise is added, and how a training run goes."
    )
    kinds = p.add_subparsers(dest="what", required=True)
    n = kinds.add_parser(
        "noising",
        help="a picture as more and more noise is added: strips and animations for each noise schedule, with curves",
    )
    n.add_argument("image", type=Path, help="a picture file")
    n.add_argument("--out", type=Path, default=Path("noising"), help="folder for the pictures")
    n.add_argument("--schedule", nargs="+", metavar="NAME", help="which schedules; all of them if left out")
    n.add_argument("--frames", type=int, default=11, help="times in a strip; animations have three times as many")
    n.add_argument("--size", type=int, default=96, help="the longer side of the pictures, pixels")
    n.add_argument("--seed", type=int, default=0, help="of the noise")
    r = kinds.add_parser("run", help="a run's curves, figures, events and sample pictures as one self-contained page")
    r.add_argument("run", type=Path, help="a run folder, in training or finished")
    r.add_argument("--out", type=Path, help="the page to write; RUN/run.html if left out")
    r.add_argument("--samples", type=int, default=8, help="at most so many sample pictures, evenly spaced")
    r.add_argument("--live", action="store_true", help="serve the page, which follows the run, until interrupted")
    r.add_argument("--host", default="127.0.0.1", help="with --live: 0.0.0.0 lets other machines in")
    r.add_argument("--port", type=int, default=7861, help="with --live; 0 takes a free one")
    return p


def _run(args: argparse.Namespace) -> int:
    from ldm.web import run

    if args.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {args.samples}")
    if args.live:
        return _live(args)
    found = run.read(args.run)
    out = run.page(found, args.samples).write(args.out or args.run / "run.html")
    print(f"{out}: step {found.rows[-1]['step']}, {len(found.rows)} points, {len(found.samples)} sample pictures")
    return 0


def _live(args: argparse.Namespace) -> int:
    from ldm.web.live import serve

    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port: must be in [0, 65535], got {args.port}")
    if args.out is not None:
        raise ValueError(f"--out {str(args.out)!r}: nothing is written with --live; leave one of both out")
    told = "{}   (follows the run; Ctrl-C ends the page, not the run)"
    serve(args.run, args.samples, args.host, args.port, lambda address: print(told.format(address), flush=True))
    return 0


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_args(argv)
    if args.what == "run":
        return _run(args)
    from PIL import Image

    from ldm.data import decode
    from ldm.web import noising

    names = args.schedule or list(noising.SCHEDULES)
    for name in names:
        if name not in noising.SCHEDULES:
            raise ValueError(
                f"schedule {name!r} is not one of {sorted(noising.SCHEDULES)}{near(name, noising.SCHEDULES)}"
            )
    if args.size < 1:
        raise ValueError(f"--size must be at least 1, got {args.size}")
    try:
        image = decode.load(args.image)
    except ValueError as error:
        raise ValueError(f"the picture cannot be read: {error}") from error
    if (count := decode.frames(args.image)) > 1:
        print(f"ldm show: {args.image}: the first of {count} frames or pages is taken", file=sys.stderr)
    scale = args.size / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    picture = image.resize(size, Image.Resampling.LANCZOS)
    schedules = {name: noising.SCHEDULES[name] for name in names}
    together = noising.strips(picture, schedules, args.frames, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    together.save(args.out / "strips.png")
    html = noising.page(picture, schedules, args.frames, args.seed)
    (args.out / "index.html").write_text(html, encoding="utf-8")
    for name, schedule in schedules.items():
        row = noising.strip(picture, schedule, noising.even_times(schedule, args.frames), args.seed)
        row.save(args.out / f"{name}.png")
        moving = noising.frames(picture, schedule, noising.even_times(schedule, 3 * args.frames), args.seed)
        (args.out / f"{name}.gif").write_bytes(noising.gif(moving))
    made = ", ".join(f"{name}.png and .gif" for name in names)
    print(f"{args.out}: index.html with the curves, strips.png, {made}")
    return 0
