"""SDXL's six numbers from the data to the network, in diffusers' order, online and cached."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from ldm.data.buckets import BucketConfig
from ldm.data.build import BuildConfig, build
from ldm.data.encode import EncodeConfig, build_cache
from ldm.data.loader import DataConfig, Loader
from ldm.diffusion.process import Process
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.rng import Rng
from ldm.types import Batch
from tests.unit.objectives.test_denoise import VAE, Autoencoder, encode_text

SIZES = {0: (200, 130), 1: (90, 150), 2: (128, 128), 3: (70, 40)}


def diffusers_ids(original: tuple[int, int], corner: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """What diffusers' pipeline feeds for (height, width), (top, left), (height, width)."""
    network = SimpleNamespace(
        config=SimpleNamespace(addition_time_embed_dim=4),
        add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=4 * 6 + 2)),
    )
    method: Any = StableDiffusionXLPipeline._get_add_time_ids
    return method(SimpleNamespace(unet=network), original, corner, target, torch.float32, 2)[0]


@pytest.fixture
def bucketed(tmp_path: Path) -> Path:
    """Pictures p0 .. p15 of four sizes (width, height)."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(16):
        width, height = SIZES[i % 4]
        values = np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        (root / f"p{i}.png").write_bytes(buffer.getvalue())
        (root / f"p{i}.txt").write_text(f"picture {i}")
    build(root, tmp_path / "set", BuildConfig(buckets=BucketConfig(size=64, step=16, least=4), format="png"))
    return tmp_path / "set"


def network() -> UNet:
    torch.manual_seed(0)
    return UNet(
        UNetConfig(
            block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=2,
            attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=4 * 6 + 2,
        )
    )  # fmt: skip


def objective(unet: UNet, drop: float = 0.0) -> DenoiseObjective:
    codec = LatentCodec.of(Autoencoder(VAE))
    return DenoiseObjective(unet, Process(), codec, encode_text, DenoiseOptions(drop=drop))


def check(built: DenoiseObjective, batch: Batch) -> None:
    """The ids of each row against diffusers', from the numbers that the batch tells."""
    cond = built.cond(batch, Rng.of(0, batch["position"]))
    for row, key in enumerate(batch["key"]):
        width, height = SIZES[int(key[1:]) % 4]
        corner = batch["crop_top_left"][row].int().tolist()
        shape = [8 * n for n in batch["moments"].shape[2:]] if "moments" in batch else list(batch["image"].shape[2:])
        expected = diffusers_ids((height, width), tuple(corner), tuple(shape))
        assert torch.equal(cond["time_ids"][row], expected)


def test_online_and_cached_buckets_feed_diffusers_order(bucketed: Path, tmp_path: Path) -> None:
    config = DataConfig(path=str(bucketed), buckets=True, last="wrap", crop="random")
    online = Loader(config, seed=0, micro_batch=4)
    built = objective(network(), drop=1.0)
    shapes = set()
    for step in range(online.steps_per_epoch):
        batch = online.batch(step, 0)
        check(built, batch)
        shapes.add(tuple(batch["image"].shape[2:]))
    assert len(shapes) > 1
    assert any(h != w for h, w in shapes)

    def moments(images: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.avg_pool2d(images, 8)
        return torch.cat([pooled, pooled, pooled[:, :2]], 1)

    encode = EncodeConfig(path=str(bucketed), buckets=True, crop="random", variants=3)
    build_cache(encode, tmp_path / "cache", moments=moments, text=encode_text, hashes={})
    cached_config = DataConfig(path=str(tmp_path / "cache"), cached=True, buckets=True, last="wrap", crop="random")
    cached = Loader(cached_config, seed=0, micro_batch=4)
    corners = []
    for step in range(3 * cached.steps_per_epoch):
        batch = cached.batch(step, 0)
        check(built, batch)
        corners += batch["crop_top_left"].tolist()
    assert len({tuple(c) for c in corners}) > 4


def test_the_network_hears_the_sizes(bucketed: Path) -> None:
    """The loss runs on a text_time network, and changes with each pair of numbers."""
    built = objective(network())
    codec_factor = 2
    batch = Loader(DataConfig(path=str(bucketed), size=8 * codec_factor), seed=0, micro_batch=4).batch(0, 0)
    rng = Rng.of(0, batch["position"])
    torch.manual_seed(1)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    losses = [float(built(batch, rng)[0].detach())]
    for name in ("original_size", "crop_top_left", "target_size"):
        losses.append(float(built(batch | {name: batch[name] + 300}, rng)[0].detach()))
    assert len({round(v, 6) for v in losses}) == 4
