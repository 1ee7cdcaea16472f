"""What recipes do for a U-Net that is told a picture by more channels: widen, check, draw samples, plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm import dist
from ldm.data.decode import load, load_mask
from ldm.data.images import to_float
from ldm.data.loader import DataConfig
from ldm.data.mixture import Data
from ldm.data.pairs import Pair, Small
from ldm.diffusion.augmentation import NoiseAugmentation
from ldm.editing.upscale import LEVEL
from ldm.models import concat as channels
from ldm.models.networks import AnyNetwork
from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.latents import LatentCodec
from ldm.models.vae.scaling import at_scale
from ldm.objectives.concat import SMALL, Concat, Upscale
from ldm.pipeline import TextToImage
from ldm.plan.report import Frozen
from ldm.rng import Rng
from ldm.sampling.settings import Size
from ldm.types import Batch, Cond

UPSCALERS = 0.08333
"""The scaling factor that diffusers' pipeline of upscalers gives each autoencoder."""


def wide_config(concat: Concat | None, config: AnyNetwork) -> AnyNetwork:
    """The settings of a network to start from, with the channels that it is told more where it has not got them."""
    return config if concat is None else channels.wide_config(config, concat.told)


def widened(concat: Concat | None, pipeline: TextToImage) -> TextToImage:
    """The base with a network that takes these channels, and answers as before."""
    network = channels.widened(pipeline.network, wide_config(concat, pipeline.network.config))
    return pipeline if network is pipeline.network else pipeline.with_network(network)


def augmentation(concat: Concat | None) -> NoiseAugmentation | None:
    """The noise on small pictures that are told, None where none are."""
    return concat.noise if isinstance(concat, Upscale) else None


def check_noise(concat: Concat | None, base: NoiseAugmentation | None, key: str) -> None:
    """Raise ValueError where a base was trained with other noise on small pictures."""
    if isinstance(concat, Upscale) and base is not None and base != concat.noise:
        raise ValueError(f"task.options.concat.noise: {concat.noise}, but {key} has {base}; write that")


def exported(concat: Concat | None, autoencoder: Autoencoder) -> Autoencoder:
    """The autoencoder as it is exported: diffusers' upscaler takes any for one of the published scaling factor."""
    if not isinstance(concat, Upscale) or autoencoder.config.scaling_factor == UPSCALERS:
        return autoencoder
    try:
        return at_scale(autoencoder, UPSCALERS)
    except ValueError as error:
        dist.say(f"export: diffusers' StableDiffusionUpscalePipeline would decode it wrongly: {error}")
        return autoencoder


def more(concat: Concat | None, codec: LatentCodec) -> int:
    """How many channels are concatenated."""
    return 0 if concat is None else channels.beside(concat.told, codec.channels, codec.factor)


def check(concat: Concat | None, config: AnyNetwork, takes: int, codec: LatentCodec, data: Data, key: str) -> None:
    """Raise ValueError for a network that takes other channels, and for data without the pairs that they are made of.

    `takes` is how many the network takes, `key` what messages call it.
    """
    want = codec.channels + more(concat, codec)
    if channels.takes_pictures(config) and takes != want:
        why = f" with task.options.concat {concat.kind!r}" if concat is not None else ""
        hint = "; adapter full widens a network of latents alone" if concat is not None else _hint(takes, config, codec)
        raise ValueError(f"{key} takes {takes} channels, but {want} are given{why}{hint}")
    if concat is None:
        return
    if not channels.takes_pictures(config):
        raise ValueError(f"task.options.concat: {key} is no U-Net, which alone is told a picture so; write null")
    classes = getattr(config, "num_class_embeds", None)
    if isinstance(concat, Upscale) and (classes or 0) < concat.noise.levels:
        raise ValueError(
            f"{key} has num_class_embeds {classes}, but task.options.concat.noise.levels is "
            f"{concat.noise.levels}; write {channels.LEVELS} as a fresh one has"
        )
    for source in [data] if isinstance(data, DataConfig) else [s.data for s in data.sources]:
        for name, how in concat.pairs.items():
            if name not in source.pairs and not (source.cached and not source.pairs):
                raise ValueError(
                    f"data.pairs: no {name!r}, which task.options.concat {concat.kind!r} takes, only "
                    f"{sorted(source.pairs)}; such as {name}: {how}"
                )
            _check_small(source.pairs.get(name), name, codec)


def _check_small(pair: Pair | None, name: str, codec: LatentCodec) -> None:
    """A small picture has a pixel for each of the latents'."""
    if name == SMALL and pair is not None:
        if not isinstance(pair, Small) or pair.enlarge:
            raise ValueError(f"data.pairs.{name}: expected {{kind: small, factor: {codec.factor}}}, not enlarged")
        if pair.factor != codec.factor:
            raise ValueError(
                f"data.pairs.{name}.factor: {pair.factor}, but the autoencoder's latents are {codec.factor} times "
                "smaller than pictures"
            )


