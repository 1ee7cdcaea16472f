"""`ldm export RUN OUT`: a run's weights as a model folder, also while it trains."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ldm.cli.options import Parser


def parser() -> Parser:
    """Options of the verb."""
    p = Parser(
        prog="ldm export",
        description="Write the folder that a run writes at its end (diffusers' for text to image) from one of its "
        "checkpoints. The run may be in training: only published, whole checkpoints are read.",
    )
    p.add_argument("run", type=Path, help="a run folder, or a checkpoint: RUN@N, RUN@best, RUN/checkpoints/step-N")
    p.add_argument("out", type=Path, help="the folder to write; it must not exist")
    p.add_argument("--step", type=int, help="a checkpoint's step; the newest if left out")
    p.add_argument(
        "--ema",
        default="ema",
        metavar="NAME",
        help="ema: the main average (default); raw: the weights as trained; a decay of train.ema.others; or a relative "
        "width such as 0.1, reconstructed from the snapshots of train.ema.power",
    )
    return p


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_args(argv)
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists already")

    from ldm.config.schema import load_run
    from ldm.recipes import assemble
    from ldm.recipes.models import run_of
    from ldm.train.chosen import choose

    run, step = run_of(args.run)
    if step is not None and args.step not in (None, step):
        raise ValueError(f"--step {args.step}: {str(args.run)!r} is the checkpoint of step {step}")
    config = load_run(run / "config.yaml")
    chosen = choose(run, args.step if step is None else step, args.ema)
    assembly = assemble(config.task, config.data, config.train, config.seed, 0)
    beside = args.out.with_name(f".{args.out.name}.tmp-{os.getpid()}")
    try:
        assembly.export(chosen.weights, beside)
        os.rename(beside, args.out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"{args.out}: step {chosen.step}, {chosen.what}")
    return 0
