"""A U-Net of a few thousand weights, its batches, and the plain PyTorch training that the engine must agree with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.prediction import V
from ldm.diffusion.process import Process
from ldm.diffusion.weighting import MinSNR
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.rng import Rng
from ldm.train.ema import EmaConfig
from ldm.train.optim import Optim
from ldm.types import Batch, Cond

UNET = UNetConfig(
    sample_size=4,
    block_out_channels=(8, 12),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    mid_block_type="UNetMidBlock2D",
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=6,
)
OPTIM = Optim(lr=3e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, warmup=3, decay="cosine", final=0.1)
EMA = EmaConfig(decay=0.6)
STEPS, BATCH, SEED = 10, 8, 5
CLIP = 0.02
"""Below the gradient norms here, so that every step is clipped."""


def encode_text(texts: Any) -> Cond:
    """Stand-in for a text tower: states that depend on the caption alone."""
    rows = [torch.randn(3, 6, generator=torch.Generator().manual_seed(sum(map(ord, t)))) for t in texts]
    return {"text": torch.stack(rows), "pooled": torch.stack(rows)[:, 0]}


def build(seed: int = 1, **options: Any) -> DenoiseObjective:
    """The objective with random weights, none of them zero."""
    torch.manual_seed(seed)
    unet = UNet(UNET)
    for p in unet.parameters():
        nn.init.normal_(p, std=0.1) if p.ndim == 1 else nn.init.xavier_normal_(p)
    vae = Autoencoder(AutoencoderConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, sample_size=4))
    process = Process(prediction=V(), weighting=MinSNR(gamma=5.0))
    options = {"drop": 0.3} | options
    return DenoiseObjective(unet, process, LatentCodec.of(vae), encode_text, DenoiseOptions(**options))


def rows(step: int, chosen: list[int]) -> Batch:
    """Some rows of the global batch of a step."""
    positions = [step * BATCH + i for i in chosen]
    rng = Rng.of(99, positions)
    return {
        "moments": rng.normal("moments", (8, 4, 4)),
        "caption": [f"picture {p}" for p in positions],
        "position": torch.tensor(positions),
        "weight": torch.ones(len(positions)),
        "key": [str(p) for p in positions],
    }


def micro_batches(step: int, rank: int, world: int, accumulate: int) -> list[Batch]:
    """A rank's micro-batches of a step, striped so that no rank holds a contiguous part."""
    parts = world * accumulate
    return [rows(step, list(range(m * world + rank, BATCH, parts))) for m in range(accumulate)]


@dataclass
class Plain:
    """What plain PyTorch gave: after each step, losses, gradient norms before clipping, weights, EMA and moments."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    ema: list[dict[str, Tensor]] = field(default_factory=list)
    first: list[dict[str, Tensor]] = field(default_factory=list)
    second: list[dict[str, Tensor]] = field(default_factory=list)


def plain(steps: int, clip: float = CLIP) -> Plain:
    """Train on one process with nothing of ours but the objective: the oracle of the engine."""
    objective, out = build(), Plain()
    named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in named.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=OPTIM.betas, eps=OPTIM.eps, foreach=False, fused=False)
    ema = {n: p.detach().clone() for n, p in named.items()}
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = OPTIM.lr_at(step, STEPS)
        batch = rows(step, list(range(BATCH)))
        loss, _ = objective(batch, Rng.of(SEED, batch["position"]))
        adam.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None]).norm()
        if clip:
            for p in named.values():
                assert p.grad is not None
                p.grad *= min(1.0, clip / float(norm))
        adam.step()
        decay = min(EMA.decay, (1 + step) / (10 + step))
        ema = {n: decay * ema[n] + (1 - decay) * p.detach() for n, p in named.items()}
        out.losses.append(loss.item())
        out.norms.append(float(norm))
        out.weights.append({n: p.detach().clone() for n, p in named.items()})
        out.ema.append(ema)
        out.first.append({n: adam.state[p]["exp_avg"].clone() for n, p in named.items()})
        out.second.append({n: adam.state[p]["exp_avg_sq"].clone() for n, p in named.items()})
    return out


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two sets of tensors over the largest value of the second."""
    assert set(a) == set(b)
    top = max(float(v.abs().max()) for v in b.values())
    return max(float((a[n] - b[n]).abs().max()) for n in itertools.chain(b)) / top
