"""The page of a run: its figures, curves, events and sample pictures, from the files in its folder alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data import decode
from ldm.web.chart import number
from ldm.web.gallery import Curve, Fact, Gallery, Picture

Row = dict[str, Any]
CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...], str, bool], ...] = (
    ("Loss", "What is minimised, and the same on held-out samples with fixed noise.",
     (("loss", "training"), ("validation_loss", "held out, averaged weights")), "loss", False),
    ("Loss by noise level", "Thirds of the time range: low noise is hard to guess, high noise decides the layout.",
     (("loss_low_noise", "low"), ("loss_middle_noise", "middle"), ("loss_high_noise", "high")), "loss", True),
    ("Gradient norm", "Before clipping.", (("grad_norm", "gradient norm"),), "norm", True),
    ("Learning rate", "", (("lr", "learning rate"),), "rate", False),
    ("Throughput", "Of all ranks together, pauses included.", (("images_per_second", "images/s"),), "images/s", False),
    ("Utilisation", "Counted operations over the peak of the machine, pauses included.",
     (("utilisation", "share of the peak"),), "share", False),
    ("Time of a step", "Each rank's own: waiting for data, and the forward.",
     (("data_seconds", "waiting for data"), ("slowest_rank_seconds", "slowest rank"),
      ("fastest_rank_seconds", "fastest rank")), "seconds", False),
    ("Memory", "Of the fullest rank.", (("memory_gib", "memory"),), "GiB", False),
)  # fmt: skip
"""Title, text, (metric, label) of the curves, y label, whether the y axis is logarithmic."""


@dataclass(frozen=True)
class Found:
    """What a run folder holds."""

    folder: Path
    rows: list[Row]
    events: list[Row]
    samples: list[Path]
    steps: int | None
    done: bool


def read(folder: Path) -> Found:
    """Raises ValueError when the folder has no log."""
    rows = _lines(folder / "log" / "metrics.jsonl")
    if not rows:
        raise ValueError(f"run {str(folder)!r}: no log/metrics.jsonl with a step in it")
    return Found(
        folder=folder,
        rows=rows,
        events=_lines(folder / "log" / "events.jsonl"),
        samples=sorted((folder / "samples").glob("step-*.png")),
        steps=_steps(folder),
        done=(folder / "done.json").is_file(),
    )


def _lines(path: Path) -> list[Row]:
    """The lines of a JSONL file that are whole; a run in training may be writing the last one."""
    found: list[Row] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                found.append(row)
    return found


def _steps(folder: Path) -> int | None:
    """How many steps the run is to have."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    from omegaconf import OmegaConf

    steps = OmegaConf.select(OmegaConf.load(path), "train.steps")
    return steps if isinstance(steps, int) else None


def curve(rows: Sequence[Row], metric: str, label: str) -> Curve | None:
    """A metric over steps; None with fewer than two points."""
    points = [(float(r["step"]), float(r[metric])) for r in rows if isinstance(r.get(metric), int | float)]
    if len(points) < 2:
        return None
    smooth = 0.9 if len(points) > 60 else 0.0
    return Curve(label, [x for x, _ in points], [y for _, y in points], smooth)


def duration(seconds: float) -> str:
    """3 d 4 h, 2 h 5 min, 3 min, 12 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _last(rows: Sequence[Row], metric: str) -> float | None:
    for row in reversed(rows):
        if isinstance(row.get(metric), int | float) and math.isfinite(row[metric]):
            return float(row[metric])
    return None


def facts(run: Found) -> list[Fact]:
    """The figures of now."""
    step = run.rows[-1]["step"]
    found = [Fact(number(step), "steps", f"of {number(run.steps)}" if run.steps else "")]
    loss, left = _last(run.rows, "loss"), _last(run.rows, "seconds_left")
    if loss is not None:
        validation = _last(run.rows, "validation_loss")
        found.append(Fact(f"{loss:.4g}", "loss", "" if validation is None else f"held out {validation:.4g}"))
    rate, share = _last(run.rows, "images_per_second"), _last(run.rows, "utilisation")
    if rate is not None:
        found.append(Fact(number(rate), "images a second", "" if share is None else f"{share:.0%} of the peak"))
    if run.done:
        found.append(Fact("done", "finished and exported"))
    elif left is not None:
        found.append(Fact(duration(left), "left at this pace"))
    cost = _last(run.rows, "cost")
    if cost is not None:
        found.append(Fact(f"{cost:.2f}", "cost so far"))
    return found


def page(run: Found, most: int = 8) -> Gallery:
    """The whole page; of the sample pictures at most `most`, evenly spaced, the last one first."""
    gallery = Gallery(run.folder.resolve().name, "What happened in this run so far.", eyebrow="ldm show run")
    gallery.facts(facts(run))
    if run.samples:
        section = gallery.section("Samples", "The same prompts and noise at each time.")
        places = sorted({round(i * (len(run.samples) - 1) / max(most - 1, 1)) for i in range(most)}, reverse=True)
        pictures = []
        for path in (run.samples[p] for p in places):
            pictures.append(Picture(decode.load(path), f"step {int(path.stem.removeprefix('step-')):,}"))
        section.grid(pictures, size=300)
    for title, text, metrics, label, log_y in CHARTS:
        curves = [c for c in (curve(run.rows, metric, name) for metric, name in metrics) if c is not None]
        if any(math.isfinite(v) and (v > 0 or not log_y) for c in curves for v in c.y):
            gallery.section(title, text).curve(curves, "step", label, log_y)
    if run.events:
        rows = [[e["step"], e.get("event", ""), _told(e)] for e in run.events[-50:]]
        gallery.section("Events", "Rollbacks, stragglers.").table(["step", "event", "details"], rows)
    config = run.folder / "config.yaml"
    if config.is_file():
        gallery.section("Config").command(*config.read_text(encoding="utf-8").splitlines())
    return gallery.footer(f"{len(run.rows)} lines of log/metrics.jsonl.")


def _told(event: Row) -> str:
    rest = {k: v for k, v in event.items() if k not in ("step", "event")}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
