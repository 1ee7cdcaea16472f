"""Options of `ldm finetune` that say how is trained: optimizer, rates, schedule."""

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
