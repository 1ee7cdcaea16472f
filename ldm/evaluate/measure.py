"""What a trained model is worth: retrieval of its pictures' captions, its autoencoder's loss, distances of features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm.data.decode import BadSample
from ldm.data.images import pixels, resize, to_float
from ldm.data.manifest import Manifest, resolve
from ldm.data.samples import Samples
from ldm.diffusion.likelihood import Bound, Variance, bound
from ldm.metrics import features, fid, retrieval
from ldm.metrics.features import FeatureNetwork, extract, in_batches
from ldm.metrics.reconstruction import psnr, ssim
from ldm.metrics.retrieval import Retrieval
from ldm.models.text import TextTower
from ldm.models.text.openclip import AnyClip, OpenClipConfig, fitted, tokenizer_of
from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.latents import LatentCodec
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.pictures import entries
from ldm.recipes.sources import load_clip, weights_hash
from ldm.rng import Rng, generator
from ldm.sampling.times import times as spaced
from ldm.types import Cond

MOST = 20_000
"""Samples of a split that are looked at for captions; of a larger one, as many, evenly spaced."""


@dataclass(frozen=True)
class Drawn:
    """Samples of a split, their plain captions (all distinct), and the split's whole `pool` of distinct captions."""

    ids: tuple[int, ...]
    captions: tuple[str, ...]
    pool: tuple[str, ...]


def caption_pool(data: str, split: str) -> list[str]:
    """The distinct plain captions of a split, in stored order; variants by skin tone or gender count as others.

    Only the plain ones: another caption of the same picture would not be a wrong answer.
    """
    return list(_captions(_samples(data, split)))


def draw(data: str, split: str, count: int | None = None, *, seed: int = 0) -> Drawn:
    """`count` samples with distinct captions, the same for a seed; None is 256, or all of a smaller split.

    Raises ValueError when the split has fewer captions than `count`.
    """
    captions = _captions(_samples(data, split))
    pool = list(captions)
    if not pool:
        raise ValueError(f"data {data!r}, split {split!r}: no sample has a caption")
    if count is None:
        count = min(256, len(pool))
    if not 1 <= count <= len(pool):
        raise ValueError(f"count: {count} is not between 1 and {len(pool)}, the distinct captions of split {split!r}")
    order = torch.randperm(len(pool), generator=generator(seed, 0, "captions")).tolist()[:count]
    chosen = [pool[i] for i in order]
    return Drawn(tuple(captions[c] for c in chosen), tuple(chosen), tuple(pool))


def candidates(asked: int, pool: Sequence[str]) -> int:
    """How many captions retrieval chooses from: all that there are where they are fewer than asked for.

    Raises ValueError where there are fewer than two.
    """
    if len(pool) < 2:
        raise ValueError(f"retrieval needs at least 2 distinct captions to choose from, there are {len(pool)}")
    return min(asked, len(pool))


def real_pictures(data: str, split: str, ids: Sequence[int], size: int) -> Tensor:
    """The pictures (N, 3, size, size) in [-1, 1] of samples, cropped to the middle square."""
    return to_float(_samples(data, split, size).pixels(list(ids)))


def folder_pictures(folder: Path, size: int | None = None) -> Tensor:
    """All pictures of a folder or a built set (N, 3, size, size) in [-1, 1], by name; None is the first's shorter side.

    Folders below it count too, as in `ldm data build`. Raises ValueError when there are none, and naming one that
    cannot be read: a figure of the others would be of another set.
    """
    kept: list[NDArray[np.uint8]] = []
    for entry in entries(folder):
        try:
            picture = entry.open()
        except BadSample as error:
            raise ValueError(f"pictures {str(folder)!r}: {entry.name}: {error}; remove or mend it") from error
        size = size or min(picture.size)
        kept.append(pixels(resize(picture, (size, size), "stretch")))
    return to_float(np.stack(kept))


def _samples(data: str, split: str, size: int = 1) -> Samples:
    return Samples(Manifest.read(resolve(data)), split, size=size)


