"""`python -m bench.gpu`: the tests marked `gpu`, then training and sampling beside the plan and beside diffusers.

Writes gpu.json, and the table of docs/gpu.md where a card was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu import rows as all_rows
from bench.gpu import schema, table, testing
from bench.gpu.rows import Row
from bench.gpu.runner import ROOT, Answer, child, end, measured, to_file, why
from launch.options import Parser, ended

CARD, TESTS, PLAN = 90.0, 0.34, 60.0
"""Seconds to look at the machine, share of the time that tests may take, seconds that a plan may be waited for."""


def main(argv: list[str]) -> int:
    """Measure; 0 also where rows failed, as they say so themselves, 1 where a test did."""
    return ended("bench.gpu", partial(_main, argv))


def _main(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to see that it runs (cuda)")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, whose figures mean nothing")
    parser.add_argument("--minutes", type=float, default=9.5, help="the whole ends within (9.5)")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has this in it, such as sd2")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu.json"), help="(runs/bench/gpu.json)")
    parser.add_argument("--docs", type=Path, help="page for the table (docs/gpu.md where a card is measured whole)")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, got {args.minutes:g}")
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu: is only to see that it runs; add --quick")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ldm-gpu-") as folder:
        record = _record(args, Path(folder), began)
    if record is None:
        parser.error(f"no {args.device} device works here with this torch; `ldm doctor` says why")
    schema.check(record)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = table.markdown(record)
    whole = args.device == "cuda" and not (args.quick or args.only or args.no_tests)
    page = args.docs or (ROOT / "docs" / "gpu.md" if whole else None)
    print(f"\n{text}\nwritten: {args.out}")
    if page is not None:
        table.insert(page, text)
        print(f"written: {page}")
    return 1 if record["tests"]["failed"] else 0


def _record(args: argparse.Namespace, folder: Path, began: float) -> dict[str, Any] | None:
    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f}  {text}", flush=True)

    until, card = began + 60 * args.minutes, folder / "card.json"
    machine = to_file(["-m", "bench.gpu.card", str(card), args.device], card, CARD, tell=tell)
    if machine is None:
        return None
    peak = f"peak {machine['peak_tflops']:.4g} TFLOP/s ({machine['peak_of']})"
    tell(f"{machine['card']}: {peak}, torch {machine['torch']}")
    chosen = [r for r in (all_rows.quick() if args.quick else all_rows.every()) if args.only in r.id]
    asked = sorted({(r.family, "full" if r.what == "engine" else r.what) for r in chosen if r.what != "same"})
    plan, spec = folder / "plan.json", {"machine": machine, "asked": asked, "quick": args.quick}
    planner = child(["-m", "bench.gpu.planned", str(plan), json.dumps(spec)], folder / "plan.log")
    try:
        tests = _no_tests()
        if not args.no_tests:
            tests = testing.run(folder, TESTS * 60 * args.minutes, tell)
        answers: dict[Row, Answer] = {}
        for row, answer in measured(chosen, args.device, args.quick, until, machine["packages"]):
            answers[row] = answer
            tell(f"{row.id}: {_in_short(answer)}")
        planned = _planned(planner, plan, until, tell)
    finally:
        end(planner)
    from bench.gpu.families import FAMILIES, tiny

    families = {name: tiny(f) if args.quick else f for name, f in FAMILIES.items()}
    found = [_joined(row, answers[row], families[row.family], planned, machine) for row in chosen]
    return {
        "schema": schema.VERSION,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": args.quick,
        "machine": {k: v for k, v in machine.items() if k != "rates"},
        "tests": tests,
        "rows": found,
        "scaled": scaled(found),
        "seconds": round(time.monotonic() - began, 1),
    }


def _no_tests() -> dict[str, Any]:
    return {"passed": 0, "failed": 0, "skipped": 0, "failing": [], "left_out": {}, "ended": "not run", "seconds": 0.0}


def _in_short(answer: Answer) -> str:
    if answer["status"] != "measured":
        return f"{answer['status']}: {answer['why']}"
    if "apart" in answer:
        return f"{answer['apart']:.1e} apart"
    peak = "" if answer["peak_gb"] is None else f", {answer['peak_gb']:.1f} GB"
    return f"batch {answer['batch']}, {answer['images_per_second']:.3g} images/s{peak}"


def _planned(planner: Any, path: Path, until: float, tell: Any) -> dict[str, Any]:
    """What the planner has written; it has run beside all the rest."""
    while planner.poll() is None and time.monotonic() < until + PLAN:
        time.sleep(0.1)
    if (code := planner.poll()) != 0:
        tell(f"the plan is not whole: {'no end in time' if code is None else why(code, path.with_suffix('.log'))}")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _joined(row: Row, answer: Answer, family: Any, planned: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """A row as it is written: with operations, the share of the peak rate, and the plan for the batch that ran."""
    title = family.title + (f", {family.blocks}" if family.blocks else "")
    record = {**row.record(), "title": title, "pixels": 8 * family.side, "why": "", **answer}
    if answer["status"] != "measured" or row.what == "same":
        return record
    plan = planned.get(f"{row.family} {'full' if row.what == 'engine' else row.what}")
    record |= {"tflop_per_image": None, "mfu": None, "planned": None}
    if plan is not None:
        record["tflop_per_image"] = plan["flops"] / 1e12
        record["mfu"] = answer["images_per_second"] * plan["flops"] / (machine["peak_tflops"] * 1e12)
        if of := plan["batches"].get(str(answer["batch"])):
            record["planned"] = {"images_per_second": answer["batch"] / of["seconds"], "peak_gb": of["peak_gb"]}
    return record


def scaled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """FLUX.1 whole by the line through two numbers of blocks, where both were measured at one batch."""
    from bench.gpu.families import FAMILIES, FLUX_PARTS, FLUX_WHOLE

    few, more = (FAMILIES[f"flux{n}"] for n in FLUX_PARTS)
    counts = [f.config.num_layers for f in (few, more)]  # type: ignore[union-attr]
    found = []
    known = {(r["family"], r["side"], r["what"]): r for r in rows if r["status"] == "measured" and r["mode"] == "eager"}
    for (family, side, what), first in known.items():
        second = known.get((more.name, side, what))
        if family != few.name or second is None or what == "same" or first["batch"] != second["batch"]:
            continue

        def at_whole(a: float | None, b: float | None) -> float | None:
            return None if a is None or b is None else a + (b - a) * (FLUX_WHOLE - counts[0]) / (counts[1] - counts[0])

        seconds = at_whole(first["seconds"]["median"], second["seconds"]["median"])
        if seconds is None or seconds <= 0:  # two times of nearly nothing
            continue
        rate, peak = first["batch"] / seconds, at_whole(first["peak_gb"], second["peak_gb"])
        found.append(
            {"side": side, "what": what, "batch": first["batch"], "seconds": seconds, "images_per_second": rate}
            | {"peak_gb": peak}
        )
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
