"""`ldm convert IN OUT --to diffusers|compvis`: between model formats, a tensor at a time."""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = ("float32", "float16", "bfloat16")


def parser() -> argparse.ArgumentParser:
    """Options of the verb."""
    p = argparse.ArgumentParser(prog="ldm convert", description="Turn one model format into another.")
    p.add_argument("source", help="diffusers folder, single file (.safetensors, .ckpt) or hub id (owner/name)")
    p.add_argument("target", type=Path, help="folder, or file ending in .safetensors")
    p.add_argument("--to", required=True, choices=("diffusers", "compvis"), help="format of the target")
    p.add_argument("--dtype", choices=DTYPES, help="type of the stored weights; default: as they are")
    p.add_argument("--variant", help="read the files of this variant of a folder, such as fp16")
    p.add_argument("--ema", action="store_true", help="take the averaged U-Net of a single file")
    p.add_argument("--prediction", choices=("epsilon", "v"), help="what an SD 2.x single file predicts")
    return p


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_args(argv)
    import torch

    from ldm.checkpoint.convert import convert

    dtype = getattr(torch, args.dtype) if args.dtype else None
    counts = convert(
        args.source,
        args.target,
        args.to,
        dtype=dtype,
        variant=args.variant,
        ema=args.ema,
        prediction=args.prediction,
    )
    parts = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{args.target}: {args.to}, tensors: {parts}")
    return 0
