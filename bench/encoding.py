"""Training on cached latents and text states against encoding at every step, in images per second.

"input" is everything up to what the U-Net is given: reading, decoding, autoencoder, text tower, posterior draw and
caption dropout. "step" adds the U-Net's forward and backward, which is what training sees.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import parts
from bench.timing import Options, Spread, interleaved, ratio, report
from ldm.data.encode import EncodeConfig, build_cache
from ldm.data.loader import DataConfig, Loader
from ldm.models.presets import AUTOENCODERS, CLIPS, TEXTS
from ldm.models.text import TextTower, build_clip
from ldm.models.unet import UNetConfig
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.recipes.sources import text_encoder
from ldm.rng import Rng

# the shape of the shipped autoencoder; speed does not depend on the weights, so they are random
EMOJI_VAE = AutoencoderConfig(
    block_out_channels=(32, 64, 96), layers_per_block=1, latent_channels=4, norm_num_groups=16,
    mid_block_add_attention=False, sample_size=64,
)  # fmt: skip
SPLIT = "heldout"


def networks(quick: bool) -> tuple[LatentCodec, TextTower, UNetConfig]:
    """Frozen parts with random weights, and the U-Net's shape."""
    if quick:
        autoencoder, tower = Autoencoder(AUTOENCODERS["tiny"]), TextTower(TEXTS["tiny"][0])
    else:
        config = CLIPS["emoji"]
        autoencoder, tower = Autoencoder(EMOJI_VAE), TextTower.of_clip(build_clip(config), config.text)
    return LatentCodec.of(autoencoder.requires_grad_(False).eval()), tower, parts.unet_config(quick)


def feed(objective: DenoiseObjective, loader: Loader) -> Callable[[], object]:
    """What the U-Net is given, one batch a call."""
    batches = loader.batches(0)

    def once() -> None:
        batch = next(batches)
        rng = Rng.of(0, batch["position"])
        objective.latents(batch, rng)
        objective.cond(batch, rng)

    return once


def step(objective: DenoiseObjective, loader: Loader) -> Callable[[], object]:
    """Input, forward and backward."""
    batches = loader.batches(0)

    def once() -> None:
        batch = next(batches)
        loss, _ = objective(batch, Rng.of(0, batch["position"]))
        loss.backward()
        objective.zero_grad()

    return once


def run(options: Options) -> dict[str, Any]:
    """Measure on the CPU, on the embedded data."""
    codec, tower, config = networks(options.quick)
    size, side = (4, 32) if options.quick else (64, 64)
    encode_text = text_encoder([tower])
    objective = DenoiseObjective(parts.unet(config), parts.process(), codec, encode_text, DenoiseOptions())
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        manifest = build_cache(
            EncodeConfig(path="emoji", splits=(SPLIT,), size=side, batch=size),
            Path(folder),
            moments=codec.moments,
            text=lambda texts: dict(encode_text(texts)),
            hashes={},
        )
        once = time.perf_counter() - began
        online = DataConfig(path="emoji", split=SPLIT, size=side)
        cached = DataConfig(path=folder, split=SPLIT, size=side, cached=True)
        cases: dict[str, Callable[[], object]] = {}
        for name, data in (("cached", cached), ("online", online)):
            cases[f"{name} input"] = feed(objective, Loader(data, seed=0, micro_batch=size))
            cases[f"{name} step"] = step(objective, Loader(data, seed=0, micro_batch=size))
        seconds = interleaved(cases, options.times(10), warmup=3)
    count = manifest.samples()
    pairs = [("online input", "cached input"), ("online step", "cached step")]
    result = report(f"encoding, batch {size}, {torch.get_num_threads()} threads", seconds, pairs)
    rates = {name: size / Spread.of(values).median for name, values in seconds.items()}
    for name, rate in rates.items():
        print(f"  {name:<34} {rate:10.1f} images/s")
    saved = ratio(seconds, "online step", "cached step").median
    print(f"  encoding once: {count / once:.1f} images/s with all captions; a cached step is {saved:.2f} x as fast")
    return result | {"batch": size, "images_per_second": rates, "encoding_once_images_per_second": count / once}
