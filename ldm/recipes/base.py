"""What a recipe gives the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ldm.data.stream import Stream
from ldm.objectives import Objective

if TYPE_CHECKING:
    from ldm.train.trainer import Hook


@dataclass
class Assembly:
    """One method put together: what is minimised, over what, what happens beside it, and how the result is written.

    `export(weights, folder)` takes the whole trained weights by their names below `trained`.
    """

    objective: Objective
    loader: Stream[Any]
    hooks: list[Hook]
    export: Callable[[dict[str, Tensor], Path], None]
