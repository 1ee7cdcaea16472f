"""Masked loss, shaped losses, ranges of times and coarser noises of the denoising objective, each against its sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion import Epsilon, Flow, Importance, Process, Velocity
from ldm.diffusion.shape import Huber
from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.concat import Inpaint
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.objectives.masked import MaskOptions
from ldm.objectives.multires import pyramid_noise
from ldm.rng import Rng
from ldm.types import Cond
from tests.unit.objectives.test_denoise_options import VAE, batch_of, objective

FACTOR = 2


class Field(nn.Module):
    """Answers with its own values, one for each place."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(rows, 4, 4, 4, generator=torch.Generator().manual_seed(3)))
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.times.append(t)
        return self.values.repeat(len(x) // len(self.values), 1, 1, 1)


def field(rows: int = 2, **options: Any) -> tuple[DenoiseObjective, Field]:
    network = Field(rows)

    def encode(texts: Any) -> Cond:
        return {"text": torch.zeros(len(texts), 3, 2)}

    codec = LatentCodec.of(Autoencoder(VAE))
    return DenoiseObjective(network, Process(), codec, encode, DenoiseOptions(drop=0.0, **options)), network


def masked_batch(mask: Tensor) -> dict[str, Any]:
    return batch_of(list(range(len(mask)))) | {"loss_weight": mask}


def gradients(white: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of each place's answer."""
    loss_of, network = field(**options)
    batch = batch_of([0, 1]) if white is None else masked_batch(white)
    loss, _ = loss_of(batch, Rng.of(1, batch["position"]))
    loss.backward()
    assert network.values.grad is not None
    return loss.detach(), network.values.grad


def half() -> Tensor:
    """White on the left four of eight pixels, and one single pixel of the second picture."""
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :, :4] = 1
    mask[1, :, 2, 5] = 1
    return mask


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("outside", [0.0, 0.3, 1.0])
def test_a_mask_of_ones_is_the_plain_loss(normalize: bool, outside: float) -> None:
    plain, slope = gradients(None)
    loss, other = gradients(torch.ones(2, 1, 8, 8), mask=MaskOptions(outside=outside, normalize=normalize))
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(other, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("outside", [0.0, 0.25])
def test_gradients_are_those_of_the_plain_loss_times_the_weight_of_the_latent_pixel(outside: float) -> None:
    """A mask of half the picture, and of one pixel of four: a quarter at its latent pixel."""
    _, slope = gradients(None)
    _, other = gradients(half(), mask=MaskOptions(outside=outside))
    inside = torch.zeros(2, 1, 4, 4)
    inside[0, :, :, :2] = 1
    inside[1, :, 1, 2] = 0.25
    torch.testing.assert_close(other, slope * (inside + (1 - inside) * outside), rtol=1e-5, atol=1e-9)
    if outside == 0:
        assert float(other[0, :, :, 2:].abs().max()) == 0


def test_normalized_is_divided_by_the_mean_weight_of_each_picture() -> None:
    _, slope = gradients(half(), mask=MaskOptions(outside=0.1))
    _, other = gradients(half(), mask=MaskOptions(outside=0.1, normalize=True))
    shares = torch.tensor([0.5 + 0.5 * 0.1, (0.25 / 16) + (1 - 0.25 / 16) * 0.1]).view(2, 1, 1, 1)
    torch.testing.assert_close(other, slope / shares, rtol=1e-5, atol=1e-9)


def test_an_empty_mask_teaches_nothing_and_is_finite() -> None:
    loss, slope = gradients(torch.zeros(2, 1, 8, 8), mask=MaskOptions(normalize=True))
    assert float(loss) == 0
    assert float(slope.abs().max()) == 0


def test_each_use_of_a_picture_has_its_mask() -> None:
    _, slope = gradients(half(), mask=MaskOptions(), repeats=3)
    assert float(slope[0, :, :, 2:].abs().max()) == 0
    assert float(slope[0, :, :, :2].abs().min()) > 0


def test_a_batch_without_the_mask_is_an_error() -> None:
    loss_of, _ = field(mask=MaskOptions())
    batch = batch_of([0, 1])
    with pytest.raises(ValueError, match=r"no 'loss_weight', which options.mask needs; data.pairs reads it"):
        loss_of(batch, Rng.of(1, batch["position"]))


def test_the_objective_minimises_the_shape_that_is_asked_for() -> None:
    """Huber's slope is 2 d x / sqrt(x^2 + d^2) of each error, over all places."""
    _, plain = gradients(None)
    _, slope = gradients(None, loss=Huber(schedule="constant", c=0.3))
    error = plain * 4 * 16  # d/dv mean(x^2) over 2 samples of 64 places = 2 x / 128
    torch.testing.assert_close(slope, 2 * 0.3 * error / (error**2 + 0.09).sqrt() / 128, rtol=1e-4, atol=1e-8)


def test_training_times_are_in_the_range_and_validation_sees_all() -> None:
    loss_of, network = field(rows=64, min_timestep=300, max_timestep=400)
    batch = batch_of(list(range(64)))
    loss_of(batch, Rng.of(1, batch["position"]))
    with torch.no_grad():
        loss_of(batch, Rng.of(1, batch["position"]))
    drawn, seen = network.times
    assert int(drawn.min()) >= 300
    assert int(drawn.max()) < 400
    assert len(set(drawn.tolist())) > 30
    assert int(seen.min()) < 100
    assert int(seen.max()) > 900


@pytest.mark.parametrize(
    ("options", "process", "told"),
    [
        ({"max_timestep": 2000}, Process(), "options.max_timestep: 2000 is beyond the schedule's 1000"),
        ({"min_timestep": 1000}, Process(), "options.min_timestep: 1000 must be below"),
        ({"min_timestep": 9}, Process(density=Importance()), "density importance draws all times"),
        ({"loss": Huber()}, Process(variance="learned"), "options.loss: has no meaning with process.variance"),
        ({"mask": MaskOptions()}, Process(variance="learned"), "options.mask: has no meaning"),
    ],
)
def test_what_a_process_cannot_have_is_refused(options: Any, process: Process, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        objective(process, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"min_timestep": 5, "max_timestep": 5}, "max_timestep must be above min_timestep 5"),
        ({"min_timestep": -1}, "min_timestep"),
        ({"multires_iterations": 99}, "multires_iterations"),
        ({"multires_discount": 1.5}, "multires_discount"),
        ({"mask": MaskOptions(), "concat": Inpaint(outside=0.5)}, "mask: beside concat.outside"),
    ],
)
def test_bad_options_are_refused_by_name(options: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DenoiseOptions(**options)


def enlarging(small: int, large: int) -> Tensor:
    """The matrix of linear enlargement, half-pixel centres, edges repeated; float64."""
    matrix = torch.zeros(large, small, dtype=torch.float64)
    for i in range(large):
        place = min(max((i + 0.5) * small / large - 0.5, 0.0), small - 1.0)
        low = min(int(place), small - 1)
        high = min(low + 1, small - 1)
        matrix[i, low] += 1 - (place - low)
        matrix[i, high] += place - low
    return matrix


def test_one_coarser_noise_is_white_and_unit_as_its_grid_is_the_picture() -> None:
    """r^0 = 1: a sum of two noises, which is white again after scaling."""
    rng = Rng.of(4, list(range(300)))
    noise = pyramid_noise(rng.normal("noise", (4, 8, 8)), rng, 1, 0.5)
    assert noise.std(dim=(1, 2, 3)).tolist() == pytest.approx([1.0] * 300, abs=1e-5)
    assert float(noise.mean(dim=(2, 3)).var()) * 64 == pytest.approx(1.0, rel=0.15)


def test_coarser_noises_raise_the_variance_of_the_mean_as_their_grids_tell() -> None:
    """The variance of a channel's mean over that of its pixels, expected in float64 from the factors that are drawn."""
    side, levels, discount = 8, 4, 0.6
    rng = Rng.of(4, list(range(600)))
    noise = pyramid_noise(rng.normal("noise", (4, side, side)), rng, levels, discount)
    factors = [2 + 2 * rng.uniform(f"multires {i} factor").double() for i in range(levels)]
    of_mean, of_pixels = [], []
    for row in range(600):
        mean, pixels = 1 / side**2, 1.0
        for i in range(levels):
            small = max(1, int(side / float(factors[i][row]) ** i))
            grow = enlarging(small, side)
            means = grow.mean(0)
            mean += discount ** (2 * i) * float((means**2).sum()) ** 2
            pixels += discount ** (2 * i) * float((grow**2).sum(1).mean()) ** 2
            if small == 1:
                break
        of_mean.append(mean)
        of_pixels.append(pixels)
    expected = (torch.tensor(of_mean) / torch.tensor(of_pixels)).mean()
    assert float(noise.mean(dim=(2, 3)).square().mean()) == pytest.approx(float(expected), rel=0.12)
    assert float(expected) > 4 / side**2
    torch.testing.assert_close(noise.std(dim=(1, 2, 3)), torch.ones(600), rtol=0, atol=1e-5)


def test_coarser_noise_belongs_to_its_sample_and_is_the_target() -> None:
    """The same in any batch; the network learns the noise that it sees."""
    together, one = Rng.of(4, [3, 8]), Rng.of(4, [8])
    a = pyramid_noise(together.normal("noise", (4, 8, 8)), together, 6, 0.3)
    b = pyramid_noise(one.normal("noise", (4, 8, 8)), one, 6, 0.3)
    assert torch.equal(a[1:], b)
    process = Process(schedule=Flow(), prediction=Velocity())
    loss_of, heads = objective(process, multires_iterations=6)
    batch = batch_of([0, 1])
    rng = Rng.of(1, batch["position"])
    loss, _ = loss_of(batch, rng)
    with torch.no_grad():
        x0 = loss_of.latents(batch, rng)
    noise = pyramid_noise(rng.normal("noise", x0.shape[1:]), rng, 6, 0.3)
    s = (heads.seen["t"] / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(heads.seen["x"], (1 - s) * x0 + s * noise, rtol=1e-4, atol=1e-5)
    expected = ((heads.mean * heads.seen["x"] - (noise - x0)) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert isinstance(Process().prediction, Epsilon)
