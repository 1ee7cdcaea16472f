"""Options of all verbs: `launch.options`, with other programs' names as hints, and `key=value` anywhere."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from launch import options
from launch.options import path

__all__ = ["Parser", "path"]

TEXT_PRECISIONS = ("fp32", "bf16", "fp16", "int8")
TEXT_PRECISION_HELP = "what text encoders are kept and computed in; int8 (T5, Qwen3): a quarter of the memory"

_KEY = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+|\[\d+\])*=")


class Parser(options.Parser):
    """An argument parser that knows what diffusers', CompVis', kohya's and A1111's programs call the same things."""

    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "adapter": ("lora",),
        "batch-size": ("batch",),
        "cfg": ("guidance",),
        "cfg-scale": ("guidance",),
        "checkpoint": ("model", "base"),
        "ckpt": ("model", "base"),
        "class-prompt": ("class",),
        "conditioning-image-column": ("pair",),
        "controlnet": ("control", "model"),
        "data-dir": ("images", "data"),
        "dataset": ("data", "images"),
        "ddim-eta": ("eta",),
        "ddim-steps": ("steps",),
        "dtype": ("precision",),
        "edit-prompt-column": ("caption-column",),
        "edited-image-column": ("image-column",),
        "epochs": ("steps",),
        "guidance-scale": ("guidance",),
        "guidance-rescale": ("rescale",),
        "h": ("size",),
        "height": ("size",),
        "image-encoder-path": ("image-encoder",),
        "init-img": ("give the picture as the first word",),
        "input": ("images", "data"),
        "instance-prompt": ("instance-prompt",),
        "learning-rate": ("lr",),
        "ip-adapter-image": ("image-prompt",),
        "ip-adapter-scale": ("write the scale behind the picture: --image-prompt PICTURE:SCALE",),
        "lora-rank": ("rank",),
        "lora-alpha": ("alpha",),
        "lora-scale": ("write the weight behind the file: --lora PATH:WEIGHT",),
        "max-train-epochs": ("steps",),
        "max-train-steps": ("steps",),
        "mixed-precision": ("precision",),
        "n-iter": ("count",),
        "n-samples": ("count",),
        "negative-prompt": ("negative",),
        "network-alpha": ("alpha",),
        "network-dim": ("rank",),
        "nproc-per-node": ("procs",),
        "num-images-per-prompt": ("count",),
        "num-inference-steps": ("steps",),
        "num-processes": ("procs",),
        "num-train-epochs": ("steps",),
        "num-validation-images": ("prompt",),
        "original-image-column": ("pair",),
        "output": ("out",),
        "output-dir": ("out",),
        "outdir": ("out",),
        "pretrained-model-name-or-path": ("base", "model", "in a config it is task.start=MODEL"),
        "pretrained-ip-adapter-path": ("ip-adapter", "start"),
        "prompt": ("the prompt needs no option: write it as a word of its own",),
        "prompts-file": ("from-file",),
        "report-to": ("in a config it is train.log.wandb=true",),
        "resume": ("the same command again resumes",),
        "resume-from-checkpoint": ("the same command again resumes",),
        "sample-batch-size": ("batch",),
        "scale": ("guidance",),
        "scheduler": ("sampler",),
        "text-encoder": ("text",),
        "train-data-dir": ("images", "data"),
        "vae-path": ("vae",),
        "validation-prompt": ("prompt",),
        "w": ("size",),
        "width": ("size",),
        "workers-per-node": ("workers",),
    }

    def parse_words(self, args: Sequence[str] | None = None) -> Any:
        """Parse options, words and `key=value` in any order.

        The words go to the positional arguments in their order; `key=value` to `overrides`, which the parser has.
        """
        if {"-h", "--help"} & set(args or ()):
            self.print_help()
            self.exit()
        self._given = list(sys.argv[1:] if args is None else args)
        words = [a for a in self._actions if not a.option_strings and a.dest != "overrides"]
        last = next(a for a in self._actions if a.dest == "overrides")
        required = {a.dest: (a.nargs, a.choices) for a in words}
        for action in words:  # they are filled below
            action.nargs, action.choices, action.required = "?", None, False
        last.nargs = "*"
        try:
            found = self.parse_intermixed_args(args)
        finally:
            for action in words:
                action.nargs, action.choices = required[action.dest]
                action.required = action.nargs != "?"
        given = [w for a in words if (w := getattr(found, a.dest)) is not None] + list(found.overrides or ())
        plain = [w for w in given if not is_override(w)]
        found.overrides = [w for w in given if is_override(w)]
        if len(plain) > len(words):
            raise ValueError(f"override {plain[len(words)]!r}: expected key=value, such as train.steps=100")
        for action, word in zip(words, plain):
            try:
                self._check_value(action, word)
            except argparse.ArgumentError as error:
                self.error(str(error))
            setattr(found, action.dest, word)
        for action in words[len(plain) :]:  # an override may stand in its place
            setattr(found, action.dest, None)
        missing = next((a for a in words[len(plain) :] if a.required), None)
        if missing is not None:
            self.error(f"{str(missing.metavar or missing.dest).upper()} is missing: {missing.help}")
        return found


def is_override(word: str) -> bool:
    """Whether a word of the command line is `key=value`, and not a config's file whose name has a = in it."""
    return bool(_KEY.match(word)) and not (word.endswith((".yaml", ".yml")) and Path(word).is_file())
