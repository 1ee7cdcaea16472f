"""Editing on networks whose answer is known: img2img, inpainting, inversion."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion import Discrete, Flow, Process
from ldm.sampling import SAMPLERS, sample, times
from ldm.sampling.editing import img2img_times, inpaint, inpaint_cond, invert, keep

SCHEDULE = Discrete()
STD = 0.5
SHAPE = (2, 4, 8, 8)


def normal(seed, dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(x, t, cond):
    """E[x_0 | x_t] for data N(text, STD^2)."""
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in SCHEDULE.alpha_sigma(t, torch.float64))
    mean = cond["text"].view(-1, 1, 1, 1)
    return mean + alpha * STD**2 * (x - alpha * mean) / (alpha**2 * STD**2 + sigma**2)


def curved(x, t, cond, schedule=SCHEDULE):
    """E[x_0 | x_t] for an even mixture of N(0.6, 0.3^2) and N(-0.6, 0.3^2)."""
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in schedule.alpha_sigma(t, torch.float64))
    variance = alpha**2 * 0.09 + sigma**2
    side = torch.tanh(alpha * 0.6 * x / variance) * 0.6
    return side + alpha * 0.09 * (x - alpha * side) / variance


def text(value):
    return {"text": torch.full((2,), value, dtype=torch.float64)}


def psnr(a, b):
    return float(10 * torch.log10(4 / ((a - b) ** 2).mean()))


@pytest.mark.parametrize(("steps", "strength", "first"), [(50, 0.75, 37), (50, 0.1, 5), (10, 0.01, 1), (3, 0.999, 2)])
def test_img2img_takes_the_last_times(steps, strength, first):
    every = times(SCHEDULE, steps)
    assert img2img_times(SCHEDULE, steps, strength) == every[-first:]


def test_img2img_starts_at_the_noised_picture():
    """x at the first time is alpha start + sigma noise; less strength stays closer to the picture."""
    start, noise = normal(0), normal(1)
    path = img2img_times(SCHEDULE, 20, 0.5)
    seen = []

    def watch(x, t, cond):
        seen.append(x)
        return gaussian(x, t, cond)

    def run(path):
        return sample(
            "ddim", watch, noise, text(0.0), schedule=SCHEDULE, steps=20, times=path, start=start, noise=normal
        )

    run(path)
    alpha, sigma = SCHEDULE.at(path[0])
    assert torch.allclose(seen[0], alpha * start + sigma * noise)
    far = [float((run(img2img_times(SCHEDULE, 20, s)) - start).norm()) for s in (0.1, 0.4, 0.7, 0.95)]
    assert far == sorted(far)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("ddpm_learned", "lcm")])
def test_inpainting_is_exact_outside(name):
    """The kept part comes back, to the last bit through `keep`, with any sampler; the rest is made anew."""
    known = normal(0, torch.float32)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    denoise = inpaint(Process().denoiser(lambda x, t, cond: torch.sin(x)), known, mask)
    got = sample(
        name,
        denoise,
        normal(1, torch.float32),
        {},
        schedule=SCHEDULE,
        steps=6,
        start=known,
        noise=lambda i: normal(i, torch.float32),
        end="data",
    )
    outside = mask.expand(SHAPE) == 0
    assert torch.allclose(got[outside], known[outside], atol=2e-4)
    assert torch.equal(keep(got, known, mask)[outside], known[outside])
    assert float((got - known)[~outside].abs().mean()) > 0.1


def test_soft_masks_mix():
    known, new = torch.zeros(SHAPE), torch.ones(SHAPE)
    mask = torch.full((1, 1, 8, 8), 0.25)
    assert torch.equal(keep(new, known, mask), torch.full(SHAPE, 0.25))


def test_nine_channels():
    cond = inpaint_cond(text(1.0), torch.ones(1, 1, 8, 8), normal(0))
    assert cond["concat"].shape == (2, 5, 8, 8)
    assert torch.equal(cond["concat"][:, 1:], normal(0))
    assert bool((cond["concat"][:, :1] == 1).all())
    assert set(cond) == {"text", "concat"}


@pytest.mark.parametrize("denoise", [gaussian, curved])
def test_inversion_round_trip(denoise):
    """The noise found gives the picture back; more steps are better, and fixed-point rounds make it exact."""
    x0 = 0.6 * normal(2).sign() + 0.3 * normal(0)
    quality = []
    for steps, refine in ((25, 0), (100, 0), (25, 10)):
        found = invert(denoise, x0, text(0.2), schedule=SCHEDULE, steps=steps, refine=refine)
        back = sample("ddim", denoise, found, text(0.2), schedule=SCHEDULE, steps=steps, noise=normal)
        quality.append(psnr(back, x0))
    print(denoise.__name__, [round(q, 1) for q in quality])
    assert quality[1] > quality[0] + 6
    assert quality[1] > 30
    assert quality[2] > 60


def test_inversion_finds_the_ode_start():
    """On Gaussian data the noise is the picture times the ratio of the marginals."""
    x0 = normal(0) * STD
    found = invert(gaussian, x0, text(0.0), schedule=SCHEDULE, steps=500)
    alpha, sigma = SCHEDULE.at(999)
    truth = x0 / STD * (alpha**2 * STD**2 + sigma**2) ** 0.5
    assert float((found - truth).norm() / truth.norm()) < 0.02


def test_inversion_then_a_new_prompt():
    """Gaussian data around the prompt: the picture moves by as much as the prompt does, and keeps its shape."""
    x0 = 0.5 + normal(0) * STD
    found = invert(gaussian, x0, text(0.5), schedule=SCHEDULE, steps=100, refine=5)
    moved = sample("ddim", gaussian, found, text(-0.5), schedule=SCHEDULE, steps=100, noise=normal)
    shift = moved - x0
    assert float(shift.mean()) == pytest.approx(-1.0, abs=0.05)
    assert float(shift.std()) < 0.02


def test_inversion_on_flows():
    flow = Flow()

    def denoise(x, t, cond):
        return curved(x, t, cond, flow)

    x0 = 0.6 * normal(2).sign() + 0.3 * normal(0)
    found = invert(denoise, x0, {}, schedule=flow, steps=20, refine=30, times=[1000 * (1 - i / 20) for i in range(20)])
    back = sample(
        "ddim",
        denoise,
        found,
        {},
        schedule=flow,
        steps=20,
        noise=normal,
        times=[1000 * (1 - i / 20) for i in range(20)],
    )
    assert bool(torch.isfinite(found).all())
    assert psnr(back, x0) > 30


def test_inversion_names_the_bad_step():
    def broken(x, t, cond):
        return x * float("nan") if float(t[0]) > 500 else x

    with pytest.raises(ValueError, match="not finite at sampling step"):
        invert(broken, normal(0), {}, schedule=SCHEDULE, steps=10)
