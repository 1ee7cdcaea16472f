"""`ldm distill lcm|tcd|dmd|progressive CONFIG [key=value ...]`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ldm.cli import starts
from ldm.cli.options import Parser

if TYPE_CHECKING:
    from ldm.config.schema import RunConfig
    from ldm.recipes.distill import DistillTask
    from ldm.recipes.run import Start

METHODS = {
    "lcm": "latent consistency distillation, of all weights or as LCM-LoRA",
    "tcd": "trajectory consistency distillation",
    "dmd": "distribution matching, a student beside a critic",
    "progressive": "halving the steps round by round, one run folder a round",
}


def parser() -> Parser:
    """Options of the verb."""
    parser = Parser(
        prog="ldm distill",
        description="Distillation: train a student that draws in a few steps what its teacher draws in many. The "
        "same command again resumes.",
        epilog="methods: " + "; ".join(f"{name}: {text}" for name, text in METHODS.items()),
    )
    parser.add_argument("method", choices=tuple(METHODS), help="the method; must be the config's task.method.kind")
    parser.add_argument("config", help="a YAML file, such as configs/distill/lcm_emoji.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=100 out=runs/try")
    parser.add_argument(
        "--print-rounds", action="store_true", help="print the rounds of progressive distillation, and stop"
    )
    starts.add(parser)
    return parser


def main(argv: list[str]) -> int:
    """Distil; running the same command again resumes, in whichever round."""
    args = parser().parse_words(argv)

    from ldm.config.schema import load_run
    from ldm.recipes.distill import DistillTask

    config = load_run(args.config, args.overrides)
    if not isinstance(config.task, DistillTask):
        raise ValueError(f"task.kind: 'distill' is needed here, got {config.task.kind!r}")
    if config.task.method.kind != args.method:
        raise ValueError(f"task.method.kind: {config.task.method.kind!r} in the config is not {args.method!r}")
    if args.method != "progressive":
        return _run(config, starts.start(args))
    return _progressive(config, config.task, args.print_rounds, starts.start(args))


def _progressive(config: RunConfig, task: DistillTask, show: bool, start: Start) -> int:
    import shutil

    from ldm import dist
    from ldm.recipes.rounds import prediction_of, rounds

    planned = rounds(task, config.out, prediction_of(task.teacher))
    if show:
        print("\n".join(f"{config.out / r.name}  from {r.task.teacher}" for r in planned))
        return 0
    for r in planned:
        dist.say(f"{r.name}: from {r.task.teacher}")
        code = _run(replace(config, name=f"{config.name}-{r.name}", out=config.out / r.name, task=r.task), start)
        if code:
            return code
    last, export = config.out / planned[-1].name / "export", config.out / "export"
    if dist.rank() == 0:
        beside = export.with_name(".export.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(last, beside)
        shutil.rmtree(export, ignore_errors=True)
        beside.rename(export)
        dist.say(f"the last round's student: {export}")
    dist.barrier()
    return 0


def _run(config: RunConfig, start: Start) -> int:
    from ldm.config.load import dump
    from ldm.recipes import assemble
    from ldm.recipes.run import run

    config.train.micro_batch(_world())  # refuse before anything is built
    build = partial(assemble, config.task, config.data, config.train, config.seed, config.workers)
    return run(build, config.train, config.out, seed=config.seed, resolved=dump(config), start=start)


def _world() -> int:
    from ldm import dist

    return dist.world_size()
