"""What models make of a picture that they are told: ControlNets, super-resolution, inpainting, edits, image prompts.

Each function draws the same samples with the same noise several times: as asked, without the picture or with another
sample's, and beside what needs no model, so that the figures say what the told picture was worth.
Legend: N pictures, S their side, K channels of a condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ldm import editing
from ldm.data import pairs
from ldm.data.edits import ORIGINAL
from ldm.data.grid import to_pil
from ldm.data.images import pixels, to_float, to_uint8
from ldm.data.manifest import Manifest, resolve
from ldm.data.pairs import Canny, Pair, RandomMask, Stored
from ldm.data.samples import Samples
from ldm.editing.instruct import PICTURE_SCALE
from ldm.editing.upscale import LEVEL
from ldm.evaluate import measure
from ldm.metrics.edges import edge_agreement
from ldm.metrics.reconstruction import psnr
from ldm.models.text.vision import ImageEncoder
from ldm.models.unet.image_prompt import IPAdapter
from ldm.pipeline import Control, ImagePrompt, Progress, Settings, TextToImage
from ldm.pipeline.control import AnyControl
from ldm.rng import Rng, generator

MASKS = RandomMask(whole=0.0)
"""What is painted anew: boxes, strokes, one side; never all, which would be a text-to-image model."""


@dataclass(frozen=True)
class Case:
    """Samples: their real pictures (N, 3, S, S) in [-1, 1], what is said of them, and the captions that a judge has.

    `prompts` are what the model is told, the captions where it is told those.
    """

    images: Tensor
    captions: tuple[str, ...]
    prompts: tuple[str, ...]
    pool: tuple[str, ...]
    originals: Tensor | None = None


@dataclass(frozen=True)
class Found:
    """Pictures (N, 3, S, S) by the name of their row, figures of single pictures (N,) beside them, and what was shown.

    `upper`: rows that no model drew, such as the autoencoder's own; they tell how good a figure can be.
    """

    rows: dict[str, Tensor]
    own: dict[str, dict[str, Tensor]]
    shown: Tensor
    upper: tuple[str, ...] = field(default=())


def captioned(data: str, split: str, count: int | None, size: int, seed: int) -> Case:
    """Samples of distinct captions."""
    chosen = measure.draw(data, split, count, seed=seed)
    images = measure.real_pictures(data, split, chosen.ids, size)
    return Case(images, chosen.captions, chosen.captions, chosen.pool)


def edits(data: str, split: str, count: int | None, size: int, seed: int) -> Case:
    """Samples of a set of edits, as `ldm data edits` makes it: what to do is the prompt, the edited caption is judged.

    Raises ValueError for another data set, and for fewer samples than `count`.
    """
    stored = {ORIGINAL: Stored()}
    samples = Samples(Manifest.read(resolve(data)), split, size=size, pairs=stored)
    count = min(256, len(samples)) if count is None else count
    if not 1 <= count <= len(samples):
        raise ValueError(f"count: {count} is not between 1 and {len(samples)}, the edits of split {split!r}")
    ids = sorted(torch.randperm(len(samples), generator=generator(seed, 0, "edits")).tolist()[:count])
    meta = [samples.meta(i) for i in ids]
    if any("edited_caption" not in m for m in meta):
        raise ValueError(f"data {data!r}: no edits with captions; `ldm data edits emoji FOLDER` makes such a set")
    every = dict.fromkeys(str(samples.meta(i)["edited_caption"]) for i in range(len(samples)))
    every |= dict.fromkeys(str(samples.meta(i)["original_caption"]) for i in range(len(samples)))
    crops = samples.crop(ids)
    captions = tuple(str(m["edited_caption"]) for m in meta)
    prompts = tuple(samples.captions(i).texts[0] for i in ids)
    return Case(to_float(crops.pixels), captions, prompts, tuple(every), to_float(crops.partners[ORIGINAL]))


def made(pair: Pair, images: Tensor, seed: int = 0) -> Tensor:
    """What a pair makes of pictures (N, 3, S, S) in [-1, 1]: (N, K, S', S') float32 in [0, 1], as training has it."""

    def draw(row: int, purpose: str) -> float:
        return float(torch.rand((), generator=generator(seed, row, purpose)))

    return pairs.delivered(pair, pairs.make({"pair": pair}, to_uint8(images), {}, draw)["pair"])


def agreement(pair: Pair, drawn: Tensor, asked: Tensor) -> tuple[str, Tensor]:
    """A figure's name and values (N,): how well pictures follow a condition; F1 of edges, PSNR of all others."""
    own = made(pair, drawn)
    if isinstance(pair, Canny):
        return "edges F1", edge_agreement(own[:, :1], asked[:, :1])
    return "condition PSNR", psnr(own * 2 - 1, asked * 2 - 1)


