"""The records as tables and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.quality.curve import MEASURES, Curve, Measure, Reached, Sooner, best, curve, sooner
from ldm.web.chart import Curve as Line
from ldm.web.figure import Panel, svg

COMMON = "diffusers"
"""The file whose rates the common recipe takes its best of."""
TARGETS = (300.0, 1800.0)
"""Processor seconds after which the common recipe's quality is what others must reach."""
PICTURE = "images/quality_curves.svg"

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""By row, the records of its runs."""
Titles = Mapping[str, str]


def is_common(name: str) -> bool:
    return name.partition("@")[0] == COMMON


def curves(records: Records, teachers: Mapping[str, Sequence[str]], measure: Measure) -> dict[str, Curve]:
    """By row; those that the measure's judge has taught are left out."""
    found = {n: curve(of, measure) for n, of in records.items() if measure.judge not in teachers.get(n, ())}
    return {name: own for name, own in found.items() if own}


def markdown(records: Records, titles: Titles, teachers: Mapping[str, Sequence[str]], targets: Sequence[float]) -> str:
    """All tables; "" without records."""
    if not any(records.values()):
        return ""
    parts = [_machine(records)]
    for target in targets:
        if found := _targets(records, titles, teachers, target):
            parts.append(found)
    for measure in MEASURES:
        parts.append(_values(records, titles, teachers, measure))
    return "\n\n".join(parts) + "\n"


def _machine(records: Records) -> str:
    every = [r for of in records.values() for r in of]
    cpus = ", ".join(dict.fromkeys(r["machine"]["cpu"] for r in every))
    threads = ", ".join(dict.fromkeys(str(r["identity"]["threads"]) for r in every))
    torch = ", ".join(dict.fromkeys(r["machine"]["torch"] for r in every))
    off = max(abs(p["seconds"] / p["mark"] - 1) for r in every for p in r["points"])
    quick = " The smallest sizes, to see that it runs: the figures mean nothing." if _quick(every) else ""
    return (
        f"{len(every)} runs on {cpus}, threads {threads}, torch {torch}, until {max(r['made'] for r in every)}. Runs "
        f"ended within {100 * off:.0f} % of their budgets; what is interpolated stands at the seconds that "
        f"they took.{quick}"
    )


def _quick(records: Sequence[Mapping[str, Any]]) -> bool:
    return any(r["identity"]["protocol"]["pictures"] < 128 for r in records)


def _head(words: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(words)} |", f"|{'---|' * len(words)}"]


def _values(records: Records, titles: Titles, teachers: Mapping[str, Sequence[str]], measure: Measure) -> str:
    """One measure: rows by marks; what was measured on the way of a decaying run is in no cell."""
    found = curves(records, teachers, measure)
    marks = sorted({m for own in found.values() for m in own})
    lines = _head([measure.title, "seeds", "steps/s", *(f"{m:g} s" for m in marks)])
    for name in records:
        if not records[name]:
            continue
        seeds = len({r["seed"] for r in records[name]})
        own, cells = found.get(name), []
        for mark in marks:
            cell = own.get(mark) if own else None
            told = "" if cell is None else measure.form.format(cell.mean)
            if cell is not None and cell.spread is not None:
                told += f" ± {measure.form.format(cell.spread)}"
            cells.append(told)
        if own is None:
            cells = ["taught by the judge", *[""] * (len(marks) - 1)]
        lines.append(f"| {_title(name, titles)} | {seeds} | {_rate(records[name])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rate(records: Sequence[Mapping[str, Any]]) -> str:
    """Optimizer steps a processor second, of all runs together."""
    last = [r["points"][-1] for r in records]
    return f"{sum(p['step'] for p in last) / sum(p['seconds'] for p in last):.2f}"


def _targets(records: Records, titles: Titles, teachers: Mapping[str, Sequence[str]], mark: float) -> str:
    """Seconds until the common recipe's quality at a mark, by each measure; "" where it was not measured there."""
    columns, told = [], []
    for measure in MEASURES:
        found = curves(records, teachers, measure)
        common = {name: own for name, own in found.items() if is_common(name)}
        if (name := best(common, mark, measure)) is None:
            continue
        cell = common[name][mark]
        rows = {n: sooner(own, cell.at, cell.mean, measure) for n, own in found.items() if not is_common(n)}
        columns.append((measure, rows))
        told.append(f"{measure.title}: {measure.form.format(cell.mean)} ({name})")
    if not columns:
        return ""
    lines = [
        f"Processor seconds until the quality of the common recipe after {mark:g} (its best rate by each measure: "
        f"{'; '.join(told)}), how many times sooner that is, and the seeds' own seconds:",
        "",
        *_head(["recipe", *(measure.title for measure, _ in columns)]),
    ]
    for name in records:
        if not is_common(name) and records[name]:
            cells = [_sooner(rows.get(name)) for _, rows in columns]
            lines.append(f"| {_title(name, titles)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sooner(found: Sooner | None) -> str:
    if found is None:
        return ""
    each = f" ({_seconds(found.seeds)})" if len(found.seeds) > 1 else ""
    bound = f"{found.bound} " if found.bound else ""
    return f"{_reached(found.reached)} s{each}, {bound}**{found.ratio:.2f}**"


def _seconds(seeds: Sequence[Reached]) -> str:
    return ", ".join(_reached(r) for r in sorted(seeds, key=lambda r: r.seconds))


def _reached(reached: Reached) -> str:
    sign = {"": "", "at most": "≤ ", "at least": "> "}[reached.bound]
    return f"{sign}{reached.seconds:.3g}" if reached.seconds < 1000 else f"{sign}{reached.seconds:.0f}"


def _title(name: str, titles: Titles) -> str:
    return f"`{name}` {titles.get(name, '')}".strip()


def picture(records: Records, teachers: Mapping[str, Sequence[str]]) -> str:
    """An SVG: one panel a measure, one line a row, ends of runs alone."""
    panels = []
    for measure in MEASURES:
        found = curves(records, teachers, measure)
        lines = [Line(n, [c.at for c in own.values()], [c.mean for c in own.values()]) for n, own in found.items()]
        panels.append(Panel(measure.title, lines, "processor seconds", log_x=True))
    return svg(panels)


def write(page: Path, text: str, drawing: str) -> Path:
    """The tables between the page's marks, the picture in its folder of images; the picture's path."""
    from bench.gpu.table import insert

    path = page.parent / PICTURE
    path.parent.mkdir(parents=True, exist_ok=True)
    insert(page, f"![Quality over processor seconds]({PICTURE})\n\n{text}", option="--write")
    path.write_text(drawing, encoding="utf-8")
    return path
