"""What a batch's pictures become before they are concatenated, by hand; and the loss inside of a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.diffusion import Process
from ldm.objectives.concat import MASK, Inpaint, Instruct, Upscale
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.rng import Rng

SCALE, SPREAD = 0.5, 0.25


class Codec:
    """Means of squares of two pixels as the posterior's mean, of one standard deviation."""

    factor, channels, scale = 2, 3, SCALE

    def moments(self, images: Tensor) -> Tensor:
        mean = functional.avg_pool2d(images, 2)
        return torch.cat([mean, torch.full_like(mean, 2 * np.log(SPREAD))], 1)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, logvar = moments.chunk(2, 1)
        return SCALE * (mean if noise is None else mean + (0.5 * logvar).exp() * noise)


class Told(nn.Module):
    """Keeps what it is told, and answers a multiple of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.cond: dict[str, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.cond, self.x = cond, x
        return self.weight * x


def batch_of(rows: int = 2, **more: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    image = torch.rand(rows, 3, 8, 8, generator=g)
    return {"image": 2 * image - 1, "caption": ["a"] * rows, "weight": torch.ones(rows),
            "position": torch.arange(rows)} | more  # fmt: skip


def objective(options: DenoiseOptions) -> tuple[DenoiseObjective, Told]:
    net = Told()
    encode = lambda prompts: {"text": torch.tensor([[[float(len(p))]] for p in prompts])}  # noqa: E731
    return DenoiseObjective(net, Process(), Codec(), encode, options), net  # type: ignore[arg-type]


def inpainted(rows: int = 2) -> dict[str, Any]:
    batch = batch_of(rows)
    mask = torch.zeros(rows, 1, 8, 8)
    mask[0, 0, 1:4, 2:7] = 1  # begins and ends inside of squares
    mask[1:, 0, 4:, :] = 1
    masked = torch.where(mask > 0, 0.5, (batch["image"] + 1) / 2)
    return batch | {MASK: mask, "masked": masked}


def test_inpainting_is_told_the_mask_by_nearest_and_latents_of_the_rest() -> None:
    made, net = objective(DenoiseOptions(drop=0.0, concat=Inpaint()))
    batch, rng = inpainted(), Rng(3, (5, 9))
    made(batch, rng)
    told = net.cond["concat"]
    assert told.shape == (2, 4, 4, 4)
    assert torch.equal(told[:, :1], batch[MASK][:, :, ::2, ::2])
    rest = torch.where(batch[MASK] > 0, 0.0, batch["image"])  # grey where it is painted
    mean = rest.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    noise = rng.normal("posterior masked", (3, 4, 4))
    assert torch.allclose(told[:, 1:], SCALE * (mean + SPREAD * noise), atol=1e-6)
    cached = {k: v for k, v in batch.items() if k != "masked"}
    made(cached | {"masked.moments": Codec().moments(rest)}, rng)
    assert torch.allclose(net.cond["concat"], told, atol=1e-6)


@pytest.mark.parametrize("outside", [1.0, 0.25, 0.0])
def test_the_loss_weighs_what_is_outside(outside: float) -> None:
    made, net = objective(DenoiseOptions(drop=0.0, concat=Inpaint(outside=outside)))
    batch, rng = inpainted(), Rng(3, (5, 9))
    loss, _ = made(batch, rng)
    target = rng.normal("noise", (3, 4, 4)).double().numpy()
    error = (0.7 * net.x.double().numpy() - target) ** 2
    total = 0.0
    for row in range(2):
        weights = np.full((4, 4), outside)
        for i, j in np.argwhere(batch[MASK][row, 0].numpy() > 0):  # any pixel of it
            weights[i // 2, j // 2] = 1.0
        total += (error[row].mean(0) * weights).sum() / weights.sum()
    assert abs(loss.item() - total / 2) < 1e-5 * total


def test_repetitions_share_the_picture() -> None:
    made, net = objective(DenoiseOptions(drop=0.0, repeats=2, concat=Inpaint(outside=0.0)))
    made(inpainted(), Rng(3, (5, 9)))
    assert net.cond["concat"].shape[0] == 4
    assert torch.equal(net.cond["concat"][:2], net.cond["concat"][2:])


def test_a_batch_without_its_pair_is_named() -> None:
    made, _ = objective(DenoiseOptions(drop=0.0, concat=Inpaint()))
    with pytest.raises(ValueError, match=r"no 'inpaint_mask'; data\.pairs makes or reads one: inpaint_mask: \{kind"):
        made(batch_of(), Rng(0, (0, 1)))


def edited(rows: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    return batch_of(rows) | {"original": torch.rand(rows, 3, 8, 8, generator=g)}


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_edits_are_told_the_mode_and_drop_text_picture_or_both(part: float) -> None:
    """Unscaled means; by one draw a sample: text alone below 0.2, both up to 0.3, the picture alone up to 0.6."""
    concat, rows = Instruct(drop=0.3, both=0.1), 64
    made, net = objective(DenoiseOptions(drop=0.2, drop_warmup=0 if part == 1 else 10, concat=concat))
    made.after_step(5)
    batch, rng = edited(rows), Rng(7, tuple(range(rows)))
    made(batch, rng)
    u = rng.uniform("drop") / part
    text_gone = net.cond["text"].flatten() == 0
    picture_gone = (net.cond["concat"] == 0).flatten(1).all(1)
    assert torch.equal(text_gone, u < 0.2 + 0.1)
    assert torch.equal(picture_gone, (u >= 0.2) & (u < 0.6))
    assert 0 < int((text_gone & picture_gone).sum()) < int(picture_gone.sum()) < rows
    mean = (2 * batch["original"] - 1).unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    assert torch.allclose(net.cond["concat"][~picture_gone], mean[~picture_gone], atol=1e-6)
    cached = {k: v for k, v in batch.items() if k != "original"}
    made(cached | {"original.moments": Codec().moments(2 * batch["original"] - 1)}, rng)
    assert torch.allclose(net.cond["concat"][~picture_gone], mean[~picture_gone], atol=1e-6)


def test_shares_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"both must be in \[0, 1\], got -0\.1"):
        Instruct(both=-0.1)
    with pytest.raises(ValueError, match=r"drop 0\.5, concat\.drop 0\.4 and concat\.both 0\.2 must not be more than 1"):
        DenoiseOptions(drop=0.5, concat=Instruct(drop=0.4, both=0.2))


def test_upscalers_are_told_a_small_picture_with_noise_of_a_level() -> None:
    """By the schedule of Stable Diffusion's x4 upscaler in float64; levels below 350, evenly."""
    made, net = objective(DenoiseOptions(drop=0.0, concat=Upscale()))
    rows = 200
    batch, rng = batch_of(rows), Rng(7, tuple(range(rows)))
    small = torch.rand(rows, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    made(batch | {"small": small}, rng)
    level = net.cond["class"]
    assert level.dtype == torch.int64
    assert 0 <= int(level.min()) < 20
    assert 330 < int(level.max()) < 350
    assert abs(level.float().mean() - 174.5) < 25
    betas = np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2
    bar = torch.from_numpy(np.cumprod(1 - betas))[level].view(-1, 1, 1, 1)
    want = bar.sqrt() * (2 * small.double() - 1) + (1 - bar).sqrt() * rng.normal("low resolution", (3, 4, 4)).double()
    assert torch.allclose(net.cond["concat"].double(), want, atol=1e-5)
