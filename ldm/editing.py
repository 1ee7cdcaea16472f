"""Editing pictures with a text-to-image model: img2img, inpainting, inversion, prompt-to-prompt, CLIP guidance.

Each function takes a `TextToImage` and pictures, and gives pictures. Legend: B pictures, Z latent channels, h, w latent
pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.data.decode import to_mask, to_rgb
from ldm.data.grid import to_pil
from ldm.data.images import to_float
from ldm.models.text.openclip import AnyClip, fitted, tokenizer_of
from ldm.models.unet.control import controlled
from ldm.pipeline import Guide, Progress, Settings, TextToImage
from ldm.rng import Rng
from ldm.sampling import prompt_to_prompt as p2p
from ldm.sampling.editing import img2img_times, inpaint_cond, keep
from ldm.sampling.editing import inpaint as inpaint_denoiser
from ldm.sampling.editing import invert as invert_latents
from ldm.sampling.guidance import similarity
from ldm.sampling.memory import enough_memory
from ldm.sampling.run import Progress as StepProgress
from ldm.sampling.run import counted
from ldm.sampling.settings import Size
from ldm.types import Cond, Denoise


@dataclass(frozen=True, kw_only=True)
class Change:
    """What of the source's attention an edited prompt keeps, as shares of the steps; prompt-to-prompt, section 3.2.

    `local`: words whose place may change; the rest of the picture stays the source's. `weights`: word -> factor.
    """

    cross: float = 0.8
    own: float = 0.4
    local: tuple[str, ...] = ()
    weights: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Canvas:
    """A picture as it is edited: `picture` at its final size, `padded` to what the model can draw, its settings.

    Without a size in the settings the picture keeps its own, padded right and below by copies of its edge.
    """

    picture: Image.Image
    padded: Image.Image
    settings: Settings

    @staticmethod
    def of(pipe: TextToImage, image: Image.Image, settings: Settings) -> Canvas:
        """The picture at the settings' size, or its own. Raises ValueError for a size that the model cannot make."""
        rgb = to_rgb(image)
        if settings.size is not None:
            height, width = pipe.size(settings.size)
            picture = rgb.resize((width, height), Image.Resampling.BICUBIC)
            return Canvas(picture, picture, replace(settings, size=(height, width)))
        multiple = max(8, pipe.codec.factor * pipe.network.multiple)
        more = [(0, -side % multiple) for side in (rgb.height, rgb.width)]
        padded = Image.fromarray(np.pad(np.asarray(rgb), [*more, (0, 0)], mode="edge")) if any(map(max, more)) else rgb
        return Canvas(rgb, padded, replace(settings, size=(padded.height, padded.width)))

    def latents(self, pipe: TextToImage) -> Tensor:
        """(1, Z, h, w) of the padded picture."""
        return pipe.codec.encode(_pixels(self.padded).to(pipe.device))

    def cut(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures of the padded size without what was added."""
        return [p if p.size == self.picture.size else p.crop((0, 0, *self.picture.size)) for p in pictures]


def encode(pipe: TextToImage, image: Image.Image, size: Size | None = None) -> Tensor:
    """Latents (1, Z, h, w) of a picture scaled to a size in pixels, or of its own size as `Canvas` has it."""
    return Canvas.of(pipe, image, Settings(size=size)).latents(pipe)


def _pixels(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    return to_float(np.array(image, np.uint8)[None])


def _pictures(pipe: TextToImage, latents: Tensor, settings: Settings) -> list[Image.Image]:
    return to_pil(pipe.decode(latents, settings))


Batch = Callable[[int, Rng, StepProgress | None], Tensor]
"""(rows, their randomness, progress) -> latents (rows, Z, h, w)."""


def _batches(
    pipe: TextToImage, canvas: Canvas, prompt: str, count: int, draw: Batch, steps: int, progress: Progress | None
) -> list[Image.Image]:
    """`count` pictures, `settings.batch` at a time; picture i's noise belongs to (seed, i)."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    settings, found = canvas.settings, []
    pipe.check([prompt], settings)
    starts = range(0, count, settings.batch)
    for k, start in enumerate(starts):
        rows = min(settings.batch, count - start)
        step = None if progress is None else counted(progress, k * steps, len(starts) * steps)
        with enough_memory(pipe.size(settings.size), rows):
            latents = draw(rows, Rng(settings.seed, tuple(range(start, start + rows))), step)
            found += _pictures(pipe, latents, settings)
    return canvas.cut(found)


def img2img(
    pipe: TextToImage,
    image: Image.Image,
    prompt: str,
    *,
    strength: float = 0.7,
    settings: Settings,
    count: int = 1,
    progress: Progress | None = None,
) -> list[Image.Image]:
    """A picture drawn again under a prompt from its own noised latents (SDEdit, arXiv 2108.01073), at `Canvas`' size.

    Raises ValueError unless 0 < strength < 1: at 0 nothing would change, at 1 nothing of the picture would be left.
    """
    times = img2img_times(pipe.process.schedule, settings.steps, strength, settings.spacing or "trailing")
    canvas = Canvas.of(pipe, image, settings)
    known = canvas.latents(pipe)

    def draw(rows: int, rng: Rng, step: StepProgress | None) -> Tensor:
        x = rng.normal("start", known.shape[1:]).to(known)
        start = known.expand(rows, -1, -1, -1)
        return pipe.latents([prompt] * rows, canvas.settings, rng, step, x=x, start=start, times=times)

    return _batches(pipe, canvas, prompt, count, draw, len(times), progress)


def inpaint(
    pipe: TextToImage,
    image: Image.Image,
    mask: Image.Image,
    prompt: str,
    *,
    settings: Settings,
    count: int = 1,
    progress: Progress | None = None,
) -> list[Image.Image]:
    """Draw the white of `mask` anew under a prompt; the black is the picture at `Canvas`' size, pixel for pixel.

    Any base model does: its estimate outside the mask is the picture. A 9-channel inpainting model is told the mask and
    the picture without its white instead. What is transparent in the mask is black. Raises ValueError for a mask of
    another size than the picture, and for a network of other channels.
    """
    image, mask = to_rgb(image), to_mask(mask)
    if mask.size != image.size:
        raise ValueError(
            f"mask: {mask.size[0]} x {mask.size[1]} pixels, the picture has {image.width} x {image.height}"
        )
    channels = pipe.codec.channels
    takes = pipe.network.in_channels
    if takes not in (channels, 2 * channels + 1):
        raise ValueError(
            f"inpainting: the {pipe.network.title} takes {takes} channels, expected {channels} or {2 * channels + 1}"
        )
    canvas = Canvas.of(pipe, image, settings)
    known = canvas.latents(pipe)
    inside = np.asarray(mask.resize(canvas.picture.size, Image.Resampling.BILINEAR)) > 127
    more = [(0, whole - part) for whole, part in zip(pipe.size(canvas.settings.size), inside.shape, strict=True)]
    wide = torch.from_numpy(np.pad(inside, more).astype(np.float32))[None, None]
    # a latent pixel changes if any of its picture pixels does
    latent_mask = F.max_pool2d(wide, pipe.codec.factor).to(known)
    rest = None
    if takes != channels:
        rest = pipe.codec.encode((_pixels(canvas.padded) * (1 - wide)).to(pipe.device))

    def draw(rows: int, rng: Rng, step: StepProgress | None) -> Tensor:
        x = rng.normal("start", known.shape[1:]).to(known)
        old = known.expand(rows, -1, -1, -1)
        if rest is None:
            wrap, start = functools.partial(inpaint_denoiser, known=old, mask=latent_mask), old
        else:
            wrap, start = functools.partial(_told, mask=latent_mask, rest=rest.expand_as(old)), None
        latents = pipe.latents([prompt] * rows, canvas.settings, rng, step, x=x, start=start, wrap=wrap)
        return keep(latents, old, latent_mask)

    drawn = _batches(pipe, canvas, prompt, count, draw, settings.steps, progress)
    pixel_mask = Image.fromarray(inside)
    return [Image.composite(picture, canvas.picture, pixel_mask) for picture in drawn]


def _told(denoise: Denoise, *, mask: Tensor, rest: Tensor) -> Denoise:
    """The denoiser of an inpainting model that is told the mask and the latents of the rest of the picture."""

    def told(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return denoise(x, t, inpaint_cond(cond, mask, rest))

    return told


def invert(pipe: TextToImage, image: Image.Image, prompt: str = "", *, settings: Settings, refine: int = 0) -> Tensor:
    """The noise (1, Z, h, w) from which DDIM draws the picture back (DDIM, section 4.3); guidance is not used.

    `settings.steps` must be those of the drawing. Unlike sampling noise it is already at the last time's level.
    """
    canvas = Canvas.of(pipe, image, replace(settings, guidance=1.0, negative=""))
    pipe.check([prompt], canvas.settings)
    denoise = pipe.denoiser(canvas.settings)
    cond = pipe.encode_text([prompt], canvas.settings.size)
    spacing = settings.spacing or "trailing"
    known = canvas.latents(pipe)
    schedule = pipe.process.schedule
    return invert_latents(denoise, known, cond, schedule=schedule, steps=settings.steps, spacing=spacing, refine=refine)


def redraw(
    pipe: TextToImage, noise: Tensor, prompt: str, *, settings: Settings, size: tuple[int, int] | None = None
) -> list[Image.Image]:
    """Draw from inverted noise (1, Z, h, w) with deterministic DDIM, under the same or another prompt.

    `size` (width, height): of the picture that was inverted, where it was padded.
    """
    whole = (noise.shape[2] * pipe.codec.factor, noise.shape[3] * pipe.codec.factor)
    ddim = replace(settings, sampler="ddim", eta=0.0, spacing=settings.spacing or "trailing", size=whole)
    drawn = _pictures(pipe, pipe.latents([prompt], ddim, Rng(0, (0,)), x=noise), ddim)
    return drawn if size is None else [picture.crop((0, 0, *size)) for picture in drawn]


def edit(
    pipe: TextToImage, source: str, target: str, *, change: Change, settings: Settings, noise: Tensor | None = None
) -> tuple[Image.Image, Image.Image]:
    """The source prompt's picture and its edit: same composition, another prompt (arXiv 2208.01626).

    A word swap if both prompts have tokens for it, otherwise a refinement. `noise` (1, Z, h, w) starts from an inverted
    picture. Raises ValueError for a word that is not in its prompt.
    """
    tokenizer = pipe.text[0].tokenizer
    before, after = ([tokenizer.start, *tokenizer.encode(p), tokenizer.end] for p in (source, target))
    length = tokenizer.context
    swapped = all(a and b for a, b in p2p.spans(before, after))
    made = p2p.word_swap(before, after, length) if swapped else p2p.refinement(before, after, length)
    if source == target:
        made = p2p.unchanged(length)
    for word, factor in (change.weights or {}).items():
        made = p2p.reweight(made, dict.fromkeys(_places(pipe, target, word), factor))
    words = None
    if change.local:
        words = [_all_places(pipe, p, change.local) for p in (source, target)]
    one = Rng(settings.seed, (0,))
    x = one.normal("start", pipe.latent_shape(settings.size)) if noise is None else noise
    whole = (x.shape[2] * pipe.codec.factor, x.shape[3] * pipe.codec.factor)
    settings = replace(settings, size=whole)
    pipe.check([source, target], settings)
    control = p2p.PromptToPrompt(
        [made], steps=settings.steps, cross=change.cross, own=change.own, words=words, shape=(x.shape[2], x.shape[3])
    )
    x = x.to(pipe.device).expand(2, -1, -1, -1)
    same = Rng(settings.seed, (0, 0))
    with controlled(pipe.network, control):
        latents = pipe.latents([source, target], settings, same, control.progress, x=x, wrap=control.blend)
    pictures = _pictures(pipe, latents, settings)
    return pictures[0], pictures[1]


def attention_maps(pipe: TextToImage, prompt: str, *, settings: Settings) -> tuple[Image.Image, dict[str, Image.Image]]:
    """The prompt's picture, and for each word where the network looked for it: mean over layers and steps."""
    pipe.check([prompt], settings)
    _, h, w = pipe.latent_shape(settings.size)
    maps = p2p.AttentionMaps(rows=1, shape=(h, w))
    with controlled(pipe.network, maps, own=False):
        latents = pipe.latents([prompt], settings, Rng(settings.seed, (0,)))
    picture = _pictures(pipe, latents, settings)[0]
    found = {}
    for word in dict.fromkeys(prompt.replace(",", " ").split()):
        heat = maps.of(0, _places(pipe, prompt, word))
        heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
        grey = Image.fromarray((heat * 255).byte().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
        tint = Image.new("RGB", picture.size, (255, 64, 32))
        found[word] = Image.composite(tint, picture.convert("L").convert("RGB"), grey.point(lambda v: int(v * 0.8)))
    return picture, found


def _all_places(pipe: TextToImage, prompt: str, words: Sequence[str]) -> list[int]:
    """Token positions of those of the words that the prompt has; at least one must be there."""
    present = [w for w in words if w.lower() in prompt.lower().replace(",", " ").split()]
    if not present:
        raise ValueError(f"local: none of {list(words)} is a word of {prompt!r}")
    return [i for w in present for i in _places(pipe, prompt, w)]


def _places(pipe: TextToImage, prompt: str, word: str) -> list[int]:
    """Token positions of a word in a prompt, counted with the start token."""
    tokenizer = pipe.text[0].tokenizer
    ids, own = tokenizer.encode(prompt), tokenizer.encode(word)
    for i in range(len(ids) - len(own) + 1):
        if own and ids[i : i + len(own)] == own:
            return list(range(i + 1, i + 1 + len(own)))
    raise ValueError(f"word {word!r} is not in the prompt {prompt!r}")


def clip_guide(pipe: TextToImage, clip: nn.Module, config: AnyClip, scale: float) -> Guide:
    """A guide for `TextToImage.sample`: CLIP's image-text similarity, times its own temperature, steers each picture.

    The gradient goes through the decoder but not through the network.
    """
    model: Any = clip
    tokenize = tokenizer_of(config)

    def guide(denoise: Denoise, *, prompts: Sequence[str]) -> Denoise:
        with torch.no_grad():
            text = model.encode_text(tokenize(list(prompts)).to(pipe.device), normalize=True)

        def score(pixels: Tensor) -> Tensor:
            images = model.encode_image(fitted(pixels, config), normalize=True)
            return model.logit_scale.exp() * (images * text).sum(1)

        return similarity(
            denoise, score, scale, schedule=pipe.process.schedule, decode=pipe.codec.decode, through_network=False
        )

    return guide
