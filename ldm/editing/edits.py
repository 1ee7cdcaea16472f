"""Editing pictures with a text-to-image model: img2img, inpainting, inversion, prompt-to-prompt, CLIP guidance.

Each function takes a `TextToImage` and pictures, and gives pictures. Legend: B pictures, Z latent channels, h, w latent
pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.data.decode import to_mask, to_rgb
from ldm.diffusion.schedule import Flow, Schedule
from ldm.editing.canvas import Canvas, batches, pictures_of, pixels
from ldm.models.control import controlled
from ldm.models.text.openclip import AnyClip, fitted, tokenizer_of
from ldm.models.transformers.base import Transformer
from ldm.pipeline import Guide, Progress, Settings, TextToImage
from ldm.pipeline.concat import filling
from ldm.pipeline.places import Places
from ldm.pipeline.steps import OwnSteps
from ldm.rng import Rng
from ldm.sampling import prompt_to_prompt as p2p
from ldm.sampling.editing import img2img_times, inpaint_cond, keep
from ldm.sampling.editing import inpaint as inpaint_denoiser
from ldm.sampling.editing import invert as invert_latents
from ldm.sampling.guidance import similarity
from ldm.sampling.registry import lookup
from ldm.sampling.run import Progress as StepProgress
from ldm.sampling.times import times as spaced
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

    Of a flow's steps it takes the last ceil(steps x strength), of others' floor(steps x strength), as diffusers does.
    Raises ValueError unless 0 < strength < 1: at 0 nothing would change, at 1 nothing of the picture would be left.
    """
    img2img_times(pipe.process.schedule, 1, strength, times=[0.0])  # refuses a strength before anything is computed
    canvas = Canvas.of(pipe, image, settings)
    known = canvas.latents(pipe)
    times = _last_times(pipe, known, settings, strength)

    def draw(rows: int, rng: Rng, step: StepProgress | None) -> Tensor:
        x = rng.normal("start", known.shape[1:]).to(known)
        start = known.expand(rows, -1, -1, -1)
        return pipe.latents([prompt] * rows, canvas.settings, rng, step, x=x, start=start, times=times)

    return batches(pipe, canvas, prompt, count, draw, len(times), progress)


def _last_times(pipe: TextToImage, known: Tensor, settings: Settings, strength: float) -> list[float]:
    """The last `strength` of the times: a flow's are those that its own scheduler takes for latents of this size."""
    schedule, path = pipe.process.schedule, None
    if isinstance(schedule, Flow):
        schedule, path = _flow_times(pipe, known, settings)
    return img2img_times(schedule, settings.steps, strength, settings.spacing or "trailing", times=path)


def _flow_times(pipe: TextToImage, latents: Tensor, settings: Settings) -> tuple[Schedule, list[float]]:
    """The schedule and all times of a flow for latents (B, Z, h, w), as the settings' sampler takes them."""
    schedule = pipe.at((latents.shape[2], latents.shape[3]), settings.steps).process.schedule
    plan = OwnSteps(pipe.spacing, pipe.offset, pipe.end, pipe.student, pipe.own).plan(settings, schedule)
    if plan.times is not None:
        return schedule, list(plan.times)
    return schedule, spaced(schedule, settings.steps, settings.spacing or lookup(settings.sampler).spacing)