def _captions(samples: Samples) -> dict[str, int]:
    """Plain caption -> the first sample that has it."""
    found: dict[str, int] = {}
    step = max(1.0, len(samples) / MOST)
    for place in range(min(len(samples), MOST)):
        sample = int(place * step)
        try:
            found.setdefault(samples.captions(sample).texts[0], sample)
        except BadSample:
            continue
    return found


def retrieval_of(
    images: Tensor,
    captions: Sequence[str],
    pool: Sequence[str],
    clip: nn.Module,
    config: AnyClip,
    *,
    candidates: int = 64,
    seed: int = 0,
    batch: int = 64,
) -> Retrieval:
    """How often the CLIP finds each picture's caption among `candidates`, the others drawn from `pool`; R@1, 5, 10.

    Pictures (N, 3, H, W) in [-1, 1] are resized to what the CLIP sees.
    """
    features = clip_features(images, clip, config, batch)
    return retrieval_of_features(features, captions, pool, clip, config, candidates=candidates, seed=seed, batch=batch)


@torch.no_grad()
def retrieval_of_features(
    features: Tensor,
    captions: Sequence[str],
    pool: Sequence[str],
    clip: nn.Module,
    config: AnyClip,
    *,
    candidates: int = 64,
    seed: int = 0,
    batch: int = 64,
) -> Retrieval:
    """`retrieval_of` of pictures whose `clip_features` (N, D) are known."""
    model: Any = clip
    tokenize = tokenizer_of(config)
    device = next(clip.parameters()).device

    def encode_texts(texts: list[str]) -> Tensor:
        return model.encode_text(tokenize(texts).to(device), normalize=True).float().cpu()

    return retrieval.measure(
        lambda part: part,
        encode_texts,
        features,
        captions,
        pool,
        candidates=candidates,
        ks=[k for k in (1, 5, 10) if k < max(candidates, 2)],
        seed=seed,
        batch=batch,
    )


@torch.no_grad()
def clip_features(images: Tensor, clip: nn.Module, config: AnyClip, batch: int = 64) -> Tensor:
    """Unit features (N, D) on the CPU of pictures (N, 3, H, W) in [-1, 1], resized to what the CLIP sees."""
    model: Any = clip
    device = next(clip.parameters()).device
    parts = fitted(images, config).split(batch)
    return torch.cat([model.encode_image(part.to(device), normalize=True).float().cpu() for part in parts])


def knows_text(pipeline: TextToImage, clip: nn.Module) -> bool:
    """Whether the judge's text tower is one of those that condition the model, trained further or not.

    Its token embeddings tell: towers that were not the same once have nothing in common there.
    """
    own = [v for k, v in clip.state_dict().items() if k.endswith("token_embedding.weight")]
    for table in own:
        for tower in pipeline.text:
            if not isinstance(tower, TextTower):  # no CLIP, whose table is another vocabulary's
                continue
            other = tower.table.weight.detach()
            if table.shape == other.shape and not other.is_meta:
                a, b = table.float().cpu(), other.float().cpu()
                if float((a - b).norm()) < 0.1 * float(b.norm()):
                    return True
    return False


def judge_protocol(name: str, clip: nn.Module, config: AnyClip) -> dict[str, Any]:
    """Which CLIP a figure is of: its name, its weights' hash, its size, and how pictures come to open_clip's."""
    told = {"clip": name, "clip_weights": weights_hash(clip), "clip_size": config.image_size}
    return told | ({"clip_input": config.told()} if isinstance(config, OpenClipConfig) else {})


@torch.no_grad()
def reconstruction_of(autoencoder: Autoencoder, images: Tensor, batch: int = 32) -> dict[str, Any]:
    """PSNR and SSIM of pictures decoded from the mean of their posterior: mean and standard deviation over pictures."""
    codec = LatentCodec.of(autoencoder)
    parts = [(part, codec.decode(codec.encode(part)).cpu().clamp(-1, 1)) for part in images.split(batch)]
    figures = {
        "psnr": torch.cat([psnr(decoded, part) for part, decoded in parts]),
        "ssim": torch.cat([ssim(decoded, part) for part, decoded in parts]),
    }
    spread = {k: {"mean": float(v.mean()), "std": float(v.std(correction=0))} for k, v in figures.items()}
    return {"pictures": len(images), "size": images.shape[-1], **spread}