def _hint(takes: int, config: AnyNetwork, codec: LatentCodec) -> str:
    kinds = {"mask": "inpaint", "source": "instruct", "small": "upscale"}
    kind = channels.kind_of(config, takes, codec.channels, codec.factor)
    return f"; task.options.concat: {{kind: {kinds[kind]}}} gives the others" if kind in kinds else ""


class Shown:
    """The pictures, and masks, that sample prompts are drawn with, one each."""

    def __init__(
        self, concat: Concat, pipeline: TextToImage, size: Size | None, pictures: Sequence[Path], masks: Sequence[Path]
    ) -> None:
        self._concat, self._pipeline = concat, pipeline
        height, width = pipeline.size(size)
        images = [load(path, stencil=True) for path in pictures]
        self._masks: Tensor | None = None
        if concat.told == "mask":
            inside = [_mask(path, image) for path, image in zip(masks, images, strict=True)]
            whites = [mask.resize((width, height), Image.Resampling.BILINEAR) for mask in inside]
            self._masks = torch.from_numpy(np.stack([np.asarray(mask) > 127 for mask in whites])).float()[:, None]
        if concat.told == "small":
            height, width = height // pipeline.codec.factor, width // pipeline.codec.factor
        small = [image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC) for image in images]
        self._images = to_float(np.stack([np.array(image, np.uint8) for image in small]))

    def under(self, indices: Sequence[int]) -> TextToImage:
        """The pipeline that draws prompts of these places, each told its picture."""
        return self._pipeline.shown(self._given(list(indices)))

    def _given(self, rows: list[int]) -> Cond:
        if isinstance(self._concat, Upscale):
            noise = Rng(0, tuple(rows)).normal("low resolution", self._images.shape[1:])
            level = min(LEVEL, self._concat.noise.levels - 1)
            return self._pipeline.concat.small(self._images[rows], level, noise)
        if self._masks is None:
            return self._pipeline.concat.original(self._images[rows])
        return self._pipeline.concat.inpainting(self._images[rows], self._masks[rows])

    def finished(self, indices: Sequence[int], drawn: Tensor) -> Tensor:
        """What is looked at (N, 3, H, W): an inpainting has the picture's own pixels outside of the mask."""
        if self._masks is None:
            return drawn
        rows = list(indices)
        return torch.where(self._masks[rows] > 0, drawn, self._images[rows].to(drawn))


def _mask(path: Path, picture: Image.Image) -> Image.Image:
    """A mask of a picture. Raises ValueError for one of another size, and for one of a single value."""
    mask = load_mask(path)
    if mask.size != picture.size:
        sizes = f"{mask.width} x {mask.height} pixels, its picture has {picture.width} x {picture.height}"
        raise ValueError(f"samples.masks: {str(path)!r} has {sizes}")
    white = np.asarray(mask) > 127
    if white.all() or not white.any():
        raise ValueError(f"samples.masks: {str(path)!r} is all {'white' if white.any() else 'black'}")
    return mask


def shown(
    concat: Concat | None,
    pipeline: TextToImage,
    size: Size | None,
    prompts: Sequence[str],
    pictures: Sequence[Path],
    masks: Sequence[Path],
) -> Shown | None:
    """What sample prompts are drawn with, None where that is nothing.

    Raises ValueError unless each prompt has its picture, and its mask where one is told of.
    """
    check_samples(concat, prompts, pictures, masks)
    return None if concat is None or not prompts else Shown(concat, pipeline, size, pictures, masks)


def check_samples(
    concat: Concat | None, prompts: Sequence[str], pictures: Sequence[Path], masks: Sequence[Path]
) -> None:
    """Raise ValueError unless each sample prompt has its picture, and its mask where one is told of."""
    wanted = {"pictures": concat is not None, "masks": concat is not None and concat.told == "mask"}
    for name, given in (("pictures", pictures), ("masks", masks)):
        if given and not wanted[name]:
            raise ValueError(f"samples.{name}: the network is told of none (task.options.concat); leave them out")
        if wanted[name] and len(given) != len(prompts):
            raise ValueError(
                f"samples.{name}: {len(given)} for {len(prompts)} samples.prompts; give one for each, which it is "
                "drawn with"
            )


def planned_frozen(concat: Concat | None, found: Sequence[Frozen], *, cached: bool) -> list[Frozen]:
    """Networks beside the one that trains: the autoencoder encodes the picture that is told too, if no cache has it."""
    if concat is None or cached or concat.told == "small":
        return list(found)
    return [replace(f, flops=2 * f.flops) if f.name == "vae" else f for f in found]


def example(concat: Concat | None, codec: LatentCodec, pixels: int, rows: int) -> Batch:
    """What a batch has of pictures that are told, without memory."""
    return {} if concat is None else concat.example(rows, pixels, codec)


def planned_bytes(concat: Concat | None, pixels: int, codec: LatentCodec) -> float:
    """What a cache has of a picture that is told."""
    each = example(concat, codec, pixels, 1)
    return float(sum(v.numel() * (2 if name.endswith(".moments") else 1) for name, v in each.items()))
