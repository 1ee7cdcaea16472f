"""The contrastive loss against a cross-entropy written by hand, on one rank and on two; augmentation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.objectives.contrastive import ContrastiveObjective, augment
from ldm.rng import Rng
from tests import ranks


class Towers(nn.Module):
    """Linear towers with open_clip's interface: normalised features and the exponential of the scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(12, 5), nn.Embedding(50, 5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = self.image(images.flatten(1)), self.text(tokens).mean(1)
        return image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True), self.logit_scale.exp()


def batch(rows: slice = slice(None)) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    images, tokens = torch.randn(6, 3, 2, 2, generator=g), torch.randint(0, 50, (6, 4), generator=g)
    return {"image": images[rows], "tokens": tokens[rows], "position": torch.arange(6)[rows]}


def by_hand(towers: Towers) -> Tensor:
    """The mean over pictures of -log softmax over captions at the own one, and the other way round, halved."""
    image, text, scale = (v.double() for v in towers(batch()["image"], batch()["tokens"]))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        rows = torch.stack([scale * (image[i] @ text[j]) for j in range(6)])
        columns = torch.stack([scale * (image[j] @ text[i]) for j in range(6)])
        total = total - (rows[i] - rows.exp().sum().log()) - (columns[i] - columns.exp().sum().log())
    return total / 12


def flat_gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_the_loss_and_its_gradient_are_the_cross_entropy() -> None:
    built, towers = ContrastiveObjective(Towers()), Towers()
    loss, metrics = built(batch(), Rng.of(0, range(6)))
    expected = by_hand(towers)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(flat_gradients(built), flat_gradients(towers), rtol=1e-4, atol=1e-6)
    image, text, _ = towers(batch()["image"], batch()["tokens"])
    right = sum(int((image[i] @ text.T).argmax()) == i for i in range(6))
    assert float(metrics["accuracy"]) == pytest.approx(right / 6)


def test_blind_towers_are_at_chance_whatever_the_rounding() -> None:
    """One feature for every caption, but for rounding: the accuracy is one in six, not what noise makes of it."""
    towers = Towers()
    with torch.no_grad():
        towers.text.weight[:] = towers.text.weight[:1] * (1 + 2.0**-24 * torch.randn(50, 5))
    _, metrics = ContrastiveObjective(towers)(batch(), Rng.of(0, range(6)))
    assert float(metrics["accuracy"]) == pytest.approx(1 / 6)
    with torch.no_grad():
        towers.text.weight[:] = math.nan
    _, metrics = ContrastiveObjective(towers)(batch(), Rng.of(0, range(6)))
    assert float(metrics["accuracy"]) == 0


def test_the_scale_is_bounded_by_a_hundred() -> None:
    towers = Towers()
    nn.init.constant_(towers.logit_scale, 6.0)
    _, metrics = ContrastiveObjective(towers)(batch(), Rng.of(0, range(6)))
    assert float(metrics["scale"]) == 100


def on_rank() -> tuple[float, Tensor]:
    """Three of the six pairs; gradients averaged over ranks as data parallel training does."""
    from ldm import dist

    built = ContrastiveObjective(Towers())
    rank = dist.rank()
    loss, _ = built(batch(slice(rank * 3, rank * 3 + 3)), Rng.of(0, range(3)))
    loss.backward()
    return float(dist.mean(loss)), dist.mean(flat_gradients(built))


def test_two_ranks_contrast_with_each_other() -> None:
    towers = Towers()
    expected = by_hand(towers)
    expected.backward()
    for loss, gradient in ranks.run(on_rank, 2):
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(gradient, flat_gradients(towers), rtol=1e-4, atol=1e-6)


def test_augmentation_moves_pictures_by_their_own_draws() -> None:
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    assert torch.equal(augment(images, Rng.of(0, range(4)), 0.0), images)
    moved = augment(images, Rng.of(0, [5, 1, 9, 2]), 0.2)
    assert torch.equal(moved[2:3], augment(images[2:3], Rng.of(0, [9]), 0.2))
    assert moved.abs().max() <= 1
    flat = torch.full((2, 3, 16, 16), 0.25)
    torch.testing.assert_close(augment(flat, Rng.of(0, [0, 1]), 0.3), flat)  # the edge is repeated, not black
