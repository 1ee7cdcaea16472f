"""Which tokens stay in the span: drawn for each sample by its position, as many as asked, evenly, until a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from ldm.diffusion.prediction import Velocity
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Flow
from ldm.models import networks
from ldm.models.presets import UNETS
from ldm.models.transformers import presets
from ldm.models.transformers.base import Transformer
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.objectives.routing import RouteOptions, kept, set_span
from ldm.rng import Rng
from ldm.types import Cond
from tests.families import scrambled

ROUTE = RouteOptions(first=1, last=2, keep=0.25)
NETWORK = replace(presets.SD3_TINY, num_layers=4)


def test_drawn_evenly_and_by_the_sample_alone() -> None:
    tokens, many = 16, 2000
    found = kept(ROUTE, Rng.of(0, range(many)), tokens, 0)
    assert found is not None
    assert found.shape == (many, 4)
    assert (found.diff(dim=1) > 0).all()
    counts = torch.bincount(found.flatten(), minlength=tokens)
    expected = many * 4 / tokens
    assert ((counts - expected).abs() < 5 * (expected * 0.75) ** 0.5).all()
    alone = kept(ROUTE, Rng.of(0, [1234]), tokens, 0)
    assert alone is not None
    assert torch.equal(alone[0], found[1234])
    few = kept(replace(ROUTE, keep=0.01), Rng.of(0, [0]), tokens, 0)
    assert few is not None
    assert few.shape == (1, 1)


def test_until() -> None:
    options = replace(ROUTE, until=10)
    assert kept(options, Rng.of(0, [0]), 16, 9) is not None
    assert kept(options, Rng.of(0, [0]), 16, 10) is None
    assert kept(ROUTE, Rng.of(0, [0]), 16, 10**9) is not None


def objective(options: DenoiseOptions) -> DenoiseObjective:
    torch.manual_seed(0)
    network = scrambled(networks.build(NETWORK), 0.2).requires_grad_(True).train()
    vae = Autoencoder(AutoencoderConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, sample_size=8,
                                        latent_channels=NETWORK.in_channels))  # fmt: skip
    shapes = {"text": (3, NETWORK.joint_attention_dim), "pooled": (NETWORK.pooled_projection_dim,)}

    def empty(texts: Sequence[str]) -> Cond:
        return {name: torch.zeros(len(texts), *shape) for name, shape in shapes.items()}

    process = Process(schedule=Flow(), prediction=Velocity())
    return DenoiseObjective(network, process, LatentCodec.of(vae), empty, options)


def test_training_steps_are_routed_and_the_validation_loss_is_not() -> None:
    """The blocks of the span see a quarter of the tokens while gradients are made, from the step on all of them."""
    side = 4 * NETWORK.patch_size
    seen: list[int] = []
    made = objective(DenoiseOptions(drop=0.0, route=replace(ROUTE, until=5)))
    network = made._of[0]
    assert isinstance(network, Transformer)
    for _, block in network.blocks():
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    torch.manual_seed(1)
    batch = {
        "moments": torch.randn(2, 2 * NETWORK.in_channels, side, side), "weight": torch.ones(2), "caption": ["a", "b"],
        "text": torch.randn(2, 3, NETWORK.joint_attention_dim),
        "pooled": torch.randn(2, NETWORK.pooled_projection_dim),
    }  # fmt: skip
    rng = Rng.of(0, [4, 5])
    loss, _ = made(batch, rng)
    loss.backward()
    assert seen == [16, 4, 4, 16]
    assert all(p.grad is not None for p in made.parameters())
    with torch.no_grad():
        whole, _ = made(batch, rng)
    assert seen[4:] == [16] * 4
    made.after_step(5)
    later, _ = made(batch, rng)
    assert seen[8:] == [16] * 4
    assert float(later) == pytest.approx(float(whole), rel=1e-6)
    assert float(loss) != pytest.approx(float(whole), rel=1e-4)
    plain, _ = objective(DenoiseOptions(drop=0.0))(batch, rng)
    assert torch.equal(plain, later)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="expected 0 <= first <= last"):
        RouteOptions(first=3, last=2)
    with pytest.raises(ValueError, match=r"keep must lie between 0 and 1, got 1\.0"):
        RouteOptions(first=0, last=1, keep=1.0)
    with pytest.raises(ValueError, match=r"options.route.last: 4, but blocks are numbered 0 to 3"):
        objective(DenoiseOptions(route=RouteOptions(first=1, last=4)))
    with pytest.raises(ValueError, match=r"options.route: leads a transformer's tokens, and the U-Net has none"):
        set_span(networks.build(UNETS["tiny"]), ROUTE)
    with pytest.raises(ValueError, match=r"options.align.layer: 1 is within options.route's blocks 1 to 2"):
        set_span(networks.build(NETWORK), ROUTE, "1")
    set_span(networks.build(NETWORK), ROUTE, "2")
