"""Accelerators and links, and the one set of constants that turns counts into seconds."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One accelerator and what connects it. Makers' figures: `memory` GB, `matmul` TFLOP/s of dense bf16, `matmul_fp32`
    of what float32 products use (TF32 where there is), `bandwidth` GB/s of its memory; `inside` GB/s an accelerator
    to others of its node, one way; `outside` GB/s a node, one way, all its network ports together; `pcie` GB/s between
    it and the host's memory, one way.
    """

    name: str
    memory: float
    matmul: float
    matmul_fp32: float
    bandwidth: float
    inside: float
    outside: float
    pcie: float = 32
    host: bool = False

    def __post_init__(self) -> None:
        for key in ("memory", "matmul", "matmul_fp32", "bandwidth", "inside", "outside", "pcie"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > 0):
                raise ValueError(f"{key} must be above 0, got {getattr(self, key)}")


_A100 = Hardware(
    name="a100-80g", memory=80, matmul=312, matmul_fp32=156, bandwidth=2039, inside=300, outside=200
)  # fmt: skip
_H100 = Hardware(
    name="h100", memory=80, matmul=989, matmul_fp32=494, bandwidth=3350, inside=450, outside=400, pcie=64
)  # fmt: skip
_KNOWN = (
    _A100,
    replace(_A100, name="a100-40g", memory=40, bandwidth=1555),
    _H100,
    replace(_H100, name="h200", memory=141, bandwidth=4800),
    Hardware(
        name="v100-32g", memory=32, matmul=125, matmul_fp32=15.7, bandwidth=900, inside=150, outside=12.5, pcie=16
    ),
    Hardware(name="l40s", memory=48, matmul=362, matmul_fp32=183, bandwidth=864, inside=32, outside=25),
    Hardware(name="a10g", memory=24, matmul=70, matmul_fp32=35, bandwidth=600, inside=16, outside=12.5),
    # Cards for desktops: tensor cores that add up in float32 reach twice the float32 rate in bf16, and it in TF32
    # (NVIDIA's papers on GA102, Ada and Blackwell). Half of a slot's lanes are there on those of 16 GB/s.
    Hardware(name="rtx4060", memory=8, matmul=30.2, matmul_fp32=15.1, bandwidth=272, inside=8, outside=12.5, pcie=16),
    Hardware(name="rtx3060", memory=12, matmul=25.5, matmul_fp32=12.7, bandwidth=360, inside=16, outside=12.5),
    Hardware(
        name="rtx4060ti", memory=16, matmul=44.1, matmul_fp32=22.1, bandwidth=288, inside=8, outside=12.5, pcie=16
    ),
    Hardware(name="rtx3090", memory=24, matmul=71, matmul_fp32=35.6, bandwidth=936, inside=16, outside=12.5),
    Hardware(name="rtx4090", memory=24, matmul=165, matmul_fp32=83, bandwidth=1008, inside=16, outside=12.5),
    Hardware(name="rtx5090", memory=32, matmul=209, matmul_fp32=105, bandwidth=1792, inside=32, outside=12.5, pcie=64),
    # A core of a server: for trying the planner beside a real run.
    Hardware(name="cpu", memory=8, matmul=0.06, matmul_fp32=0.06, bandwidth=10, inside=2, outside=1, host=True),
)
HARDWARE: dict[str, Hardware] = {h.name: h for h in _KNOWN}
CARDS = ("rtx4060", "rtx3060", "rtx4060ti", "rtx3090", "rtx5090", "l40s", "a100-80g", "h200")
"""By which a card is planned that is named by its memory alone, the smallest first."""


def find(name: str) -> Hardware:
    """By name, in capitals or not. Raises ValueError naming those that there are, and the nearest."""
    plain = name.strip().lower().replace("_", "-").removeprefix("nvidia-")
    if plain not in HARDWARE:
        near = [n for n in HARDWARE if plain and plain in n] or difflib.get_close_matches(plain, HARDWARE, n=1)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"gpu: {name!r} is not one of {list(HARDWARE)}{hint}")
    return HARDWARE[plain]


def of_memory(gigabytes: float) -> Hardware:
    """A card of so many GB: as fast as the smallest of `CARDS` that has as much, or as the largest of them."""
    if not (math.isfinite(gigabytes) and gigabytes > 0):
        raise ValueError(f"card: {gigabytes:g} GB; expected a size above 0, such as 12")
    known = [HARDWARE[name] for name in CARDS]
    return replace(next((h for h in known if h.memory >= gigabytes), known[-1]), memory=gigabytes)


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What eager PyTorch reaches of the makers' figures; the same for every accelerator, size and number of them.

    `matmul` and `memory`: shares of the peak rates that the network's kernels reach, its traffic counted once a kernel;
    `stream` that of memory which long element-wise kernels reach (optimizer, averages). `link` is the share that
    collectives reach of the links, `overlap` the share of a collective that can hide behind the backward pass, `jitter`
    the standard deviation of a rank's step over its mean. `step` are seconds of the framework between steps, `launch`
    those that it takes to start a kernel. `usable` is the share of the memory that contexts and fragmentation leave.
    `pcie` is the share of a slot's rate that copies from pinned memory reach, `host` GB/s of the host's memory that an
    optimizer there reaches.
    """

    matmul: float = 0.66
    memory: float = 0.31
    stream: float = 0.8
    link: float = 0.50
    overlap: float = 0.5
    jitter: float = 0.01
    step: float = 0.005
    launch: float = 6e-6
    usable: float = 0.92
    pcie: float = 0.75
    host: float = 20

    def __post_init__(self) -> None:
        for key in ("matmul", "memory", "stream", "link", "usable", "pcie"):
            if not 0 < getattr(self, key) <= 1:
                raise ValueError(f"{key} must be in (0, 1], got {getattr(self, key)}")
        if not (math.isfinite(self.host) and self.host > 0):
            raise ValueError(f"host must be above 0, got {self.host}")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap must be in [0, 1], got {self.overlap}")
