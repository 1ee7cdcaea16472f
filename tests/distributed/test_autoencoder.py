"""Two networks with losses of their own in one backward pass: right where weights are divided over ranks (ZeRO 3)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm import dist
from ldm.models.discriminator import Discriminator, DiscriminatorConfig
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.objectives.autoencoder import AutoencoderLoss, AutoencoderObjective
from ldm.rng import Rng
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from ldm.train.optim import Optim
from tests import ranks
from tests.distributed.tiny import worst

OPTIM = Optim(lr=1e-3, eps=1e-6, weight_decay=0.0)


def build() -> AutoencoderObjective:
    """With a discriminator wide enough that ZeRO 3 divides its weights (above 10,000 in one tensor)."""
    torch.manual_seed(0)
    vae = Autoencoder(AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2))
    discriminator = Discriminator(DiscriminatorConfig(channels=(16, 48)))
    assert max(p.numel() for p in discriminator.parameters()) > 10_000
    loss = AutoencoderLoss(kl=0.01, perceptual=0.0, adversarial=0.5, adversarial_start=0)
    return AutoencoderObjective(vae, discriminator, loss, None)


def batch(step: int, rows: list[int]) -> dict[str, Any]:
    positions = [4 * step + i for i in rows]
    images = Rng.of(7, positions).normal("images", (3, 8, 8)).clamp(-1, 1)
    return {"image": images, "position": torch.tensor(positions)}


def train(stage: int) -> dict[str, Any]:
    """Three steps; each rank has the same rows, since the balance is a rank's own."""
    objective = build()
    config = EngineConfig(zero_stage=stage, precision="fp32", clip=0.0)
    engine = Engine(objective, OPTIM.build(objective.parameters()), config, micro_batch=4, accumulate=1)
    losses = []
    for step in range(3):
        engine.set_lr(OPTIM.lr)
        rows = batch(step, [0, 1, 2, 3])
        loss, _ = engine.forward(rows, Rng.of(1, rows["position"]))
        engine.backward_step(loss)
        losses.append(float(dist.mean(loss)))
    return {"losses": losses, "weights": dict(engine.full(engine.masters))}


@pytest.mark.parametrize("stage", [1, 3])
def test_both_networks_learn_as_in_plain_pytorch(stage: int) -> None:
    objective = build()
    adam = torch.optim.AdamW(objective.parameters(), lr=1e-3, eps=1e-6, weight_decay=0.0)
    losses = []
    for step in range(3):
        rows = batch(step, [0, 1, 2, 3])
        loss, _ = objective(rows, Rng.of(1, rows["position"]))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    found = ranks.run(train, 2, stage)[0]
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert worst(found["weights"], {n: p.detach() for n, p in objective.named_parameters()}) < 1e-4
