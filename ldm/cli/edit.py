"""`ldm edit img2img|inpaint|invert|prompt|maps`: change pictures with a text-to-image model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.options import Parser

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import Settings, TextToImage


def parser() -> Parser:
    """Options of the verb."""
    p = Parser(prog="ldm edit", description="Change pictures with a text-to-image model.")
    common = Parser(add_help=False)
    common.add_argument("--model", default="emoji", help="shipped name, run or diffusers folder, file or hub id")
    common.add_argument("--sampler", default="ddim")
    common.add_argument("--steps", type=int, default=50)
    common.add_argument("--guidance", type=float, default=3.0)
    common.add_argument("--negative", default="")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--count", type=int, default=1)
    common.add_argument("--device", default=None)
    common.add_argument("--out", type=Path, default=Path("edited"), help="folder for the pictures")
    verbs = p.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("img2img", parents=[common], help="draw a picture again under a prompt")
    one.add_argument("image", type=Path)
    one.add_argument("prompt")
    one.add_argument("--strength", type=float, default=0.7, help="between 0 (the picture unchanged) and 1 (ignored)")
    one = verbs.add_parser("inpaint", parents=[common], help="draw the white part of a mask anew")
    one.add_argument("image", type=Path)
    one.add_argument("mask", type=Path)
    one.add_argument("prompt")
    one = verbs.add_parser("invert", parents=[common], help="DDIM inversion, and the picture drawn back or edited")
    one.add_argument("image", type=Path)
    one.add_argument("--prompt", default="", help="what the picture shows")
    one.add_argument("--target", help="draw it back under this prompt instead")
    one.add_argument("--refine", type=int, default=0, help="fixed-point rounds a step")
    one = verbs.add_parser("prompt", parents=[common], help="prompt-to-prompt: the same composition, other words")
    one.add_argument("source")
    one.add_argument("target")
    one.add_argument("--cross", type=float, default=0.8, help="share of steps with the source's cross-attention")
    one.add_argument("--own", type=float, default=0.4, help="share of steps with the source's self-attention")
    one.add_argument("--local", nargs="*", default=[], metavar="WORD", help="only the place of these words changes")
    one.add_argument("--weight", nargs="*", default=[], metavar="WORD=FACTOR", help="strengthen or weaken words")
    one = verbs.add_parser("maps", parents=[common], help="where the network looked for each word")
    one.add_argument("prompt")
    return p


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_args(argv)
    from ldm import dist
    from ldm.pipeline import Settings, TextToImage
    from ldm.recipes.models import usable

    settings = Settings(
        sampler=args.sampler, steps=args.steps, guidance=args.guidance, negative=args.negative, seed=args.seed
    )
    pipe = TextToImage.load(usable(args.model, "--model"), device=args.device or dist.device())
    pictures = _VERBS[args.verb](args, pipe, settings)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        path = args.out / f"{name}.png"
        picture.save(path)
        print(path)
    return 0


def _open(path: Path) -> Image.Image:
    """A picture as a viewer shows it on white; a white stencil, of which nothing would be seen there, on black."""
    from ldm.data.decode import load

    return load(path, stencil=True)


def _numbered(pictures: list[Image.Image]) -> dict[str, Image.Image]:
    return {f"{i:04d}": picture for i, picture in enumerate(pictures)}


def _img2img(args: argparse.Namespace, pipe: TextToImage, settings: Settings) -> dict[str, Image.Image]:
    from ldm.editing import img2img

    image = _open(args.image)
    return _numbered(img2img(pipe, image, args.prompt, strength=args.strength, settings=settings, count=args.count))


def _inpaint(args: argparse.Namespace, pipe: TextToImage, settings: Settings) -> dict[str, Image.Image]:
    from ldm.data.decode import load_mask
    from ldm.editing import inpaint

    image, mask = _open(args.image), load_mask(args.mask)
    low, high = mask.point(lambda value: 255 * (value > 127)).getextrema()
    if low == high:
        what = "all of it is white, so all of the picture" if low else "nothing in it is white, so nothing"
        print(f"ldm edit: {args.mask}: {what} is drawn anew", file=sys.stderr)
    return _numbered(inpaint(pipe, image, mask, args.prompt, settings=settings, count=args.count))


def _invert(args: argparse.Namespace, pipe: TextToImage, settings: Settings) -> dict[str, Image.Image]:
    from dataclasses import replace

    from ldm.editing import invert, redraw

    noise = invert(pipe, _open(args.image), args.prompt, settings=settings, refine=args.refine)
    if args.target is None:
        return {"redrawn": redraw(pipe, noise, args.prompt, settings=replace(settings, guidance=1.0))[0]}
    return {"edited": redraw(pipe, noise, args.target, settings=settings)[0]}


def _prompt(args: argparse.Namespace, pipe: TextToImage, settings: Settings) -> dict[str, Image.Image]:
    from ldm.editing import Change, edit

    weights = dict(_weight(pair) for pair in args.weight)
    change = Change(cross=args.cross, own=args.own, local=tuple(args.local), weights=weights)
    source, target = edit(pipe, args.source, args.target, change=change, settings=settings)
    return {"source": source, "target": target}


def _weight(pair: str) -> tuple[str, float]:
    word, _, factor = pair.partition("=")
    try:
        return word, float(factor)
    except ValueError:
        raise ValueError(f"--weight: {pair!r}: expected WORD=FACTOR, such as red=2") from None


def _maps(args: argparse.Namespace, pipe: TextToImage, settings: Settings) -> dict[str, Image.Image]:
    from ldm.editing import attention_maps

    picture, words = attention_maps(pipe, args.prompt, settings=settings)
    return {"picture": picture, **{f"word-{w}": image for w, image in words.items()}}


_VERBS = {"img2img": _img2img, "inpaint": _inpaint, "invert": _invert, "prompt": _prompt, "maps": _maps}
