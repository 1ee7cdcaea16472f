"""`ldm plan CONFIG`: memory, time and cost of a run before it is queued, counted without a GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ldm.cli.options import Parser

MOST = 10**12
"""Of anything that is counted."""


def parser() -> Parser:
    """Options of the verb."""
    p = Parser(
        prog="ldm plan",
        description="Memory, throughput, time and cost of a run, and what would go wrong, without a GPU.",
    )
    p.add_argument("config", help="a YAML file, such as configs/train/text_to_image_emoji.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.batch=2048")
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--gpus-per-node", type=int, default=8)
    p.add_argument("--gpu", default="a100-80g", help="a100-80g, a100-40g, h100, h200, v100-32g, l40s, ...")
    p.add_argument("--price", type=float, help="of one GPU for an hour, in any currency")
    p.add_argument("--inside", type=float, metavar="GB/s", help="link of a GPU within its node, one way")
    p.add_argument("--outside", type=float, metavar="GB/s", help="network of a node, one way, all ports together")
    p.add_argument("--samples", type=int, help="of the data, where it is not here")
    p.add_argument("--json", action="store_true", help="as JSON")
    p.add_argument("--page", type=Path, metavar="OUT.html", help="also write a page with figures")
    return p


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_words(argv)
    _check(args)

    from ldm.config.schema import load_run
    from ldm.plan.hardware import find
    from ldm.plan.report import text
    from ldm.plan.rounds import plan as planned
    from ldm.plan.throughput import Cluster
    from ldm.recipes import plan_job
    from ldm.recipes.planned import Asked, told

    hardware = find(args.gpu)
    links = {k: v for k, v in (("inside", args.inside), ("outside", args.outside)) if v is not None}
    cluster = Cluster(nodes=args.nodes, per_node=args.gpus_per_node, hardware=replace(hardware, **links))
    config = load_run(args.config, args.overrides)
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


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers that nothing can be planned with, by the option's name, before anything is counted."""
    for name in ("nodes", "gpus_per_node", "samples"):
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and not 1 <= value <= MOST:
            raise ValueError(f"{option} must be at {'least 1' if value < 1 else f'most {MOST:,}'}, got {value}")
    for name in ("inside", "outside", "price"):
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
