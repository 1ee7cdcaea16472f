"""The denoising loss against its formula in float64, caption dropout, and independence of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion.density import LogitNormal
from ldm.diffusion.prediction import V
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Flow
from ldm.diffusion.weighting import MinSNR
from ldm.models.text import TextConfig, TextTower, encode_texts
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.rng import Rng
from ldm.types import Cond

VAE = AutoencoderConfig(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, scaling_factor=0.7)


class Probe(nn.Module):
    """Stands in for a U-Net: remembers what it was given and answers a linear function of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.seen = {"x": x, "t": t, **cond}
        return self.scale * x + 0.01 * cond["text"].mean((1, 2))[:, None, None, None]


def encode_text(texts: Any) -> Cond:
    rows = torch.stack([torch.full((3, 2), float(len(t))) + torch.arange(2) for t in texts])
    return {"text": rows, "pooled": rows[:, 0]}


def objective(process: Process | None = None, drop: float = 0.0, encode: Any = encode_text) -> DenoiseObjective:
    codec = LatentCodec.of(Autoencoder(VAE))
    process = process or Process(prediction=V(), weighting=MinSNR(gamma=5.0))
    return DenoiseObjective(Probe(), process, codec, encode, DenoiseOptions(drop=drop))


def batch_of(positions: list[int]) -> dict[str, Any]:
    made = Rng.of(7, positions)
    return {
        "moments": made.normal("moments", (8, 4, 4)),
        "caption": ["x" * (1 + p % 5) for p in positions],
        "position": torch.tensor(positions),
        "weight": torch.tensor([1.0 + p for p in positions]),
    }


def test_the_loss_is_the_formula_in_float64() -> None:
    """v-prediction with min-SNR-5 on a posterior draw, written out with the schedule of Rombach et al."""
    built, batch = objective(), batch_of([3, 11, 4, 9, 0])
    rng = Rng.of(2, batch["position"])
    loss, _ = built(batch, rng)

    mean, logvar = np.split(batch["moments"].double().numpy(), 2, axis=1)
    draw = rng.normal("posterior", (4, 4, 4)).double().numpy()
    x0 = 0.7 * (mean + np.exp(logvar / 2) * draw)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)[built.trained.seen["t"].long().numpy()]  # type: ignore[union-attr]
    alpha, sigma = (np.sqrt(v)[:, None, None, None] for v in (abar, 1 - abar))
    noise = rng.normal("noise", (4, 4, 4)).double().numpy()
    x = alpha * x0 + sigma * noise
    text = np.array([len(c) + 0.5 for c in batch["caption"]])[:, None, None, None]
    error = (0.3 * x + 0.01 * text - (alpha * noise - sigma * x0)) ** 2
    snr = abar / (1 - abar)
    weight = np.minimum(snr, 5.0) / (snr + 1) * batch["weight"].double().numpy()
    expected = (error.mean((1, 2, 3)) * weight).mean()
    assert loss.item() == pytest.approx(expected, rel=2e-6)


def test_times_are_the_uniform_draws_of_the_positions() -> None:
    built, positions = objective(), list(range(200))
    built(batch_of(positions), Rng.of(2, positions))
    u = Rng.of(2, positions).uniform("time")
    assert torch.equal(built.trained.seen["t"].long(), (u.double() * 1000).floor().long())  # type: ignore[union-attr]


def test_the_configured_density_of_times_is_used() -> None:
    """A logit-normal with a narrow spread: all times near its median, which uniform times are not."""
    process = Process(schedule=Flow(), prediction=V(), density=LogitNormal(mean=0.0, std=0.01))
    built, positions = objective(process), list(range(100))
    built(batch_of(positions), Rng.of(2, positions))
    t = built.trained.seen["t"].double()  # type: ignore[union-attr]
    assert t.std() < 0.05 * process.schedule.last


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """The input of a position is the same alone, in another order and among others, dropped or not."""
    built, positions = objective(drop=0.5), [5, 17, 2, 8]
    whole = batch_of(positions)
    built(whole, Rng.of(2, positions))
    together = dict(built.trained.seen)  # type: ignore[union-attr]
    for i, p in enumerate(positions):
        built(batch_of([p]), Rng.of(2, [p]))
        for key, value in built.trained.seen.items():  # type: ignore[union-attr]
            assert torch.equal(value[0], together[key][i]), key


def test_the_share_of_dropped_captions() -> None:
    built, positions = objective(drop=0.2), list(range(2000))
    cond = built.cond({"caption": ["long caption"] * 2000}, Rng.of(1, positions))
    dropped = (cond["text"] == encode_text([""])["text"]).flatten(1).all(1)
    assert torch.equal(dropped, (cond["pooled"] == encode_text([""])["pooled"]).all(1))  # together or not at all
    assert abs(float(dropped.float().mean()) - 0.2) < 4 * (0.2 * 0.8 / 2000) ** 0.5


@pytest.mark.parametrize("zero_empty", [False, True])
def test_a_dropped_caption_is_what_the_pipeline_gives_for_no_prompt(zero_empty: bool) -> None:
    config = TextConfig(
        width=16, heads=2, layers=2, context_length=8, vocab_size=4096, bpe="emoji", zero_empty=zero_empty
    )
    tower = TextTower(config)
    built = objective(drop=1.0, encode=lambda texts: encode_texts([tower], texts))
    captions = ["a red apple", "a blue book", "cat"]
    with torch.no_grad():
        uncond, stored = encode_texts([tower], [""]), encode_texts([tower], captions)
    for batch in ({"caption": captions}, {"caption": captions, **stored}):  # encoded here, or cached
        cond = built.cond(batch, Rng.of(0, range(3)))
        for key, value in uncond.items():
            assert torch.equal(cond[key], value.expand(3, *value.shape[1:])), key
    assert bool((uncond["text"] == 0).all()) == zero_empty


def test_pixels_and_cached_moments_give_the_same_loss() -> None:
    built, positions = objective(drop=0.3), [4, 6, 1]
    images = Rng.of(3, positions).normal("images", (3, 8, 8)).clamp(-1, 1)
    rest = {k: v for k, v in batch_of(positions).items() if k != "moments"}
    cached = {"moments": built._feed._codec.moments(images), **encode_text(rest["caption"])}
    online, _ = built({"image": images, **rest}, Rng.of(2, positions))
    stored, _ = built({**cached, **rest}, Rng.of(2, positions))
    assert online.item() == stored.item()


def test_only_the_network_is_trained() -> None:
    assert {n for n, _ in objective().named_parameters()} == {"trained.scale"}


def test_the_loss_by_noise_level_is_the_mean_of_its_third() -> None:
    built, positions = objective(), list(range(30))
    batch = batch_of(positions) | {"weight": torch.ones(30)}
    loss, metrics = built(batch, Rng.of(2, positions))
    t = built.trained.seen["t"].double() / 999  # type: ignore[union-attr]
    each = torch.stack([built(batch_of([p]) | {"weight": torch.ones(1)}, Rng.of(2, [p]))[0] for p in positions])
    for i, name in enumerate(("low", "middle", "high")):
        inside = ((t * 3).clamp(max=2.999).long() == i) & torch.ones(30, dtype=torch.bool)
        assert float(metrics[f"loss_{name}_noise"]) == pytest.approx(each[inside].mean().item(), rel=1e-5)
    assert not any(m.requires_grad for m in metrics.values())
    assert loss.item() == pytest.approx(each.mean().item(), rel=1e-5)
