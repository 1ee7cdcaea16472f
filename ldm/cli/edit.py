"""`ldm edit img2img|inpaint|instruct|upscale|invert|prompt|maps`: change pictures with a text-to-image model."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import adapting, control, image_prompt, kept
from ldm.cli.options import TEXT_PRECISION_HELP, TEXT_PRECISIONS, Parser
from ldm.models.shipped import DEFAULT

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import Settings, TextToImage


def _common() -> Parser:
    """What all verbs take."""
    common = Parser(add_help=False)
    common.add_argument("--model", default=DEFAULT, help="shipped name, run or diffusers folder, file or hub id")
    common.add_argument(
        "--lenient", action="store_true", help="leave out, and name, unknown tensors of a file instead of refusing it"
    )
    adapting.add(common)
    common.add_argument("--sampler", help="see `ldm sample --list-samplers` (ddim; euler for SD3 and FLUX.1)")
    common.add_argument("--steps", type=int, default=50, help="sampling steps")
    common.add_argument(
        "--guidance", type=float, help="guidance scale, 1 is none (3; instruct: 7.5; SD3, FLUX.1 and PixArt: theirs)"
    )
    common.add_argument("--negative", default="", help="negative prompt")
    common.add_argument("--seed", type=int, default=0, help="any whole number")
    common.add_argument("--count", type=int, default=1, help="how many results")
    common.add_argument("--batch", type=int, default=16, help="pictures at a time")
    common.add_argument(
        "--size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width, multiples of 8 (the picture's"
        " own, else the model's)",
    )  # fmt: skip
    common.add_argument("--prompt-weights", action="store_true", help='read "(word:1.3)", "((word))", "[word]"')
    common.add_argument(
        "--long-prompts", action="store_true", help="encode prompts longer than the text encoder's context in chunks"
    )
    common.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="fp32", help="the network's")
    common.add_argument("--text-precision", choices=TEXT_PRECISIONS, help=TEXT_PRECISION_HELP + " (as --precision)")
    common.add_argument(
        "--blocks-on-device", type=int, metavar="N",
        help="less GPU memory: keep N blocks of the network there at once, and fetch the others before they run",
    )  # fmt: skip
    common.add_argument("--device", default=None, help="cpu, cuda, ...; default: a GPU if there is one")
    common.add_argument("--out", type=Path, default=Path("edited"), help="folder for the pictures")
    return common


def _shown() -> Parser:
    """The further pictures of verbs that redraw one."""
    shown = Parser(add_help=False)
    control.add(shown)
    image_prompt.add(shown)
    return shown


def parser() -> Parser:
    """Options of the verb."""
    p = Parser(
        prog="ldm edit", description="Change pictures with a text-to-image model. `ldm edit VERB --help` tells more."
    )
    common, shown = _common(), _shown()
    verbs = p.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser(
        "img2img", parents=[common, shown], help="redraw a picture so that it shows a prompt, more or less freely"
    )
    one.add_argument("image", type=Path, help="a picture file")
    one.add_argument("prompt", help="what to draw")
    one.add_argument("--strength", type=float, default=0.7, help="between 0 (the picture unchanged) and 1 (ignored)")
    one = verbs.add_parser("inpaint", parents=[common, shown], help="redraw only the white part of a mask")
    one.add_argument("image", type=Path, help="a picture file")
    one.add_argument("mask", type=Path, help="a picture: white is drawn anew, black is kept")
    one.add_argument("prompt", help="what to draw")
    one.add_argument("--strength", type=float, default=1.0, help="1: nothing of what was under the white is left")
    one = verbs.add_parser(
        "instruct", parents=[common, shown], help='change a picture as an instruction says, such as "make it night"'
    )
    one.add_argument("image", type=Path, help="a picture file")
    one.add_argument("instruction", help="what to change")
    one.add_argument(
        "--image-guidance", type=float, help="guidance by the picture: higher changes less, 1 is none (1.5)"
    )
    one = verbs.add_parser("upscale", parents=[common], help="enlarge a picture, by a model for it")
    one.add_argument("image", type=Path, help="a picture file")
    one.add_argument("--prompt", default="", help="what the picture shows")
    one.add_argument("--noise-level", type=int, default=20, help="noise on the picture: more for worse ones (20)")
    one.add_argument("--tile", type=int, metavar="PIXELS", help="larger pictures are drawn in tiles of so many of "
                     "their pixels a side (the model's own size)")  # fmt: skip
    one.add_argument("--overlap", type=int, metavar="PIXELS", help="of neighbouring tiles (a quarter of a tile)")
    one = verbs.add_parser(
        "invert",
        parents=[common],
        help="DDIM inversion: find the noise that draws a picture, and draw it back, as it is or under another prompt",
    )
    one.add_argument("image", type=Path, help="a picture file")
    one.add_argument("--prompt", default="", help="what the picture shows")
    one.add_argument("--target", help="draw it back under this prompt instead")
    one.add_argument(
        "--refine", type=int, default=0, help="fixed-point iterations in each inversion step: more exact, slower"
    )
    one = verbs.add_parser("prompt", parents=[common], help="prompt-to-prompt: the same composition, other words")
    one.add_argument("source", help="the prompt of the first picture")
    one.add_argument("target", help="the changed prompt")
    one.add_argument("--cross", type=float, default=0.8, help="share of steps with the source's cross-attention")
    one.add_argument("--own", type=float, default=0.4, help="share of steps with the source's self-attention")
    one.add_argument(
        "--local", nargs="*", default=[], metavar="WORD", help="change the picture only where these words are"
    )
    one.add_argument(
        "--weight", nargs="*", default=[], metavar="WORD=FACTOR", help="strengthen or weaken words, such as red=2"
    )
    one = verbs.add_parser(
        "maps", parents=[common], help="cross-attention maps: where the network looked for each word"
    )
    one.add_argument("prompt", help="what to draw")
    return p


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_args(argv)
    if args.count < 1:
        raise ValueError(f"--count: must be at least 1, got {args.count}")
    if args.size is not None and len(args.size) > 2:
        raise ValueError(f"--size: expected one or two numbers, got {args.size}")
    shown = "control" in vars(args)
    if shown:
        control.check(args)
        image_prompt.check(args)
    from ldm import dist
    from ldm.cli.drawn import Album, fingerprint
    from ldm.pipeline import Settings
    from ldm.progress import line
    from ldm.recipes.models import usable

    settings = Settings(
        sampler=args.sampler or "ddim", steps=args.steps, negative=args.negative, seed=args.seed,
        guidance=3.0 if args.guidance is None else args.guidance,
        batch=args.batch, size=None if args.size is None else (args.size[0], args.size[-1]),
        weights=args.prompt_weights, long=args.long_prompts,
    )  # fmt: skip
    pipe = kept.load(
        usable(args.model, "--model"),
        device=args.device or dist.device(),
        precision=args.precision,
        lenient=args.lenient,
        text_precision=args.text_precision,
        blocks_on_device=args.blocks_on_device,
    )
    adapting.adapt(pipe, args, "edit")
    pipe = image_prompt.prompted(control.controlled(pipe, args), args) if shown else pipe
    settings = _of_family(args, pipe, settings)
    album = Album(args.out)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        pictures = _VERBS[args.verb](args, pipe, settings)
    for said in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        print(f"ldm edit: {said}", file=sys.stderr)
    record = {
        "command": ["edit", *argv],
        "inputs": {name: _digest(vars(args)[name]) for name in ("image", "mask") if name in vars(args)},
        "weights": fingerprint([pipe.network, *pipe.others]),
    } | (control.digests(args) | image_prompt.digests(args) if shown else {})
    for name, picture in pictures.items():
        place = int(name) if name.isdecimal() else None
        path = album.name(picture, name, record) if place is None else album.add(picture, place, "", record)
        line(str(path))
    return 0


def _of_family(args: argparse.Namespace, pipe: TextToImage, settings: Settings) -> Settings:
    """The settings with what the user did not say as its model is drawn (transformers')."""
    from dataclasses import replace

    from ldm.diffusion.schedule import Flow
    from ldm.models.transformers.base import Transformer

    if not isinstance(pipe.network, Transformer):
        return settings
    sampler, _, guidance = pipe.habit
    if args.sampler is None and isinstance(pipe.process.schedule, Flow):
        settings = replace(settings, sampler=sampler)
    return settings if args.guidance is not None else replace(settings, guidance=guidance)


def _digest(path: Path) -> str:
    from ldm.checkpoint.files import digest

    return digest(path)


def _open(path: Path) -> Image.Image:
    """A picture as a viewer shows it on white; a white stencil, of which nothing would be seen there, on black."""
    from ldm.data.decode import frames, load

    picture = load(path, stencil=True)
    if (count := frames(path)) > 1:
        print(f"ldm edit: {path}: the first of {count} frames or pages is taken", file=sys.stderr)
    return picture


def _numbered(pictures: list[Image.Image]) -> dict[str, Image.Image]:
    return {f"{i:04d}": picture for i, picture in enumerate(pictures)}


def _img2img(args: argparse.Namespace, pipe: TextToImage, settings: Settings) -> dict[str, Image.Image]:
    from ldm.editing import img2img
    from ldm.progress import Bar

    image = _open(args.image)
    with Bar("drawing", "steps", leave=False) as bar:
        how: dict[str, Any] = {"settings": settings, "count": args.count, "progress": bar.to}
        return _numbered(img2img(pipe, image, args.prompt, strength=args.strength, **how))


def _inpaint(args: argparse.Namespace, pipe: TextToImage, settings: Settings) -> dict[str, Image.Image]:
    import numpy as np

    from ldm.data.decode import load_mask
    from ldm.editing import inpaint
    from ldm.progress import Bar

    image, mask = _open(args.image), load_mask(args.mask)
    white = np.asarray(mask) > 127
    if white.all() or not white.any():
        what = "all of it is white, so all of the picture" if white.any() else "nothing in it is white, so nothing"
        print(f"ldm edit: {args.mask}: {what} is drawn anew", file=sys.stderr)
    with Bar("drawing", "steps", leave=False) as bar:
        how: dict[str, Any] = {"settings": settings, "count": args.count, "progress": bar.to}
        return _numbered(inpaint(pipe, image, mask, args.prompt, strength=args.strength, **how))


def _instruct(args: argparse.Namespace, pipe: TextToImage, settings: Settings) -> dict[str, Image.Image]:
    from dataclasses import replace

    from ldm.editing import instruct
    from ldm.progress import Bar

    if args.image_guidance is not None:
        settings = replace(settings, image_guidance=args.image_guidance)
    if args.guidance is None:
        settings = replace(settings, guidance=7.5)
    image = _open(args.image)
    with Bar("drawing", "steps", leave=False) as bar:
        how: dict[str, Any] = {"settings": settings, "count": args.count, "progress": bar.to}
        return _numbered(instruct(pipe, image, args.instruction, **how))


def _upscale(args: argparse.Namespace, pipe: TextToImage, settings: Settings) -> dict[str, Image.Image]:
    from ldm.editing import upscale
    from ldm.progress import Bar

    image = _open(args.image)
    with Bar("drawing", "steps", leave=False) as bar:
        how: dict[str, Any] = {"settings": settings, "count": args.count, "progress": bar.to}
        how |= {"level": args.noise_level, "tile": args.tile, "overlap": args.overlap}
        return _numbered(upscale(pipe, image, args.prompt, **how))


def _invert(args: argparse.Namespace, pipe: TextToImage, settings: Settings) -> dict[str, Image.Image]:
    from dataclasses import replace

    from ldm.editing import invert, redraw

    image = _open(args.image)
    noise = invert(pipe, image, args.prompt, settings=settings, refine=args.refine)
    size = image.size if settings.size is None else None
    if args.target is None:
        return {"redrawn": redraw(pipe, noise, args.prompt, settings=replace(settings, guidance=1.0), size=size)[0]}
    return {"edited": redraw(pipe, noise, args.target, settings=settings, size=size)[0]}


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


_VERBS = {
    "img2img": _img2img,
    "inpaint": _inpaint,
    "instruct": _instruct,
    "upscale": _upscale,
    "invert": _invert,
    "prompt": _prompt,
    "maps": _maps,
}
