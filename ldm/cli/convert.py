"""`ldm convert IN OUT --to diffusers|single|lora|...`: between model formats; LoRA files; tuned models as LoRA."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ldm.cli.options import Parser

DTYPES = ("float32", "float16", "bfloat16")
LORA = ("lora", "kohya", "lycoris", "peft")
RANK = 16


def parser() -> Parser:
    """Options of the verb."""
    p = Parser(prog="ldm convert", description="Turn one model format into another, one tensor at a time.")
    p.add_argument(
        "source", help="run or diffusers folder, single file (.safetensors, .ckpt), LoRA or ControlNet, or hub id"
    )
    p.add_argument("target", type=Path, help="folder, or file ending in .safetensors")
    p.add_argument("--to", required=True, choices=("diffusers", "single", "compvis", *LORA), help="format of the "
                   "target; single (compvis: the same, of U-Nets): one file in the family's authors' names; lora "
                   "(diffusers' file), kohya, lycoris (LoHa, LoKr, OFT and DoRA as they are): of a LoRA the same one, "
                   "of a model what tells it from --base, best at --rank; peft: a folder, LoHa, LoKr, OFT")  # fmt: skip
    p.add_argument(
        "--base", help="the model that the source was tuned from; a LoRA is merged into it by --to diffusers"
    )
    p.add_argument("--rank", type=int, help=f"of --to lora and kohya: of what is taken from a model ({RANK}), and of "
                   "what stands for DoRA, LoHa and LoKr where the form has none (64)")  # fmt: skip
    p.add_argument("--dtype", choices=DTYPES, help="type of the stored weights; default: as they are")
    p.add_argument("--variant", help="read the files of this variant of a folder, such as fp16")
    p.add_argument("--ema", action="store_true", help="take the averaged (EMA) weights of a single file")
    p.add_argument("--prediction", choices=("epsilon", "v"), help="what an SD 2.x single file predicts")
    p.add_argument("--text", help="diffusers folder with the text encoders (and T5's tokenizer) that a single file of "
                   "SD3, FLUX.1 or PixArt does not hold")  # fmt: skip
    p.add_argument("--vae", help="folder or file, such as ae.safetensors, of the autoencoder that it does not hold")
    p.add_argument(
        "--lenient", action="store_true", help="leave out, and name, unknown tensors instead of refusing the file"
    )
    return p


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_args(argv)
    import torch

    from ldm.checkpoint.control_files import is_control
    from ldm.checkpoint.lora_files import is_lora
    from ldm.models.shipped import named
    from ldm.recipes.models import usable

    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.rank is not None and args.rank < 1:
        raise ValueError(f"--rank: must be at least 1, got {args.rank}")
    if args.to in LORA and args.to != "peft" and args.target.suffix != ".safetensors":
        raise ValueError(f"target {str(args.target)!r}: expected a file ending in .safetensors")
    if is_control(args.source):
        return _control(args, dtype)
    lora = is_lora(args.source)
    source = named(args.source if lora else usable(args.source, "source"))
    source = source / "export" if (source / "export").is_dir() else source
    told = source / "adapter.json"
    adapter = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else None
    if lora or adapter:
        return _adapted(args, source, adapter, dtype)
    if args.to in LORA:
        return _extract(args, source, dtype or torch.float32)
    from ldm.checkpoint.convert import convert

    counts = convert(
        source if source.exists() else args.source,
        args.target,
        args.to,
        dtype=dtype,
        variant=args.variant,
        ema=args.ema,
        prediction=args.prediction,
        lenient=args.lenient,
        text=args.text,
        vae=args.vae,
    )
    parts = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{args.target}: {args.to}, tensors: {parts}")
    return 0


def _control(args: argparse.Namespace, dtype: Any) -> int:
    """A ControlNet in another form."""
    from ldm.checkpoint.control_files import convert_control

    count = convert_control(args.source, args.target, args.to, dtype=dtype, variant=args.variant)
    print(f"{args.target}: {args.to}, ControlNet of {count} tensors")
    return 0


def _new(target: Path) -> None:
    if target.exists():
        raise ValueError(f"{target}: exists already")


def _adapted(args: argparse.Namespace, source: Path, adapter: dict[str, Any] | None, dtype: Any) -> int:
    """A LoRA in another form, or merged into its base."""
    import torch

    from ldm.adapters.sites import all_sites
    from ldm.checkpoint.convert import open_model, save_diffusers, save_single
    from ldm.checkpoint.lora_files import FIT_RANK, read_adapter, write_lora
    from ldm.checkpoint.lycoris_files import write_lycoris, write_peft
    from ldm.models.shipped import named
    from ldm.pipeline import TextToImage
    from ldm.recipes.models import usable

    base = args.base or (adapter or {}).get("base")
    if base is None:
        raise ValueError(f"--to {args.to}: needs --base, the model that the LoRA belongs to")
    if adapter and not adapter["loras"]:
        raise ValueError(f"{source}: holds embeddings, which no other form here takes; `ldm sample --embedding` does")
    base = named(usable(base, "--base"))
    pipeline = TextToImage.load(base, lenient=args.lenient)
    if args.to in LORA:
        found = read_adapter(source, pipeline.network, pipeline.text, lenient=args.lenient)
        if found.embeddings:
            print(f"left out: the embeddings {sorted(found.embeddings)}, which this form does not hold")
        sites, config = all_sites(pipeline.network, pipeline.text), pipeline.network.config
        rank, dtype = args.rank or FIT_RANK, dtype or torch.float32
        _new(args.target)
        if args.to == "peft":
            write_peft(args.target, found.corrections, dtype=dtype)
        elif args.to == "lycoris":
            write_lycoris(args.target, found.corrections, config, dtype=dtype, sites=sites, rank=rank)
        else:
            form = "diffusers" if args.to == "lora" else "kohya"
            write_lora(args.target, found.corrections, config, form=form, dtype=dtype, sites=sites, rank=rank)
        print(f"{args.target}: {args.to}, LoRA on {len(found.corrections)} layers")
        return 0
    _new(args.target)
    pipeline.load_lora(source, lenient=args.lenient)
    whole = base / "export" if (base / "export").is_dir() else base
    scheduler = dict(open_model(whole if whole.exists() else str(args.base)).scheduler)
    beside = source / "scheduler_config.json"
    if beside.is_file():
        scheduler = json.loads(beside.read_text(encoding="utf-8"))
    kinds: dict[str, Any] = {
        "network": pipeline.network,
        "autoencoder": pipeline.codec.autoencoder,
        "text": pipeline.text,
    }
    save = save_single if args.to in ("compvis", "single") else save_diffusers
    save(args.target, **kinds, scheduler=scheduler, dtype=dtype)
    print(f"{args.target}: {args.to}, the LoRA merged into {base}")
    return 0


def _extract(args: argparse.Namespace, source: Path, dtype: Any) -> int:
    """The source's difference from its base as a LoRA file."""
    from ldm.adapters.low_rank import extract
    from ldm.checkpoint.lora_files import write_lora
    from ldm.pipeline import TextToImage
    from ldm.recipes.models import usable

    if args.base is None:
        raise ValueError(f"--to {args.to}: needs --base, the model that the source was tuned from")
    if args.to not in ("lora", "kohya"):
        raise ValueError(f"--to {args.to}: {source} is a whole model, whose difference is a LoRA; write --to lora")
    before = TextToImage.load(usable(args.base, "--base"), lenient=args.lenient)
    after = TextToImage.load(source if source.exists() else args.source, lenient=args.lenient)
    rank = args.rank or RANK
    lora = extract((before.network, before.text), (after.network, after.text), rank)
    _new(args.target)
    write_lora(
        args.target, lora, before.network.config, form="diffusers" if args.to == "lora" else "kohya", dtype=dtype
    )
    print(f"{args.target}: LoRA of rank {rank} on {len(lora)} layers")
    return 0
