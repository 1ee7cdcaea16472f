"""Options of every verb that trains: how a start treats what is in the run folder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.recipes.run import Start


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="resume although data, seed, objective, ... differ from those of the checkpoint, and log what differs",
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="begin at step 0; what an earlier run wrote into the folder is kept in its earlier-N",
    )


def start(args: argparse.Namespace) -> Start:
    """What was asked for."""
    from ldm.recipes.run import Start

    return Start(allow=args.allow_changes, scratch=args.from_scratch)
