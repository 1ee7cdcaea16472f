"""`ldm convert IN OUT --to diffusers|compvis|lora|kohya`: between model formats; a tuned model as a LoRA."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.cli.options import Parser

DTYPES = ("float32", "float16", "bfloat16")
LORA = ("lora", "kohya")


def parser() -> Parser:
    """Options of the verb."""
    p = Parser(prog="ldm convert", description="Turn one model format into another.")
    p.add_argument("source", help="diffusers folder, single file (.safetensors, .ckpt) or hub id (owner/name)")
    p.add_argument("target", type=Path, help="folder, or file ending in .safetensors")
    p.add_argument("--to", required=True, choices=("diffusers", "compvis", *LORA), help="format of the target; lora "
                   "(diffusers' file) and kohya: what tells the source from --base, best at --rank")  # fmt: skip
    p.add_argument("--base", help="the model that the source was tuned from, for --to lora and kohya")
    p.add_argument("--rank", type=int, default=16, help="of --to lora and kohya")
    p.add_argument("--dtype", choices=DTYPES, help="type of the stored weights; default: as they are")
    p.add_argument("--variant", help="read the files of this variant of a folder, such as fp16")
    p.add_argument("--ema", action="store_true", help="take the averaged U-Net of a single file")
    p.add_argument("--prediction", choices=("epsilon", "v"), help="what an SD 2.x single file predicts")
    return p


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_args(argv)
    import torch

    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.to in LORA:
        return _extract(args, dtype or torch.float32)
    from ldm.checkpoint.convert import convert

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


def _extract(args: argparse.Namespace, dtype: Any) -> int:
    """The source's difference from its base as a LoRA file."""
    from ldm.adapters.low_rank import extract
    from ldm.checkpoint.lora_files import write_lora
    from ldm.pipeline import TextToImage

    if args.base is None:
        raise ValueError(f"--to {args.to}: needs --base, the model that the source was tuned from")
    if args.target.suffix != ".safetensors":
        raise ValueError(f"target {str(args.target)!r}: expected a file ending in .safetensors")
    before, after = TextToImage.load(args.base), TextToImage.load(args.source)
    lora = extract((before.unet, before.text), (after.unet, after.text), args.rank)
    write_lora(args.target, lora, before.unet.config, form="diffusers" if args.to == "lora" else "kohya", dtype=dtype)
    print(f"{args.target}: LoRA of rank {args.rank} on {len(lora)} layers")
    return 0
