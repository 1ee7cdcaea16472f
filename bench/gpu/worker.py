"""Measures rows one after the other in a process of its own: `python -m bench.gpu.worker RESULTS SPEC`.

SPEC is JSON: the device, whether it is quick, rows, and the monotonic clock's time at which all is to `end`. Every row
is announced and answered by a line in RESULTS, as it may take the process with it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.gpu import drawing, training
from bench.gpu.families import FAMILIES, Family, tiny
from bench.gpu.rows import LEAST, Row
from bench.gpu.timed import fresh, memory, spread, timed

TRAINING, DRAWING = 2.0, 3.0
"""Seconds in which steps of a training and of a drawing are counted."""


def measure(row: Row, device: str, quick: bool) -> dict[str, Any]:
    """A row's figures. A batch that does not fit is halved."""
    family = tiny(FAMILIES[row.family]) if quick else FAMILIES[row.family]
    if row.what == "same":
        return {"apart": drawing.same(family, device)}
    if row.what == "sampling":
        return _drawn(row, family, device, quick)
    batch = family.batch
    while True:
        try:
            return _trained(row, family, batch, device, quick)
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2  # outside, where the failed step's tensors are no longer held
        fresh(device)


def _trained(row: Row, family: Family, batch: int, device: str, quick: bool) -> dict[str, Any]:
    if row.what == "engine":
        step = training.engine(family, batch, device, row.mode)
    else:
        make: Callable[..., training.Step] = training.ours if row.side == "ldm" else training.theirs
        step = make(family, batch, device, row.mode, lora=row.what == "lora", layout=row.layout)
    for _ in range(1 if quick else 2):
        step()
    seconds = timed(step, device, 0.0 if quick else TRAINING)
    return _figures(batch, seconds, device)


def _drawn(row: Row, family: Family, device: str, quick: bool) -> dict[str, Any]:
    make = drawing.ours if row.side == "ldm" else drawing.theirs
    draw = make(family, device, row.mode, row.layout)
    for _ in range(1 if quick or row.mode in ("eager", "graphs") else 2):
        draw(2)
    seconds = timed(lambda: draw(family.steps), device, 0.0 if quick else DRAWING, 1)
    return _figures(family.drawn, seconds, device) | {"steps": family.steps}


def _figures(batch: int, seconds: list[float], device: str) -> dict[str, Any]:
    found = spread(seconds)
    rate = batch / found["median"]
    return {"batch": batch, "seconds": found, "images_per_second": rate, **memory(device)}


def main(argv: list[str]) -> int:
    """Measure the rows of a specification."""
    results, spec = Path(argv[0]), json.loads(argv[1])
    device = spec["device"]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for given in spec["rows"]:
        row = Row(**given)
        if time.monotonic() + LEAST[row.mode] > spec["end"]:
            _say(results, row.id, {"status": "left out", "why": "no time was left"})
            continue
        _say(results, "begin", row.id)
        fresh(device)
        try:
            answer = measure(row, device, spec["quick"]) | {"status": "measured"}
        except Exception as error:
            answer = {"status": "failed", "why": told(error)}
        _say(results, row.id, answer)
        if answer["status"] == "failed" and not _usable(device):
            return 1  # the parent begins another process for what is left
    return 0


def told(error: BaseException) -> str:
    """Its kind and first lines, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _usable(device: str) -> bool:
    """Whether the card still computes: after an illegal access no call of the process does."""
    try:
        return float(torch.ones(8, device=device).sum()) == 8.0
    except RuntimeError:
        return False


def _say(path: Path, key: str, value: Any) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps([key, value]) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
