"""What several measurements share: the networks, and batches like those of a cached data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ldm.diffusion.prediction import V
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Discrete
from ldm.diffusion.weighting import MinSNR
from ldm.models.presets import UNETS
from ldm.models.unet import UNet, UNetConfig
from ldm.types import Batch, Cond

TOKENS = 32


def unet_config(quick: bool) -> UNetConfig:
    """The shape of the shipped text-to-image model, or the smallest one."""
    return UNETS["tiny" if quick else "emoji"]


def unet(config: UNetConfig) -> UNet:
    """The same random weights every time."""
    torch.manual_seed(0)
    return UNet(config)


def process() -> Process:
    """v-prediction, zero terminal SNR, min-SNR weights."""
    return Process(schedule=Discrete(zero_terminal_snr=True), prediction=V(), weighting=MinSNR(gamma=5.0))


def text_states(config: UNetConfig) -> int:
    """D, the width of the text states."""
    width = config.cross_attention_dim
    return width if isinstance(width, int) else width[0]


def encode_text(config: UNetConfig, texts: Sequence[str]) -> Cond:
    """Text states without a tower: nothing is encoded in these measurements."""
    return {"text": torch.zeros(len(texts), TOKENS, text_states(config))}


def batches(config: UNetConfig, size: int, kept: int = 4) -> Iterator[Batch]:
    """Endless batches of random moments and text states; positions go on, the tensors repeat."""
    g = torch.Generator().manual_seed(1)
    side = config.sample_size or 16
    stored = [
        {
            "moments": torch.randn(size, 2 * config.in_channels, side, side, generator=g),
            "text": torch.randn(size, TOKENS, text_states(config), generator=g),
            "weight": torch.ones(size),
            "key": [str(i) for i in range(size)],
        }
        for _ in range(kept)
    ]
    step = 0
    while True:
        yield {**stored[step % kept], "position": torch.arange(step * size, (step + 1) * size)}
        step += 1
