"""`ldm train CONFIG [key=value ...]`."""

from __future__ import annotations

import json
import sys
from functools import partial

from ldm.cli import starts
from ldm.cli.options import Parser


def parser() -> Parser:
    """Options of the verb."""
    parser = Parser(
        prog="ldm train",
        description="Train from a YAML config. The same command again resumes from the newest checkpoint.",
        epilog="Several processes: python -m launch local --procs 2 -- ldm train CONFIG. Exit codes: 0 finished, 2 a "
        "mistake or a loss that is not finite, 70 hung, 73 the run folder was taken over, 74 a checkpoint could not be "
        "written, 75 told to stop: run the same command again.",
    )
    parser.add_argument("config", help="a YAML file, such as configs/train/text_to_image_emoji.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=100 out=runs/try")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config and DeepSpeed's, and stop"
    )
    parser.add_argument("--dry-run", action="store_true", help="check config and data, build everything, train nothing")
    starts.add(parser)
    return parser


def main(argv: list[str]) -> int:
    """Train; running the same command again resumes."""
    args = parser().parse_words(argv)

    from ldm.config.load import dump
    from ldm.config.schema import load_run

    config = load_run(args.config, args.overrides)
    resolved = dump(config)

    from ldm import dist
    from ldm.train import engine

    micro = config.train.micro_batch(dist.world_size())
    if args.print_config:
        print(resolved, end="")
        deepspeed = engine.deepspeed_config(config.train.engine, micro, config.train.accumulate)
        print("# DeepSpeed:\n" + "\n".join("# " + line for line in json.dumps(deepspeed, indent=1).splitlines()))
        return 0

    from ldm.recipes import assemble
    from ldm.recipes.run import run
    from ldm.train import zeropp

    zeropp.check(config.train.engine)  # refuse before anything is built
    build = partial(assemble, config.task, config.data, config.train, config.seed, config.workers)
    if args.dry_run:
        engine.start()
        assembly = build()
        trained = sum(p.numel() for p in assembly.objective.parameters() if p.requires_grad)
        print(f"ok: {trained:,} trained parameters, {assembly.loader.steps_per_epoch} steps an epoch")
        return 0
    from ldm.checkpoint.lock import LockLost
    from ldm.train.guards import LOST, UNSAVED
    from ldm.train.writer import SaveFailed

    try:
        return run(build, config.train, config.out, seed=config.seed, resolved=resolved, start=starts.start(args))
    except LockLost as error:
        code, said = LOST, error
    except SaveFailed as error:
        code, said = UNSAVED, error
    print(f"ldm train: {said}", file=sys.stderr)
    return code
