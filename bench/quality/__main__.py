"""`python -m bench quality`: recipes for equal processor seconds, beside the common one by diffusers."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from launch.options import Parser, RawHelp, ended

OUT = Path("runs/bench/quality")
QUICK_ROWS = ("base", "flow", "diffusers@1e-3")


def main(argv: list[str]) -> int:
    """Measure what is not yet measured, then tell all."""
    return ended("bench quality", partial(_main, argv))


def parser() -> Parser:
    """Options."""
    parser = Parser(
        prog="python -m bench quality",
        description="Time to quality: every recipe is trained for equal processor seconds, evaluation and set-up not "
        "counted, and judged alike. Finished runs are skipped and interrupted ones go on: the same command again.",
        epilog="All of it takes days of one core; --list tells. Several such processes share the work of one --out.",
        formatter_class=RawHelp,
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="these rows; all of a file by its name")
    parser.add_argument("--seeds", "--rounds", type=int, default=3, help="runs of each, with seeds 0, 1, ... (3)")
    parser.add_argument(
        "--budgets", nargs="+", type=float, metavar="S",
        help="processor seconds of training at which rows are measured (38 75 150 300 600 1200 1800)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of each run (1)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: the recipes' own")
    parser.add_argument("--out", type=Path, help=f"folder of the records ({OUT}; a temporary one with --quick)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put tables and picture into it: docs/quality.md")
    parser.add_argument("--quick", action="store_true", help="two tiny rows and the peer, to see that it runs")
    parser.add_argument("--list", action="store_true", help="tell the runs and which are done, and stop")
    parser.add_argument("--table", action="store_true", help="run nothing, tell what is there")
    parser.add_argument("--config", metavar="ROW", help="print a row's config for `ldm train`, and stop")
    return parser


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is loaded
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _check(args)
    if args.config:
        from bench.quality import rows
        from ldm.config.load import dump

        (name,) = rows.find([args.config])[:1]
        print(dump(rows.load(name).run), end="")
        return 0
    if args.quick and args.out is None:
        with tempfile.TemporaryDirectory(prefix="ldm-quality-") as folder:
            return _measure(args, Path(folder))
    return _measure(args, args.out or OUT)


def _check(args: argparse.Namespace) -> None:
    if args.seeds < 1:
        raise ValueError(f"--seeds: must be at least 1, got {args.seeds}")
    if args.budgets and min(args.budgets) <= 0:
        raise ValueError(f"--budgets: must be above 0 s, got {min(args.budgets):g}")
    if args.threads < 1:
        raise ValueError(f"--threads: must be at least 1, got {args.threads}")


def _measure(args: argparse.Namespace, out: Path) -> int:
    from bench.quality import rows, runs

    names = rows.find(args.only or (list(QUICK_ROWS) if args.quick else rows.names()))
    precision = "" if args.precision == "auto" else args.precision
    recipes = [rows.load(name, tiny=args.quick, precision=precision) for name in names]
    budgets = args.budgets or (runs.QUICK if args.quick else runs.MARKS)
    seeds = 1 if args.quick else args.seeds
    specs = runs.chosen(
        recipes, seeds, budgets, out=str(out), threads=args.threads, precision=precision, quick=args.quick
    )
    by_name = {recipe.name: recipe for recipe in recipes}
    todo = [s for s in specs if runs.finished(s, by_name[s.recipe]) is None]
    seconds = sum(s.budget for s in todo)
    print(f"{len(specs)} runs, {len(specs) - len(todo)} done; {seconds / 3600:.1f} h of training are left", flush=True)
    if args.list:
        for spec in specs:
            print(f"{'to do' if spec in todo else 'done':<6} {spec.name}")
        return 0
    code = 0 if args.table else _run(todo, args.quick)
    if code == 75:
        print("stopped: the same command again goes on", flush=True)
        return code
    return max(code, _tell(args, out, specs, by_name))


def _run(todo: list[Any], quick: bool) -> int:
    """Each in a process of its own, but for the smallest; the worst exit code. 75, told to stop, ends all."""
    from bench.quality import worker

    worst = 0
    for spec in todo:
        began = time.monotonic()
        print(f"{spec.name} ...", flush=True)
        argv = [sys.executable, "-m", "bench.quality.worker", json.dumps(spec.told())]
        code = worker.work(spec) if quick else waited(subprocess.Popen(argv))
        if code == 75:
            return code
        told = {0: "done", worker.BUSY: "another process is at it"}.get(code, f"failed with code {code}")
        print(f"{spec.name}: {told}, {time.monotonic() - began:.0f} s in all", flush=True)
        worst = max(worst, 0 if code == worker.BUSY else min(code, 1))
    return worst


def waited(process: subprocess.Popen[bytes]) -> int:
    """Its exit code, 75 once told to stop: the signal goes on to it, so that it saves."""
    import signal

    told: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        told.append(number)
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        while True:
            try:
                code = process.wait()
                return 75 if told else code
            except KeyboardInterrupt:  # which it has got too
                told.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(args: argparse.Namespace, out: Path, specs: list[Any], rows: dict[str, Any]) -> int:
    from bench.quality import runs, table
    from bench.timing import machine

    found = {name: runs.every(specs[0], recipe) for name, recipe in rows.items()}
    if not any(found.values()):
        print(f"nothing is measured yet in {out}")
        return 0
    titles = {name: row.about.title for name, row in rows.items()}
    teachers = {name: row.about.teachers for name, row in rows.items()}
    targets = tuple(args.budgets or runs.QUICK) if args.quick else table.TARGETS
    text = table.markdown(found, titles, teachers, targets)
    print(f"\n{text}")
    drawing = table.picture(found, teachers)
    told = {"rows": {name: [r["name"] for r in of] for name, of in found.items()}, "table": text}
    out.mkdir(parents=True, exist_ok=True)
    record = {"bench": "quality", "quick": args.quick, "machine": machine(args.threads, []), "result": told}
    (out / "quality.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (out / "quality.svg").write_text(drawing, encoding="utf-8")
    if args.write is not None:
        print(f"written: {args.write}, {table.write(args.write, text, drawing)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