def features_of(network: FeatureNetwork, real: Tensor, other: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """All distances of `metrics.fid.compare` between two sets of pictures (N, 3, H, W) in [-1, 1]."""
    a, b = extract(network, in_batches(real)), extract(network, in_batches(other))
    return fid.compare(a, b, network=network.name, seed=seed)


def settled(pipeline: TextToImage, images: Tensor, steps: int) -> TextToImage:
    """The pipeline for pictures of this size: a shift that grows with them is settled."""
    factor = pipeline.codec.factor
    return pipeline.at((images.shape[2] // factor, images.shape[3] // factor), steps)


def unguided(pipeline: TextToImage, captions: Sequence[str]) -> Cond:
    """What the network is told of captions, and guidance scale 1 where it is told a scale (FLUX.1)."""
    cond = pipeline.encode_text(captions)
    told = pipeline.network.guidance_width is not None and pipeline.network.guidance_is_scale
    return {**cond, "guidance": torch.ones(len(captions), device=pipeline.device)} if told else cond


@torch.no_grad()
def nll_of(
    pipeline: TextToImage,
    images: Tensor,
    captions: Sequence[str],
    *,
    steps: int = 50,
    variance: Variance = "large",
    batch: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """The variational bound of pictures' latents under their captions, over `steps` times from the first to the last.

    In bits per latent dimension: mean, standard deviation over pictures, and the means of its three terms. Latents are
    continuous, so that the bound is one on a density: it may be negative, and only compares models of one autoencoder.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    pipeline = settled(pipeline, images, steps)
    process, times = pipeline.process, sorted(spaced(pipeline.process.schedule, steps, "linspace"))
    denoise = pipeline.denoiser(Settings(guidance=1.0))
    parts: list[Bound] = []
    for start in range(0, len(images), batch):
        rows = range(start, min(start + batch, len(images)))
        x0 = pipeline.codec.encode(images[start : start + batch].to(pipeline.device)).float()
        rng = Rng(seed, tuple(rows))

        def noise(i: int, rng: Rng = rng, x0: Tensor = x0) -> Tensor:
            return rng.normal(f"time {i}", x0.shape[1:]).to(x0)

        cond = unguided(pipeline, [captions[i] for i in rows])
        parts.append(bound(process, denoise, x0, cond, noise=noise, times=times, variance=variance, bins=None))
    unit = parts[0].dimensions * math.log(2)
    total = torch.cat([part.bits_per_dim for part in parts]).double()
    terms = {
        "prior": torch.cat([part.prior for part in parts]),
        "steps": torch.cat([part.steps.sum(1) for part in parts]),
        "decoder": torch.cat([part.decoder for part in parts]),
    }
    return {
        "pictures": len(total),
        "bits_per_dim": {"mean": float(total.mean()), "std": float(total.std(correction=0))},
        "dimensions": parts[0].dimensions,
        **{name: float(value.double().mean()) / unit for name, value in terms.items()},
    }


def feature_network(name: str, weights: Path | None = None) -> features.FeatureNetwork:
    """As `metrics.features.load_network`, and `clip:SOURCE` for the image tower of any source of `load_clip`."""
    kind, _, source = name.partition(":")
    if kind != "clip":
        return features.load_network(name, weights)
    if weights is not None:
        raise ValueError(f"feature network {name!r} takes no weights: they are the source's own")
    clip, config = load_clip(exported(source or "clip_emoji"))
    told = f"{name}@{config.image_size}#{weights_hash(clip)[:12]}"
    return features.Encoder(told, lambda images: clip_features(images, clip, config))


def side_of(pipeline: TextToImage) -> int:
    """Pixels of a side of the model's own pictures."""
    return pipeline.latent_shape(None)[1] * pipeline.codec.factor


def model_hashes(pipeline: TextToImage) -> dict[str, str]:
    """Which weights drew the pictures."""
    return {
        "unet": weights_hash(pipeline.network),
        "vae": weights_hash(pipeline.codec.autoencoder),
        "text": weights_hash(*pipeline.text),
    }


def exported(source: str) -> str:
    """A run folder's export; any other source as it is."""
    return str(Path(source) / "export") if (Path(source) / "export").is_dir() else source
