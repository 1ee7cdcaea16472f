"""How well a model has learnt a subject, whether it still follows prompts, and what it forgot: figures and pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from ldm.data.decode import image_member, picture
from ldm.data.grid import to_pil
from ldm.data.images import pixels, resize, to_float
from ldm.data.manifest import Manifest, resolve
from ldm.data.shards import Shards
from ldm.metrics.clip_score import similarity
from ldm.metrics.features import EfficientNetLite0
from ldm.metrics.retrieval import recall_at
from ldm.models.text.openclip import tokenizer_of
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.pictures import check
from ldm.recipes.sources import load_clip

COLORS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple")
OTHERS = (
    "a tree",
    "a red apple",
    "a rocket",
    "a smiling face with sunglasses",
    "a pizza",
    "a red heart",
    "an owl",
    "cat",
)


@dataclass(frozen=True)
class Drawn:
    """Pictures (N, 3, H, W) in [-1, 1] of the same noise for every model: of the subject, in colours, class, others."""

    subject: Tensor
    colors: Tensor
    noun: Tensor
    others: Tensor


@dataclass(frozen=True)
class Scores:
    """`subject`: mean cosine of features with the subject's pictures; `noun_subject`: the same of the class's pictures.

    `prompt`: share of pictures in a colour whose own colour's caption the CLIP picks out of all (chance 1 / colours).
    `noun_drift`, `other_drift`: 1 - mean cosine with the base model's picture of the same prompt and noise.
    """

    subject: float
    prompt: float
    noun_subject: float
    noun_drift: float
    other_drift: float

    def record(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self)


def draw(pipeline: TextToImage, name: str, noun: str, count: int, settings: Settings) -> Drawn:
    """`name` is how prompts call the subject, such as "sks dog"."""
    each = max(1, count // len(COLORS))
    colored = [f"a {color} {name}" for color in COLORS for _ in range(each)]
    return Drawn(
        pipeline.sample([f"a {name}"] * count, settings=settings),
        pipeline.sample(colored, settings=settings),
        pipeline.sample([f"a {noun}"] * count, settings=settings),
        pipeline.sample([p for p in OTHERS for _ in range(each)], settings=settings),
    )


def score(drawn: Drawn, before: Drawn, pictures: Tensor, noun: str) -> Scores:
    """The figures of one model; `before` is what the base model drew, `pictures` (M, 3, H, W) the subject's own."""
    network = EfficientNetLite0()
    own = network(pictures)

    def drift(a: Tensor, b: Tensor) -> float:
        return max(0.0, 1 - float(functional.cosine_similarity(network(a).double(), network(b).double()).mean()))

    return Scores(
        subject=float(similarity(network(drawn.subject), own).mean()),
        prompt=retrieved(drawn.colors, noun),
        noun_subject=float(similarity(network(drawn.noun), own).mean()),
        noun_drift=drift(drawn.noun, before.noun),
        other_drift=drift(drawn.others, before.others),
    )


def spread(pictures: Tensor) -> float:
    """Mean cosine of features of different pictures of the subject: what a perfect copy would reach."""
    own = EfficientNetLite0()(pictures)
    cosines = similarity(own, own)
    return float((cosines.sum() - cosines.diagonal().sum()) / (len(own) * (len(own) - 1)))


@torch.no_grad()
def retrieved(images: Tensor, noun: str) -> float:
    """Share of pictures (colours x each) whose caption "a COLOR NOUN" fits them best by the shipped CLIP."""
    model, config = load_clip("clip_emoji")
    clip: Any = model
    texts = clip.encode_text(tokenizer_of(config)([f"a {color} {noun}" for color in COLORS]))
    size = (config.image_size, config.image_size)
    shown = functional.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    scores = similarity(clip.encode_image(shown), texts)
    truth = torch.arange(len(COLORS)).repeat_interleave(len(images) // len(COLORS))
    return float(recall_at(scores, truth, 1).mean())


def load_pictures(folder: Path, size: int) -> Tensor:
    """The subject's pictures (M, 3, size, size) in [-1, 1]."""
    found = [resize(p, (size, size), "stretch") for p in check(folder, 1).pictures]
    return torch.cat([to_float(pixels(p)[None].copy()) for p in found])


def five_views(key: str, folder: Path, *, data: str = "emoji", split: str = "heldout", side: int = 128) -> Path:
    """Five pictures of one held-out sample: as it is, mirrored, turned both ways, and from farther away."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = _sample(key, data, split).resize((side, side), Image.Resampling.BICUBIC)
    white = {"resample": Image.Resampling.BICUBIC, "fillcolor": (255, 255, 255)}
    far = Image.new("RGB", (side, side), (255, 255, 255))
    near = whole.resize((side * 3 // 4, side * 3 // 4), Image.Resampling.BICUBIC)
    far.paste(near, (side // 16, side // 6))
    mirrored = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    views = {"as_it_is": whole, "mirrored": mirrored, "left": whole.rotate(12, **white), "far": far}
    views["right"] = mirrored.rotate(-12, **white)
    for name, view in views.items():
        view.save(folder / f"{name}.png")
    return folder


def _sample(key: str, data: str, split: str) -> Image.Image:
    shards = Shards(Manifest.read(resolve(data)), split)
    for i in range(len(shards)):
        if shards.key(i) == key:
            return picture(image_member(shards.read(i)[1]))
    raise ValueError(f"key {key!r}: not in split {split!r} of {data!r}")


def sheet(rows: Sequence[tuple[str, Drawn]], pictures: Tensor, path: Path, side: int = 64) -> None:
    """One line a model: four of the subject, two in colours, two of the class, two others; the subject's own above."""
    columns, left, top = 10, 190, 22
    heads = {0: "the subject", 4: "in red, in blue", 6: "its class", 8: "others"}
    image = Image.new("RGB", (left + columns * (side + 2), top + (len(rows) + 1) * (side + 2)), "white")
    brush = ImageDraw.Draw(image)
    for column, text in heads.items():
        brush.text((left + column * (side + 2), 5), text, fill="black")
    lines = [("its own pictures", to_pil(pictures)[:4])]
    for name, drawn in rows:
        each = max(1, len(drawn.colors) // len(COLORS))
        chosen = [*drawn.subject[:4], drawn.colors[0], drawn.colors[each], *drawn.noun[:2], drawn.others[0]]
        lines.append((name, to_pil(torch.stack([*chosen, drawn.others[each]]))))
    for i, (name, shown) in enumerate(lines):
        y = top + i * (side + 2)
        brush.text((4, y + side // 2 - 6), name, fill="black")
        for j, one in enumerate(shown):
            image.paste(one.resize((side, side)), (left + j * (side + 2), y))
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
