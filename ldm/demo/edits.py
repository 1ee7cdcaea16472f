"""The demo's editing pictures: each method of `ldm.editing` once, on the shipped model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image, ImageDraw

from ldm.data.grid import to_pil
from ldm.editing import Change, attention_maps, clip_guide, edit, img2img, inpaint, invert, redraw
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.sources import load_clip

STRENGTHS = (0.3, 0.5, 0.7, 0.9)
SWAPS = (
    ("a red apple", "a green apple", ()),
    ("woman firefighter, medium-dark skin tone", "woman astronaut, medium-dark skin tone", ()),
    ("a smiling face with sunglasses", "a smiling face with heart-eyes", ()),
)

Row = Sequence[Image.Image | None]


def rows(pipe: TextToImage, settings: Settings, pictures: Sequence[Image.Image]) -> dict[str, list[Image.Image | None]]:
    """Named rows of at most six pictures; the first of `pictures` is drawn again, filled in and inverted."""
    ddim = replace(settings, sampler="ddim", steps=40, eta=0.0)
    found: dict[str, list[Image.Image | None]] = {}
    given = pictures[0]
    found["img2img to “a pizza”: the picture, then strength 0.3, 0.5, 0.7, 0.9"] = [
        given,
        *(img2img(pipe, given, "a pizza", strength=s, settings=ddim)[0] for s in STRENGTHS),
    ]
    mask = Image.new("L", given.size, 0)
    ImageDraw.Draw(mask).rectangle((0, given.height // 2, given.width, given.height), fill=255)
    found["inpainting: the picture, the mask, three fillings of its lower half"] = [
        given,
        mask.convert("RGB"),
        *inpaint(pipe, given, mask, "a smiling face with sunglasses", settings=ddim, count=3),
    ]
    exact = replace(ddim, guidance=1.0, steps=100)
    noise = invert(pipe, given, settings=exact)
    back = redraw(pipe, noise, "", settings=exact)[0]
    found["DDIM inversion: the picture, drawn back from its own noise, and under “a red heart”"] = [
        given,
        back,
        redraw(pipe, noise, "a red heart", settings=replace(exact, guidance=3.0))[0],
    ]
    for source, target, local in SWAPS:
        before, after = edit(pipe, source, target, change=Change(local=local), settings=ddim)
        found[f"prompt-to-prompt: “{source}” → “{target}”"] = [before, after]
    weighed = "a smiling face with sunglasses"
    pairs = [edit(pipe, weighed, weighed, change=Change(weights={"sunglasses": w}), settings=ddim) for w in (0.0, 2.0)]
    found[f"re-weighting: “{weighed}”, then sunglasses times 0 and 2"] = [pairs[0][0], *(after for _, after in pairs)]
    local = Change(cross=0.4, own=0.2, local=("sunglasses", "heart-eyes"))
    found["local blend: only the place of “sunglasses” and “heart-eyes” changes"] = list(
        edit(pipe, weighed, "a smiling face with heart-eyes", change=local, settings=ddim)
    )
    found["CLIP guidance 0, 5, 20 beside no other: “a red heart”"] = _guided(pipe, "a red heart", ddim)
    picture, words = attention_maps(pipe, "woman firefighter, medium-dark skin tone", settings=ddim)
    found["where it looked for: " + ", ".join(words)] = [picture, *list(words.values())[:5]]
    width = max(map(len, found.values()))
    return {name: row + [None] * (width - len(row)) for name, row in found.items()}


def _guided(pipe: TextToImage, prompt: str, settings: Settings) -> list[Image.Image | None]:
    """The same noise, without classifier-free guidance, under more and more of the shipped CLIP's."""
    clip, config = load_clip("clip_emoji")
    plain, row = replace(settings, guidance=1.0), []
    for scale in (0.0, 5.0, 20.0):
        guide = clip_guide(pipe, clip.to(pipe.device), config, scale) if scale else None
        row += to_pil(pipe.sample([prompt], settings=plain, guide=guide))
    return row
