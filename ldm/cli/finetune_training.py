"""Options of `ldm finetune` that say how is trained: optimizer, rates, schedule, loss, masks."""

from __future__ import annotations

import argparse
from typing import Any

from ldm.cli.options import Parser

ALGORITHMS = ("adamw", "adamw8bit", "lion", "muon", "sgd", "adafactor", "came", "prodigy", "adamw_schedule_free")
DECAYS = ("constant", "cosine", "linear", "cosine_restarts", "polynomial", "rex", "inverse_sqrt", "wsd")


def add(p: Parser, *, lora: bool = False, text: bool = False) -> None:
    """The options; those of a LoRA's and the text encoders' rates where they may train."""
    p.add_argument("--optimizer", choices=ALGORITHMS, default="adamw",
                   help="docs/training.md tells them; prodigy finds its rate, and --lr is a multiple, 1")  # fmt: skip
    p.add_argument("--lr-scheduler", choices=DECAYS, default="constant", help="the rate's course after the warm-up")
    p.add_argument("--lr-warmup-steps", type=int, default=0, metavar="STEPS", help="steps of a rising rate")
    if text:
        p.add_argument("--text-encoder-lr", type=float, nargs="+", metavar="RATE",
                       help="text encoders' own rate, or one for each (default: --lr)")  # fmt: skip
    if lora:
        p.add_argument("--loraplus-lr-ratio", type=float, metavar="RATIO",
                       help="LoRA+: how many times its rate a LoRA's second matrix has, such as 16")  # fmt: skip

    _loss(p)


def _loss(p: Parser) -> None:
    p.add_argument("--loss-type", choices=("mse", "l1", "huber", "smooth_l1"), default="mse",
                   help="what an error costs; huber and smooth_l1 mind outliers less")  # fmt: skip
    p.add_argument("--huber-schedule", choices=("constant", "exponential", "snr"), help="of its threshold (snr)")
    p.add_argument("--huber-c", type=float, metavar="C", help="its least threshold (default: 0.1)")
    p.add_argument("--huber-scale", type=float, metavar="SCALE", help="times the threshold, but of snr (default: 1)")
    p.add_argument("--multires-noise-iterations", type=int, default=0, metavar="N",
                   help="coarser noises that are added, such as 6")  # fmt: skip
    p.add_argument("--multires-noise-discount", type=float, metavar="SHARE",
                   help="each times the one before (default: 0.3)")  # fmt: skip
    p.add_argument("--min-timestep", type=int, default=0, help="the least training time, of 0 to 1000")
    p.add_argument("--max-timestep", type=int, help="training times are below it")
    p.add_argument("--masked-loss", metavar="WHERE",
                   help="learn what is white in a mask: alpha (what is opaque), a folder of masks, a suffix (_mask) or "
                   "the name of a folder beside the pictures (masks/)")  # fmt: skip
    p.add_argument("--unmasked-weight", type=float, metavar="WEIGHT", help="of what is outside (default: 0)")
    p.add_argument("--normalize-masked-area", action="store_true",
                   help="a picture with a small mask counts as much as others")  # fmt: skip


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What the options put into `task.options`; nothing where they are as by default."""
    found: dict[str, Any] = {}
    huber = {key: value for key, value in (("schedule", args.huber_schedule), ("c", args.huber_c),
                                           ("scale", args.huber_scale)) if value is not None}  # fmt: skip
    if args.loss_type in ("huber", "smooth_l1"):
        found["loss"] = {"kind": args.loss_type, **huber}
    elif huber:
        raise ValueError(f"--huber-{next(iter(huber))}: is of --loss-type huber or smooth_l1, got {args.loss_type}")
    elif args.loss_type != "mse":
        found["loss"] = {"kind": args.loss_type}
    if args.multires_noise_iterations:
        found["multires_iterations"] = args.multires_noise_iterations
    if args.multires_noise_discount is not None:
        if not args.multires_noise_iterations:
            raise ValueError("--multires-noise-discount: is of --multires-noise-iterations, which is 0")
        found["multires_discount"] = args.multires_noise_discount
    if args.min_timestep:
        found["min_timestep"] = args.min_timestep
    if args.max_timestep is not None:
        found["max_timestep"] = args.max_timestep
    if args.masked_loss is not None:
        outside = {} if args.unmasked_weight is None else {"outside": args.unmasked_weight}
        found["mask"] = outside | ({"normalize": True} if args.normalize_masked_area else {})
    elif args.unmasked_weight is not None or args.normalize_masked_area:
        key = "--normalize-masked-area" if args.normalize_masked_area else "--unmasked-weight"
        raise ValueError(f"{key}: is of --masked-loss, which says where the masks are")
    return found


def optim(args: argparse.Namespace) -> dict[str, Any]:
    """What the options put into `train.optim`; nothing where they are as by default."""
    found: dict[str, Any] = {}
    if args.optimizer != "adamw":
        found["algorithm"] = args.optimizer
    if args.optimizer == "prodigy" and args.lr is None:
        found["lr"] = 1.0
    if args.lr_scheduler != "constant":
        found["decay"] = args.lr_scheduler
    if args.lr_warmup_steps:
        found["warmup"] = args.lr_warmup_steps
    rates: dict[str, Any] = {}
    if text := getattr(args, "text_encoder_lr", None):
        if not args.train_text_encoder:
            raise ValueError("--text-encoder-lr: text encoders do not train; add --train-text-encoder, or leave it out")
        rates["text"] = text if len(text) > 1 else text[0]
    if (ratio := getattr(args, "loraplus_lr_ratio", None)) is not None:
        rates["lora_plus"] = ratio
    return found | ({"rates": rates} if rates else {})
