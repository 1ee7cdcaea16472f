"""The seam between denoising networks and everything that trains, draws, stores or plans them."""

from __future__ import annotations

from typing import Literal, cast, get_args

Granularity = Literal["none", "transformer", "block"]


def granularity(on: bool | Granularity) -> Granularity:
    """A setting of gradient checkpointing by its name. Raises ValueError for another name."""
    chosen = {True: "block", False: "none"}[on] if isinstance(on, bool) else on
    if chosen not in get_args(Granularity):
        raise ValueError(f"gradient_checkpointing {chosen!r} is not one of {list(get_args(Granularity))}")
    return cast("Granularity", chosen)
