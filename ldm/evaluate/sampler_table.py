"""How the table of `ldm evaluate samplers` is kept, row by row, and shown.

Every row is a file, written whole when it is measured, so that a run that was stopped goes on where it was and later
runs add rows. A row says how it was measured; one that was measured otherwise is never mixed in.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm import dist
from ldm.checkpoint import files
from ldm.evaluate import divided
from ldm.evaluate.sampler_measure import Judge, Measuring
from ldm.evaluate.sampler_rows import BOUNDS, Plan
from ldm.pipeline import Progress, TextToImage


class Table:
    """Measures the rows of a plan into a folder: `rows/NAME.json`, and all of them together in `results.json`."""

    def __init__(
        self,
        folder: Path,
        judge: Judge,
        load: Callable[[str], TextToImage],
        *,
        batch: int = 32,
        precision: str = "fp32",
    ) -> None:
        self.folder = folder
        self.measuring = Measuring(folder, judge, load, batch=batch, precision=precision)
        (folder / "rows").mkdir(parents=True, exist_ok=True)

    def run(self, plan: Plan, say: Callable[[str], None], progress: Progress | None = None) -> list[dict[str, Any]]:
        """Measure what is not there yet; all rows of the folder, also those of earlier runs. Collective.

        The ranks divide each row's pictures, rank 0 writes it.
        """
        cases = list(plan.cases())
        for number, case in enumerate(cases, 1):
            path = self.folder / "rows" / f"{case.name}.json"
            protocol = self.measuring.protocol(case)
            if divided.on_first_told(functools.partial(_there, path, protocol)):
                continue
            result = self.measuring.measure(case, protocol, progress)
            if dist.rank() == 0:
                row = {"protocol": protocol, "result": result}
                files.write_text(path, json.dumps(row, indent=1, ensure_ascii=False) + "\n")
                self.measuring.parts(case, protocol).remove(case.count, self.measuring.batch)
                say(f"{number}/{len(cases)} {line(row)}")
        rows = read(self.folder)
        if dist.rank() == 0:
            files.write_text(self.folder / "results.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        return rows


def _there(path: Path, protocol: dict[str, Any]) -> bool:
    """Whether a row is measured already. Raises ValueError if it was in another way."""
    if not path.is_file():
        return False
    same(path, json.loads(path.read_text(encoding="utf-8"))["protocol"], protocol)
    return True


def same(path: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError, naming the keys, if a row on disk was measured in another way.

    Rows of versions up to 0.1 do not say which samples the data set held.
    """
    free = {"version", "source"} | {"samples"} - was.keys()
    keys = [k for k in now if k not in free and was.get(k) != now[k]]
    if keys:
        told = ", ".join(f"{k} {was.get(k)!r}, now {now[k]!r}" for k in keys)
        raise ValueError(f"{path}: measured with {told}; give another --out, or remove the file to measure it again")


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows of a folder: bounds first, then by model, sampler, guidance and steps."""
    rows = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((folder / "rows").glob("*.json"))]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        p = row["protocol"]
        bound = p["sampler"] not in BOUNDS
        return bound, p["model"], p["sampler"], p["guidance"], p["clip_guidance"], p["steps"], p["split"]

    return sorted(rows, key=place)


def line(row: dict[str, Any]) -> str:
    """One row for the eye."""
    p, r = row["protocol"], row["result"]
    how = f"{p['model']} {p['sampler']}"
    if p["sampler"] not in BOUNDS:
        how += f" {p['steps']} steps, guidance {p['guidance']:g}"
        how += f", CLIP guidance {p['clip_guidance']:g}" if p["clip_guidance"] else ""
    cost = f", {r['loop_seconds_per_picture']:.3g} s a picture" if "loop_seconds_per_picture" in r else ""
    found = f"{p['split']}: KID {1000 * r['kernel_distance']['mean']:.2f}e-3, R@1 {r['R@1']['rate']:.3f}"
    return f"{how}, {found} ({p['count']} pictures{cost})"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table: a line for each way of drawing, the splits side by side."""
    splits = list(dict.fromkeys(row["protocol"]["split"] for row in rows))
    splits.sort(key=lambda s: (s != "train", s))
    keys = ("model", "sampler", "steps", "guidance", "clip_guidance")
    lines: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(tuple(row["protocol"][k] for k in keys), {})[row["protocol"]["split"]] = row
    head = ["model", "sampler", "steps", "guidance", "s / picture", "rows / picture"]
    if any(row["protocol"]["clip_guidance"] for row in rows):
        head.insert(4, "CLIP guidance")
    for split in splits:
        head += [f"KID·10³ {split}", f"R@1 {split}", f"R@5 {split}", "pictures"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, found in lines.items():
        model, sampler, steps, guidance, clip = key
        bound = sampler in BOUNDS
        cells = [model, sampler, "" if bound else str(steps), "" if bound else f"{guidance:g}"]
        cells += [f"{clip:g}"] if "CLIP guidance" in head else []
        for name, form in (("loop_seconds_per_picture", ".3g"), ("network_rows_per_picture", ".4g")):
            costs = [(r["result"][name], r["protocol"]["count"]) for r in found.values() if name in r["result"]]
            cells.append(format(sum(c * n for c, n in costs) / sum(n for _, n in costs), form) if costs else "")
        for split in splits:
            cells += _cells(found.get(split))
        out.append("| " + " | ".join(cells) + " |")
    told = Counter(said for row in rows for said in row["result"].get("warnings", ()))
    warnings = [f"- warning ({count} of {len(rows)} rows): {said}" for said, count in told.items()]
    return "\n".join([*out, "", NOTE, *([""] if warnings else []), *warnings]) + "\n"


NOTE = (
    "s / picture: the sampling loop of one process (network, solver, noise), divided by its batch; encoding prompts, "
    "decoding and what measures the pictures are not in it. rows / picture: how often the network saw it."
)


def _cells(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["", "", "", ""]
    r = row["result"]
    own = row["protocol"]["sampler"] == "real" and row["protocol"]["shared"]  # pictures compared with themselves
    kid = "" if own else f"{1000 * r['kernel_distance']['mean']:.2f} ± {1000 * r['kernel_distance']['std']:.2f}"
    rates = [f"{r[k]['rate']:.3f}" if k in r else "" for k in ("R@1", "R@5")]  # none where there are no 5 candidates
    return [kid, *rates, str(row["protocol"]["count"])]