def control(
    pipe: TextToImage,
    network: AnyControl,
    pair: Pair,
    case: Case,
    settings: Settings,
    *,
    scale: float = 1.0,
    progress: Progress | None = None,
) -> Found:
    """Pictures under the right condition, under the next sample's, and under none, against the right condition."""
    asked = made(pair, case.images)

    def draw(condition: Tensor) -> Tensor:
        under = Control(network=network, picture=condition, scale=scale)
        return pipe.controlled([under]).sample(case.prompts, settings=settings, progress=progress)

    rows = {
        "right condition": draw(asked), "another's condition": draw(asked.roll(1, 0)),
        "no condition": pipe.sample(case.prompts, settings=settings, progress=progress),
    }  # fmt: skip
    own = {name: dict([agreement(pair, pictures, asked)]) for name, pictures in rows.items()}
    rows["real pictures"] = case.images
    name, best = agreement(pair, case.images, asked)
    own["real pictures"] = {name: best}
    return Found(rows, own, asked.expand(-1, 3, -1, -1) * 2 - 1, ("real pictures",))


def upscale(
    pipe: TextToImage, case: Case, settings: Settings, *, level: int | None = None, progress: Progress | None = None
) -> Found:
    """Pictures from their small versions, beside bicubic enlargement and what the autoencoder keeps."""
    level = LEVEL if level is None else level
    side, factor = case.images.shape[-1], pipe.codec.factor
    small = made(pairs.Small(factor=factor), case.images) * 2 - 1
    rng = Rng(settings.seed, tuple(range(len(small))))
    given = pipe.concat.small(small, level, rng.normal("low resolution", tuple(small.shape[1:])))
    rows = {"drawn": pipe.shown(given).sample(case.prompts, settings=settings, progress=progress)}
    bicubic = functional.interpolate(small, size=(side, side), mode="bicubic").clamp(-1, 1)
    rows |= {"bicubic": bicubic, "autoencoder": decoded(pipe, case.images)}
    return Found(rows, {name: {} for name in rows}, bicubic, ("autoencoder",))


def inpaint(
    pipe: TextToImage,
    case: Case,
    settings: Settings,
    *,
    beside: TextToImage | None = None,
    progress: Progress | None = None,
) -> Found:
    """Pictures whose random masks were painted anew; `beside`: another model does it too, by its own means.

    `hole PSNR` compares the masked places alone with the real picture: other content than the real one may be as good.
    """
    mask = made(MASKS, case.images, settings.seed)
    holed = case.images * (1 - mask)
    if pipe.concat.kind is None:
        raise ValueError("inpainting: the model is told no mask; give one that is, and this as the one beside it")
    told = pipe.shown(pipe.concat.inpainting(case.images, mask))
    drawn = told.sample(case.prompts, settings=settings, progress=progress)
    rows = {"told the mask": mask * drawn + holed}
    if beside is not None:
        rows["base, blended"] = _blended(beside, case, mask, settings)
    rows |= {"left grey": holed, "autoencoder": mask * decoded(pipe, case.images) + holed}
    own = {name: {"hole PSNR": _hole(pictures, case.images, mask)} for name, pictures in rows.items()}
    return Found(rows, own, holed, ("autoencoder",))


def instruct(pipe: TextToImage, case: Case, settings: Settings, *, progress: Progress | None = None) -> Found:
    """Edited pictures, beside the originals untouched and the real edits."""
    if case.originals is None:
        raise ValueError("instructions: the data has no pictures before the edit")
    if settings.image_guidance is None:
        settings = replace(settings, image_guidance=PICTURE_SCALE)
    told = pipe.shown(pipe.concat.original(case.originals))
    rows = {
        "edited": told.sample(case.prompts, settings=settings, progress=progress),
        "untouched": case.originals, "real edit": case.images,
    }  # fmt: skip
    return Found(rows, {name: {} for name in rows}, case.originals, ("real edit",))


