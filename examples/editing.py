"""Every editing method once, on the shipped emoji model: what goes in, the one call, what comes out.

    python examples/editing.py --out editing

Draws a picture, then changes it by image to image, inpainting, DDIM inversion, prompt-to-prompt (word swap, refinement,
re-weighting, local blend) and CLIP guidance, and shows where the network looked for each word. Each method writes a row
of pictures; `sheet.png` holds them all. The command line has the same as `ldm edit` and `ldm sample --clip-guidance`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

import ldm
from launch.options import Parser
from ldm.data.grid import sheet, to_pil
from ldm.editing import Change, attention_maps, clip_guide, edit, img2img, inpaint, invert, redraw
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.sources import load_clip

PROMPT = "a smiling face with sunglasses"
OTHER = "a smiling face with heart-eyes"
Row = list[Image.Image]


def image_to_image(pipe: TextToImage, picture: Image.Image, settings: Settings) -> Row:
    """The higher the strength, the less of the picture is left."""
    return [picture, *(img2img(pipe, picture, OTHER, strength=s, settings=settings)[0] for s in (0.3, 0.6, 0.9))]


def inpainting(pipe: TextToImage, picture: Image.Image, settings: Settings) -> Row:
    """White is drawn anew, black stays to the pixel."""
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).rectangle((0, 0, picture.width, picture.height // 2), fill=255)
    return [picture, mask.convert("RGB"), *inpaint(pipe, picture, mask, OTHER, settings=settings, count=2)]


def inversion(pipe: TextToImage, picture: Image.Image, settings: Settings) -> Row:
    """The noise that gives this very picture, drawn under its own prompt and under another."""
    plain = replace(settings, guidance=1.0)  # inversion and back are each other's reverse without guidance only
    noise = invert(pipe, picture, PROMPT, settings=plain, refine=1)
    back = redraw(pipe, noise, PROMPT, settings=plain)[0]
    return [picture, back, redraw(pipe, noise, OTHER, settings=settings)[0]]


def word_swap(pipe: TextToImage, picture: Image.Image, settings: Settings) -> Row:
    """One word becomes another, the composition stays."""
    return list(edit(pipe, "a red apple", "a green apple", change=Change(cross=0.8, own=0.4), settings=settings))


def refinement(pipe: TextToImage, picture: Image.Image, settings: Settings) -> Row:
    """Words are added."""
    return list(edit(pipe, "a smiling face", PROMPT, change=Change(cross=0.6, own=0.3), settings=settings))


def reweighting(pipe: TextToImage, picture: Image.Image, settings: Settings) -> Row:
    """A word counts more or less."""
    changes = [Change(weights={"sunglasses": factor}) for factor in (0.0, 2.0)]
    pairs = [edit(pipe, PROMPT, PROMPT, change=change, settings=settings) for change in changes]
    return [pairs[0][0], *(after for _, after in pairs)]


def local_blend(pipe: TextToImage, picture: Image.Image, settings: Settings) -> Row:
    """Only the place of these words may change."""
    change = Change(cross=0.4, own=0.2, local=("sunglasses", "heart-eyes"))
    return list(edit(pipe, PROMPT, OTHER, change=change, settings=settings))


def maps(pipe: TextToImage, picture: Image.Image, settings: Settings) -> Row:
    """Where the network looked for each word."""
    drawn, words = attention_maps(pipe, PROMPT, settings=settings)
    return [drawn, *words.values()]


def clip_guidance(pipe: TextToImage, picture: Image.Image, settings: Settings) -> Row:
    """Gradients of a CLIP's image-text similarity steer a model that is not told its prompt twice."""
    clip, config = load_clip("clip_emoji")
    plain, row = replace(settings, guidance=1.0), []
    for scale in (0.0, 5.0, 20.0):
        guide = clip_guide(pipe, clip, config, scale) if scale else None
        row += to_pil(pipe.sample([OTHER], settings=plain, guide=guide))
    return row


METHODS = (
    image_to_image, inpainting, inversion, word_swap, refinement, reweighting, local_blend, maps, clip_guidance,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    p = Parser(description="Every editing method once, on the shipped emoji model.")
    p.add_argument("--out", type=Path, default=Path("editing"), help="folder for the pictures")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--seed", type=int, default=3)
    args = p.parse_args(argv)
    pipe = ldm.load("emoji")
    settings = Settings(sampler="ddim", steps=args.steps, guidance=3.0, seed=args.seed)
    picture = to_pil(pipe.sample([PROMPT], settings=settings))[0]
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for method in METHODS:
        rows.append(method(pipe, picture, settings))
        path = args.out / f"{method.__name__}.png"
        sheet(rows[-1], len(rows[-1])).save(path)
        print(f"{path}: {method.__doc__}")
    width = max(map(len, rows))
    blank = Image.new("RGB", picture.size, "white")
    sheet([image for row in rows for image in row + [blank] * (width - len(row))], width).save(args.out / "sheet.png")
    print(f"{args.out / 'sheet.png'}: all of them")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