def inpaint(
    pipe: TextToImage,
    image: Image.Image,
    mask: Image.Image,
    prompt: str,
    *,
    strength: float = 1.0,
    settings: Settings,
    count: int = 1,
    progress: Progress | None = None,
) -> list[Image.Image]:
    """Draw the white of `mask` anew under a prompt; the black is the picture at `Canvas`' size, pixel for pixel.

    Any base model does: its estimate outside the mask is the picture. An inpainting model (of 9 channels, FLUX.1 Fill)
    is told the mask and the picture without its white instead. What is transparent in the mask is black. With
    `strength` below 1 the white begins at the picture, as in `img2img`. On flows, with a deterministic sampler, this is
    what diffusers' pipelines do by blending x_t after each step: outside the mask x_t is alpha_t x_0 + sigma_t noise
    either way. Raises ValueError for a mask of another size than the picture, for strengths outside (0, 1], and for a
    network of other channels.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1] (1: nothing of the masked picture is left), got {strength}")
    image, mask = to_rgb(image), to_mask(mask)
    if mask.size != image.size:
        raise ValueError(
            f"mask: {mask.size[0]} x {mask.size[1]} pixels, the picture has {image.width} x {image.height}"
        )
    kind, channels, takes = pipe.concat.kind, pipe.codec.channels, pipe.network.in_channels
    if kind not in ("mask", "fill") and takes != channels:
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
    times = None if strength == 1 else _last_times(pipe, known, settings, strength)
    rest = None if kind is None else pipe.encode(pixels(canvas.padded) * (1 - wide))

    def draw(rows: int, rng: Rng, step: StepProgress | None) -> Tensor:
        x = rng.normal("start", known.shape[1:]).to(known)
        old = known.expand(rows, -1, -1, -1)
        if rest is None:
            wrap, start = functools.partial(inpaint_denoiser, known=old, mask=latent_mask), old
        else:
            rows_of = rest.expand_as(old)
            fill = {"concat": filling(wide, rows_of, pipe.codec.factor)} if kind == "fill" else None
            wrap = functools.partial(_told, given=fill or inpaint_cond({}, latent_mask, rows_of))
            start = None if times is None else old
        latents = pipe.latents([prompt] * rows, canvas.settings, rng, step, x=x, start=start, times=times, wrap=wrap)
        return latents if kind == "fill" else keep(latents, old, latent_mask)

    steps = settings.steps if times is None else len(times)
    drawn = batches(pipe, canvas, prompt, count, draw, steps, progress)
    pixel_mask = Image.fromarray(inside)
    return [Image.composite(picture, canvas.picture, pixel_mask) for picture in drawn]


def _told(denoise: Denoise, *, given: Cond) -> Denoise:
    """The denoiser of an inpainting model that is told the mask and the latents of the rest of the picture."""

    def told(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return denoise(x, t, cond | given)

    return told


def invert(pipe: TextToImage, image: Image.Image, prompt: str = "", *, settings: Settings, refine: int = 0) -> Tensor:
    """The noise (1, Z, h, w) from which DDIM draws the picture back (DDIM, section 4.3); guidance is not used.

    `settings.steps` must be those of the drawing. Unlike sampling noise it is already at the last time's level. On
    flows it is Euler's method, backwards over the model's own times; FLUX.1 dev is told a guidance scale of 1.
    """
    canvas = Canvas.of(pipe, image, replace(settings, guidance=1.0, negative=""))
    pipe.check([prompt], canvas.settings)
    known = canvas.latents(pipe)
    size = pipe.size(canvas.settings.size)
    how: dict[str, Any] = {"steps": settings.steps, "refine": refine}
    if isinstance(pipe.process.schedule, Flow):
        own = pipe.at((known.shape[2], known.shape[3]), settings.steps)
        cond = own.conditioning.of([prompt], canvas.settings, [prompt], size)
        schedule, times = _ode_times(pipe, known, settings)
        return invert_latents(own.denoiser(canvas.settings), known, cond, schedule=schedule, times=times, **how)
    cond = pipe.encode_text([prompt], size)
    how |= {"spacing": settings.spacing or "trailing"}
    return invert_latents(pipe.denoiser(canvas.settings), known, cond, schedule=pipe.process.schedule, **how)


def _ode_times(pipe: TextToImage, latents: Tensor, settings: Settings) -> tuple[Schedule, list[float]]:
    """Of `_flow_times`, those of the model's own scheduler, whatever the settings' sampler is."""
    own = settings.sampler if pipe.own is None else pipe.own.name
    return _flow_times(pipe, latents, replace(settings, sampler=own))


def redraw(
    pipe: TextToImage, noise: Tensor, prompt: str, *, settings: Settings, size: tuple[int, int] | None = None
) -> list[Image.Image]:
    """Draw from inverted noise (1, Z, h, w) with deterministic DDIM, under the same or another prompt.

    `size` (width, height): of the picture that was inverted, where it was padded.
    """
    whole = (noise.shape[2] * pipe.codec.factor, noise.shape[3] * pipe.codec.factor)
    ddim = replace(settings, sampler="ddim", eta=0.0, spacing=settings.spacing or "trailing", size=whole)
    times = _ode_times(pipe, noise, settings)[1] if isinstance(pipe.process.schedule, Flow) else None
    drawn = pictures_of(pipe, pipe.latents([prompt], ddim, Rng(0, (0,)), x=noise, times=times), ddim)
    return drawn if size is None else [picture.crop((0, 0, *size)) for picture in drawn]


def edit(
    pipe: TextToImage, source: str, target: str, *, change: Change, settings: Settings, noise: Tensor | None = None
) -> tuple[Image.Image, Image.Image]:
    """The source prompt's picture and its edit: same composition, another prompt (arXiv 2208.01626).

    A word swap if both prompts have tokens for it, otherwise a refinement. In joint attention (SD3, FLUX.1) it is the
    picture's queries that take the source's weights, see `ldm.models.control`. `noise` (1, Z, h, w) starts from an
    inverted picture. Raises ValueError for a word that is not in its prompt, and for a prompt of several contexts.
    """
    places = _places(pipe, [source, target], settings)
    made = places.edit(source, target)
    for word, factor in (change.weights or {}).items():
        made = p2p.reweight(made, dict.fromkeys(places.word(target, word), factor))
    words = [places.words(p, change.local) for p in (source, target)] if change.local else None
    one = Rng(settings.seed, (0,))
    x = one.normal("start", pipe.latent_shape(settings.size)) if noise is None else noise
    whole = (x.shape[2] * pipe.codec.factor, x.shape[3] * pipe.codec.factor)
    settings = replace(settings, size=whole)
    pipe.check([source, target], settings)
    control = p2p.PromptToPrompt(
        [made], steps=settings.steps, cross=change.cross, own=change.own, words=words, shape=(x.shape[2], x.shape[3]),
        own_pixels=None if isinstance(pipe.network, Transformer) else 256,
    )  # fmt: skip
    x = x.to(pipe.device).expand(2, -1, -1, -1)
    same = Rng(settings.seed, (0, 0))
    with controlled(pipe.network, control):
        latents = pipe.latents([source, target], settings, same, control.progress, x=x, wrap=control.blend)
    pictures = pictures_of(pipe, latents, settings)
    return pictures[0], pictures[1]


def attention_maps(pipe: TextToImage, prompt: str, *, settings: Settings) -> tuple[Image.Image, dict[str, Image.Image]]:
    """The prompt's picture, and for each word where the network looked for it: mean over layers and steps."""
    pipe.check([prompt], settings)
    _, h, w = pipe.latent_shape(settings.size)
    maps, places = p2p.AttentionMaps(rows=1, shape=(h, w)), _places(pipe, [prompt], settings)
    with controlled(pipe.network, maps, own=False):
        latents = pipe.latents([prompt], settings, Rng(settings.seed, (0,)))
    picture = pictures_of(pipe, latents, settings)[0]
    found = {}
    for word in dict.fromkeys(prompt.replace(",", " ").split()):
        heat = maps.of(0, places.word(prompt, word))
        heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
        grey = Image.fromarray((heat * 255).byte().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
        tint = Image.new("RGB", picture.size, (255, 64, 32))
        found[word] = Image.composite(tint, picture.convert("L").convert("RGB"), grey.point(lambda v: int(v * 0.8)))
    return picture, found


def _places(pipe: TextToImage, prompts: Sequence[str], settings: Settings) -> Places:
    """Where words stand. Raises ValueError for prompts that take more than one context of tokens."""
    if pipe.conditioning.chunks(prompts, settings) > 1:
        raise ValueError("prompts longer than the text encoder's context: their words' attention cannot be told apart")
    return Places.of(pipe.network, pipe.text)


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
