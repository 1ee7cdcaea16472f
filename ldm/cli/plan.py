"""`ldm plan CONFIG`: memory, time and cost of a run before it is queued, counted without a GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.options import Parser

if TYPE_CHECKING:
    from ldm.data.mixture import Data
    from ldm.plan.throughput import Cluster
    from ldm.recipes import Task
    from ldm.train.trainer import TrainConfig

MOST = 10**12
"""Of anything that is counted."""


def parser() -> Parser:
    """Options of the verb."""
    p = Parser(
        prog="ldm plan",
        description="Memory, throughput, time and cost of a run, and what would go wrong, without a GPU.",
    )
    p.add_argument("config", nargs="?", help="a YAML file, such as configs/train/text_to_image_emoji.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.batch=2048")
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--gpus-per-node", type=int, help="(8; 1 with --card or --sample)")
    p.add_argument("--gpu", help="a100-80g (the default), a100-40g, h100, h200, v100-32g, l40s, rtx4090, rtx3060, ...")
    p.add_argument(
        "--card", type=float, metavar="GB",
        help="which settings make it fit into a card of 8, 12, 16, 24, ... GB: what to add, GB and minutes",
    )  # fmt: skip
    p.add_argument("--price", type=float, help="of one GPU for an hour, in any currency")
    p.add_argument("--inside", type=float, metavar="GB/s", help="link of a GPU within its node, one way")
    p.add_argument("--outside", type=float, metavar="GB/s", help="network of a node, one way, all ports together")
    p.add_argument("--samples", type=int, help="of the data, where it is not here")
    _add_drawing(p)
    p.add_argument("--json", action="store_true", help="as JSON")
    p.add_argument("--page", type=Path, metavar="OUT.html", help="also write a page with figures")
    return p


def _add_drawing(p: Parser) -> None:
    """What is drawn, with the options of `ldm sample`."""
    p.add_argument("--sample", metavar="MODEL", help="plan drawing with a model or a family (sdxl) in place of a run")
    p.add_argument("--size", type=int, help="with --sample: side in pixels (the family's)")
    p.add_argument("--count", type=int, default=1, help="with --sample: pictures at once")
    p.add_argument("--precision", default="fp32", help="with --sample: fp32, bf16 or fp16")
    p.add_argument("--text-precision", help="with --sample: fp32, bf16, fp16 or int8")
    p.add_argument("--offload", action="store_true", help="with --sample: parts are on the card while they are used")
    p.add_argument("--vae-slices", action="store_true", help="with --sample: decode one picture at a time")
    p.add_argument("--blocks-on-device", type=int, metavar="N", help="with --sample: so many blocks of the network")


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_words(argv)
    _check(args)

    from ldm.config.schema import load_run
    from ldm.plan.hardware import find, of_memory
    from ldm.plan.report import text
    from ldm.plan.rounds import plan as planned
    from ldm.plan.throughput import Cluster
    from ldm.recipes import plan_job
    from ldm.recipes.planned import Asked, told

    if args.config is None and args.sample is None:
        raise ValueError("no config given; such as: ldm plan configs/finetune/sd15_lora.yaml --card 12")
    hardware = find("a100-80g" if args.gpu is None else args.gpu)
    if args.card is not None:
        hardware = of_memory(args.card) if args.gpu is None else replace(hardware, memory=args.card)
    links = {k: v for k, v in (("inside", args.inside), ("outside", args.outside)) if v is not None}
    each = args.gpus_per_node
    if each is None:
        each = 8 if args.card is None and args.sample is None else 1
    cluster = Cluster(nodes=args.nodes, per_node=each, hardware=replace(hardware, **links))
    if args.sample is not None:
        return _drawn(args, cluster)
    assert args.config is not None
    config = load_run(args.config, args.overrides)
    if args.card is not None:
        return _fitted(args, cluster, config.name)
    with _in_words(args.config):
        asked = Asked(name=config.name, world=cluster.world, gpu=not hardware.host)
        job = plan_job(config.task, config.data, config.train, asked)
        plan = planned(job if args.samples is None else told(job, args.samples), cluster, args.price)
        answer = json.dumps(plan.record(), indent=1, allow_nan=False) if args.json else text(plan)
    print(answer)
    if args.page is not None:
        from ldm.web.plan import page

        args.page.parent.mkdir(parents=True, exist_ok=True)
        page(plan).write(args.page)
        if not args.json:
            print(f"\n{args.page}: the same with figures")
    return 0


def _fitted(args: argparse.Namespace, cluster: Cluster, name: str) -> int:
    """Say which settings make the run fit; 1 where none do."""
    from ldm.config.schema import load_run
    from ldm.plan.cards import text
    from ldm.recipes.planned_cards import Needs

    def load(words: tuple[str, ...]) -> tuple[Task, Data, TrainConfig]:
        run = load_run(args.config, [*args.overrides, *words])
        return run.task, run.data, run.train

    with _in_words(args.config):
        answer = Needs(load, name, cluster).answer()
    print(json.dumps(answer.record(), indent=1, allow_nan=False) if args.json else text(answer))
    return 0 if answer.way is not None else 1


def _drawn(args: argparse.Namespace, cluster: Cluster) -> int:
    """Say what drawing takes, and with --card the options with which it fits; 1 where it does not."""
    from ldm.plan.cards import text
    from ldm.recipes.planned_drawing import How, Model

    if args.config is not None:
        raise ValueError(f"--sample: plans drawing with {args.sample!r}; give no config beside it, got {args.config!r}")
    how = How(
        precision=args.precision, text_precision=args.text_precision, size=args.size, count=args.count,
        slices=args.vae_slices, offload=args.offload, places=args.blocks_on_device,
    )  # fmt: skip
    with _in_words(f"--sample {args.sample}"):
        model = Model(args.sample)
        answer = model.answer(how, cluster) if args.card is not None else model.alone(how, cluster)
    print(json.dumps(answer.record(), indent=1, allow_nan=False) if args.json else text(answer))
    return 0 if answer.way is not None else 1


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers that nothing can be planned with, by the option's name, before anything is counted."""
    for name in ("nodes", "gpus_per_node", "samples"):
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and not 1 <= value <= MOST:
            raise ValueError(f"{option} must be at {'least 1' if value < 1 else f'most {MOST:,}'}, got {value}")
    for name in ("inside", "outside", "price", "card"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and (value > 0 or (name == "price" and value == 0))):
            raise ValueError(f"--{name} must be {'at least' if name == 'price' else 'above'} 0, got {value:g}")
    if args.page is not None and args.page.is_dir():
        raise ValueError(f"--page: {str(args.page)!r} is a folder; expected a file's name, such as plan.html")


@contextlib.contextmanager
def _in_words(config: str) -> Iterator[None]:
    """What a network says of inputs that it cannot take, and numbers beyond a float, in one line."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Out of range float"):
            raise
        raise ValueError(f"{config}: cannot be planned: a figure is not finite") from error
    except OverflowError as error:
        raise ValueError(f"{config}: cannot be planned: a number is too large ({error})") from error
    except (RuntimeError, AssertionError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{config}: cannot be planned: its network does not run on its own inputs: {said}") from error
