"""The rows of `ldm.evaluate.quality` as a line each and as a table, with what their figures are worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

BOUNDS = ("real", "autoencoder")
"""Rows without a sampler: the captions' own pictures, as they are and through the autoencoder."""


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
