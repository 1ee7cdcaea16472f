"""KL against torch.distributions; the two games do not leak into each other; the balance is what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.models.discriminator import Discriminator, DiscriminatorConfig
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.objectives.autoencoder import AutoencoderLoss, AutoencoderObjective, balance, hinge, kl_to_standard_normal
from ldm.rng import Rng

POSITIONS = [3, 8]


def objective(**loss: float) -> AutoencoderObjective:
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2))
    terms = {"kl": 0.01, "perceptual": 0.0, "adversarial": 0.3, "adversarial_start": 10} | loss
    discriminator = Discriminator(DiscriminatorConfig(channels=(8, 8)))
    return AutoencoderObjective(autoencoder, discriminator, AutoencoderLoss(**terms), None)  # type: ignore[arg-type]


def images() -> Tensor:
    return Rng.of(1, POSITIONS).normal("images", (3, 8, 8)).clamp(-1, 1)


def gradients(built: AutoencoderObjective, loss: Tensor) -> dict[str, Tensor]:
    built.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in built.named_parameters() if p.grad is not None}


def run(built: AutoencoderObjective, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return built({"image": batch}, Rng.of(0, POSITIONS))


def test_kl_is_that_of_torch_distributions() -> None:
    moments = torch.randn(3, 8, 2, 2, dtype=torch.float64) * 1.5
    mean, logvar = moments.chunk(2, dim=1)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(kl_to_standard_normal(moments), expected.float(), rtol=1e-6, atol=0)


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 2.0])
    assert hinge(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 3) / 3))


def test_before_its_start_the_discriminator_neither_acts_nor_learns() -> None:
    built = objective()
    built.after_step(9)
    loss, metrics = run(built, images())
    found = gradients(built, loss)
    assert "adversarial" not in metrics
    critic = {n for n in found if "discriminator" in n}
    assert critic == {n for n, _ in built.named_parameters() if "discriminator" in n}  # takes part on every rank
    assert all(found[n].abs().max() == 0 for n in critic)
    assert loss.item() == pytest.approx(metrics["l1"].item() + 0.01 * metrics["kl"].item(), rel=1e-6)


def test_each_player_gets_the_gradient_of_its_own_loss_alone() -> None:
    built = objective()
    built.after_step(10)
    loss, metrics = run(built, images())
    both = gradients(built, loss)
    autoencoder, discriminator = built._autoencoder[0], built._discriminator[0]

    moments = autoencoder.encode(images())
    mean, logvar = moments.chunk(2, dim=1)
    noise = Rng.of(0, POSITIONS).normal("posterior", (4, 4, 4))
    decoded = autoencoder.decode(mean + (0.5 * logvar).exp() * noise)
    critic = 0.5 * (
        (1 - discriminator(images())).clamp(min=0).mean() + (1 + discriminator(decoded.detach())).clamp(min=0).mean()
    )
    alone = gradients(built, critic)
    names = [n for n, _ in built.named_parameters() if "discriminator" in n]
    assert max(float(both[n].abs().max()) for n in names) > 0
    for n in names:
        torch.testing.assert_close(both[n], alone[n], rtol=1e-5, atol=1e-8)

    generator = (
        (decoded - images()).abs().mean()
        + 0.01 * kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).flatten(1).sum(1).mean()
        - 0.3 * metrics["balance"] * discriminator(decoded).mean()
    )
    alone = gradients(built, generator)
    for n, _ in built.named_parameters():
        if "discriminator" not in n:
            torch.testing.assert_close(both[n], alone[n], rtol=1e-4, atol=1e-7)


def test_the_balance_gives_the_adversarial_term_its_share_of_the_pixel_gradient() -> None:
    others, slope = torch.randn(2, 3, 4, 4), torch.full((2, 3, 4, 4), 5.0)
    assert balance(others, slope).item() == pytest.approx(others.norm().item() / (5 * 96**0.5), rel=1e-5)
    built = objective()
    built.after_step(10)
    loss, metrics = run(built, images())
    expected = metrics["l1"] + 0.01 * metrics["kl"] + metrics["discriminator"]
    expected = expected + 0.3 * metrics["balance"] * metrics["adversarial"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not any(m.requires_grad for m in metrics.values())


def test_the_posterior_draw_belongs_to_the_position() -> None:
    built = objective(adversarial=0.0)
    whole, _ = run(built, images())
    parts = [built({"image": images()[i : i + 1]}, Rng.of(0, [p]))[0] for i, p in enumerate(POSITIONS)]
    assert whole.item() == pytest.approx(sum(p.item() for p in parts) / 2, rel=1e-6)