def image_prompt(
    pipe: TextToImage,
    adapter: IPAdapter,
    encoder: ImageEncoder,
    case: Case,
    settings: Settings,
    *,
    scale: float = 1.0,
    progress: Progress | None = None,
) -> Found:
    """Pictures under the real picture as a prompt, under the next sample's, and under none."""
    pictures = to_pil(case.images)

    def draw(shown: list[Any]) -> Tensor:
        prompt = ImagePrompt(adapter=adapter, encoder=encoder, picture=shown, scale=scale, each=True)
        return pipe.image_prompted([prompt]).sample(case.prompts, settings=settings, progress=progress)

    rows = {
        "right picture": draw(pictures), "another's picture": draw([*pictures[-1:], *pictures[:-1]]),
        "no picture": pipe.sample(case.prompts, settings=settings, progress=progress), "real pictures": case.images,
    }  # fmt: skip
    return Found(rows, {name: {} for name in rows}, case.images, ("real pictures",))


@torch.no_grad()
def decoded(pipe: TextToImage, images: Tensor) -> Tensor:
    """What the autoencoder keeps of pictures."""
    return torch.cat([pipe.decode(pipe.encode(part), Settings()) for part in images.split(32)])


def _hole(pictures: Tensor, real: Tensor, mask: Tensor) -> Tensor:
    """PSNR (N,) in dB of the masked places; a range of 2."""
    error = ((pictures.double() - real.double()).square() * mask).sum((1, 2, 3)) / (3 * mask.double().sum((1, 2, 3)))
    return 10 * torch.log10(4 / error)


def _blended(pipe: TextToImage, case: Case, mask: Tensor, settings: Settings) -> Tensor:
    rows, masks = [], to_pil(mask.expand(-1, 3, -1, -1) * 2 - 1)
    for i, picture in enumerate(to_pil(case.images)):
        hole = masks[i].convert("L")
        one = replace(settings, seed=settings.seed + i)
        rows += editing.inpaint(pipe, picture, hole, case.prompts[i], settings=one)
    return to_float(np.stack([pixels(picture) for picture in rows]))


def figures(
    found: Found,
    case: Case,
    network: Any,
    distances: Any,
    clip: tuple[Any, Any] | None,
    *,
    candidates: int = 64,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """By row: what it was measured by itself, PSNR and perceptual distance to the real picture, KID x 1000, R@1.

    `network` gives features (B, D), `distances(a, b)` perceptual distances (B,); `clip` a CLIP and its settings. Edits
    tell the distance to the original too.
    """
    from ldm.metrics.features import extract, in_batches
    from ldm.metrics.fid import kernel_distance
    from ldm.metrics.retrieval import Retrieval

    real = extract(network, in_batches(case.images))
    told: dict[str, dict[str, float]] = {}
    for name, pictures in found.rows.items():
        row: dict[str, float] = {key: _mean(value) for key, value in found.own[name].items()}
        same = torch.equal(pictures, case.images)
        if not same:
            row |= {"PSNR": _mean(psnr(pictures, case.images)), "distance": _mean(distances(pictures, case.images))}
        if case.originals is not None and not torch.equal(pictures, case.originals):
            row["from original"] = _mean(distances(pictures, case.originals))
        own = extract(network, in_batches(pictures))
        row["similarity"] = _mean(functional.cosine_similarity(own, real))
        if not same and len(real) > 1:
            row["KID x1000"] = 1000 * kernel_distance(real, own, seed=seed).mean
        if clip is not None:
            among = measure.candidates(candidates, case.pool)
            r: Retrieval = measure.retrieval_of(pictures, case.captions, case.pool, *clip, candidates=among, seed=seed)
            row["R@1"] = r.at(1).rate
        told[name] = row
    return told


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def columns(told: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    """All figures' names, in the order in which they come."""
    return list(dict.fromkeys(name for row in told.values() for name in row))
