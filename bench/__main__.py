"""`python -m bench [name ...]`: each measurement in a process of its own, one after the other."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from launch.options import Parser, RawHelp, ended, near

NAMES = {
    "step": "a training step against a bare PyTorch loop, and what DeepSpeed and the EMA cost",
    "ranks": "DeepSpeed against DDP on 2 ranks, of linear at each ZeRO stage, the pause of a checkpoint, resuming",
    "unet": "the U-Net against diffusers' of the same shape: training and guided sampling",
    "transformers": "the transformers against diffusers': forward, training, guided sampling, peak memory",
    "compiling": "cold starts of torch.compile: the whole network against its equal blocks once",
    "finetune": "LoRA and DreamBooth steps against diffusers + PEFT: time and peak memory",
    "encoding": "cached against online encoding, images per second",
    "data": "the data path against reading by hand and webdataset; cached samples, resume, the order at 1e9 samples",
    "cli": "how long `ldm --help` takes",
    "memory": "the table of docs/memory.md: cards, families, settings with which they fit (measures nothing)",
    "quality": "recipes for equal processor seconds beside diffusers' common one; days, so only when it is named",
    "scale": "a simulated cluster: step time, stragglers and failures beside their closed forms (measures nothing)",
}

OWN = "quality"
"""Has options of its own (`python -m bench quality --help`), and is left out where no name is given but --quick."""


def main(argv: list[str]) -> int:
    """Measure; one name runs here, several run one process each."""
    return ended("bench", partial(_main, argv))


def _main(argv: list[str]) -> int:
    if OWN in argv and not any(name in argv for name in NAMES if name != OWN):
        rest = [word for word in argv if word != OWN]
        return importlib.import_module(f"bench.{OWN}.__main__").main(rest)
    parser = Parser(
        prog="python -m bench",
        description="Side-by-side measurements. Keep the machine quiet meanwhile.",
        epilog="\n".join(f"{name:<12} {text}" for name, text in NAMES.items()),
        formatter_class=RawHelp,
    )
    parser.add_argument("names", nargs="*", metavar="name", help="default: all of those below")
    parser.add_argument("--quick", action="store_true", help="the smallest size, only to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="threads, pinned to as many cores (1)")
    parser.add_argument("--rounds", type=int, help="timed rounds instead of each measurement's own number")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of training steps (auto)"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for NAME.json (runs/bench; none with --quick)")
    args = parser.parse_args(argv)
    unknown = [n for n in args.names if n not in NAMES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; one of {', '.join(NAMES)}{near(unknown[0], NAMES)}")
    names = args.names or [name for name in NAMES if args.quick or name != OWN]
    if len(names) > 1:
        rest = [a for a in argv if a not in NAMES]
        return max(subprocess.run([sys.executable, "-m", "bench", name, *rest]).returncode for name in names)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is loaded
    os.environ.setdefault("TQDM_DISABLE", "1")
    return _one(names[0], args)


def _one(name: str, args: argparse.Namespace) -> int:
    from bench.timing import Options, machine, pin

    cores = pin(args.threads)
    options = Options(quick=args.quick, threads=args.threads, rounds=args.rounds, precision=args.precision)
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    before = machine(args.threads, cores)
    result = importlib.import_module(f"bench.{name}").run(options)
    out = args.out or (None if args.quick else Path("runs/bench"))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{name}.json"
        path.write_text(json.dumps({"bench": name, "quick": args.quick, "machine": before, "result": result}, indent=1))
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
