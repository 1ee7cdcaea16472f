"""The rows of the measurement, in the order of their worth, and what each needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SIDES = ("ldm", "diffusers")
WHAT = {
    "full": "training, all weights",
    "lora": "training, LoRA",
    "engine": "training, all weights, DeepSpeed",
    "sampling": "sampling",
    "same": "one answer of both",
}
MODES = {"eager": "eager", "blocks": "compiled by block", "whole": "compiled whole", "graphs": "CUDA graphs, eager"}
LIMITS = {"eager": 40.0, "graphs": 40.0, "blocks": 100.0, "whole": 170.0}
"""Seconds that a row may take, building and compiling included."""
LEAST = {"eager": 8.0, "graphs": 8.0, "blocks": 30.0, "whole": 60.0}
"""Seconds below which a row is not begun."""


@dataclass(frozen=True)
class Row:
    """What is measured: a family of `families.FAMILIES`, whose network, doing what, run how, in which memory format."""

    family: str
    side: str
    what: str
    mode: str = "eager"
    layout: str = "contiguous"

    @property
    def id(self) -> str:
        """Its name."""
        return " ".join((self.family, self.side, self.what, self.mode, self.layout))

    @property
    def needs(self) -> tuple[str, ...]:
        """Packages beside torch."""
        peer = ("diffusers",) if self.side == "diffusers" or self.what == "same" else ()
        peft = ("peft",) if self.side == "diffusers" and self.what == "lora" else ()
        return peer + peft + (("deepspeed",) if self.what == "engine" else ())

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _pair(family: str, what: str, mode: str = "eager") -> list[Row]:
    """Ours and theirs; U-Nets are drawn in channels_last, as our pipeline has it in half precision."""
    layout = "channels_last" if what == "sampling" and family.startswith("sd") and family != "sd35" else "contiguous"
    return [Row(family, side, what, mode, layout) for side in SIDES]


def _grouped(rows: list[Row]) -> list[Row]:
    """One side after the other, so that a process measures several rows."""
    return [row for side in SIDES for row in rows if row.side == side]


def every() -> list[Row]:
    """All of them; what time does not suffice for is at the end."""
    first = [r for what in ("full", "lora", "sampling") for r in _pair("sd2", what)]
    first = _grouped([*first, *_pair("sd2", "full", "blocks"), *_pair("sd2", "sampling", "blocks")])
    for family in ("sd15", "sdxl", "sd35", "flux1", "flux2"):
        first += [r for what in ("full", "lora", "sampling") for r in _pair(family, what) if r.side == "ldm"]
    for family in ("sdxl", "sd35", "sd15", "flux1", "flux2"):
        first += [r for what in ("full", "lora", "sampling") for r in _pair(family, what) if r.side == "diffusers"]
    more = [Row("sd2", "ldm", "full", "whole"), Row("sd2", "ldm", "engine")]
    more += _grouped(_pair("sd2", "sampling", "graphs"))
    more += [Row(f, "diffusers", "same") for f in ("sd2", "sd15", "sdxl", "sd35", "flux1")]
    more += _grouped(_pair("sd2", "sampling", "whole"))
    layouts = (("sampling", "contiguous"), ("full", "channels_last"))  # the other one of each
    more += [Row("sd2", side, what, "eager", layout) for side in SIDES for what, layout in layouts]
    for family in ("sd35", "sdxl"):
        more += _grouped([r for what in ("sampling", "full") for r in _pair(family, what, "blocks")])
    more += [Row("sd2", "diffusers", "full", "whole")]
    more += _grouped([*_pair("sd15", "full", "blocks"), *_pair("sd15", "sampling", "blocks")])
    return [*first, *more]


def quick() -> list[Row]:
    """Every kind of row once, of the smallest networks; without compiling, which takes minutes on a CPU."""
    rows = [Row(f, "ldm", what) for f in ("sd2", "sdxl", "sd35", "flux1", "flux2") for what in ("full", "sampling")]
    rows += [Row("sd2", "ldm", "lora"), Row("sd2", "ldm", "engine")]
    rows += [Row("sd2", "ldm", "sampling", "graphs", "channels_last")]
    rows += [Row(f, "diffusers", "same") for f in ("sd2", "sdxl", "sd35", "flux1")]
    rows += [Row("sd2", "diffusers", what) for what in ("full", "lora", "sampling")]
    return [*rows, Row("flux1", "diffusers", "sampling"), Row("sd35", "diffusers", "full")]
