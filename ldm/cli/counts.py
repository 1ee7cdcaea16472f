"""Options that count."""

from __future__ import annotations

import argparse


def check(args: argparse.Namespace, **least: int) -> None:
    """Raise ValueError, naming the option, for a count below its least; one that is not given or not there is fine."""
    given = vars(args)
    for name, smallest in least.items():
        value = given.get(name)
        if isinstance(value, int) and value < smallest:
            whole = "a whole number of " if name == "steps" else ""  # as the samplers say it
            raise ValueError(f"--{name.replace('_', '-')} must be {whole}at least {smallest}, got {value}")
