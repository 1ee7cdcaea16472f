"""The options of pictures that are prompts: which, how strongly, by which IP-Adapter, seen by which image encoder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.control import digest, picture_and_scale

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage


def add(p: argparse.ArgumentParser) -> None:
    """The options, for a verb that draws."""
    p.add_argument(
        "--image-prompt", action="append", default=[], metavar="PICTURE[:SCALE]",
        help="a picture as a prompt beside the words, and how strongly (1); may be repeated; needs --ip-adapter",
    )  # fmt: skip
    p.add_argument(
        "--ip-adapter", action="append", default=[], metavar="FILE",
        help="the IP-Adapter of --image-prompt: a published file or a run; one for all, or one for each in their order",
    )  # fmt: skip
    p.add_argument(
        "--image-encoder", action="append", default=[], metavar="FOLDER",
        help="the image encoder of --ip-adapter: transformers' folder, clip_emoji, open_clip:ARCH:WEIGHTS (default: "
        "what it was trained with here, or image_encoder beside a published file); one for all, or one for each",
    )  # fmt: skip


def parsed(entry: str) -> tuple[Path, float]:
    """Picture and scale of an entry. Raises ValueError for another form and where there is no picture."""
    picture, scale = picture_and_scale(entry)
    if not picture:
        raise ValueError(f"--image-prompt {entry!r}: expected PICTURE or PICTURE:SCALE")
    if not Path(picture).is_file():
        raise ValueError(f"--image-prompt {entry!r}: {picture!r}: no such picture")
    return Path(picture), scale


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for what no model is needed to refuse."""
    from ldm.pipeline.image_prompt import check_scale

    for entry in args.image_prompt:
        check_scale(parsed(entry)[1], f"--image-prompt {entry!r}")
    count = len(args.image_prompt)
    if count and not args.ip_adapter:
        raise ValueError("--image-prompt: add --ip-adapter FILE, which tells the model of the picture")
    for option, given in (("--ip-adapter", args.ip_adapter), ("--image-encoder", args.image_encoder)):
        if given and not count:
            raise ValueError(f"{option}: is of pictures that are prompts; add --image-prompt")
        if len(given) not in (0, 1, count):
            raise ValueError(f"{option}: {len(given)} for {count} --image-prompt; give one for all, or one for each")


def digests(args: argparse.Namespace) -> dict[str, list[str]]:
    """For the record of a picture: short hashes of the files of pictures that are prompts, in their order."""
    return {"references": [digest(parsed(entry)[0]) for entry in args.image_prompt]}


def prompted(pipeline: TextToImage, args: argparse.Namespace) -> TextToImage:
    """The pipeline with the pictures that are asked for as prompts; itself where there are none."""
    if not args.image_prompt:
        return pipeline
    from ldm.data.decode import load
    from ldm.pipeline import ImagePrompt
    from ldm.recipes.image_prompts import load_pair

    count = len(args.image_prompt)
    adapters = args.ip_adapter * (count if len(args.ip_adapter) == 1 else 1)
    encoders = (args.image_encoder or [None]) * (count if len(args.image_encoder) <= 1 else 1)
    known = {key: load_pair(*key) for key in dict.fromkeys(zip(adapters, encoders, strict=True))}
    found = []
    for entry, *key in zip(args.image_prompt, adapters, encoders, strict=True):
        picture, scale = parsed(entry)
        adapter, encoder = known[key[0], key[1]]
        name = f"--ip-adapter {key[0]!r}"
        found.append(ImagePrompt(adapter=adapter, encoder=encoder, picture=load(picture), scale=scale, name=name))
    return pipeline.image_prompted(found)
