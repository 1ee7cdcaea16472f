"""Users' mistakes: each a ValueError that names the key, the value and what is allowed."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.diffusion import Discrete, Flow, Process
from ldm.sampling import SAMPLERS, dynamic_threshold, sample
from ldm.sampling import editing as edit
from ldm.sampling import guidance as guide

X = torch.zeros(2, 4, 8, 8)


def run(name="ddim", net=None, x=X, schedule=None, **options):
    schedule = schedule or Discrete()
    denoise = Process(schedule=Discrete()).denoiser(net or (lambda x, t, cond: x))
    options = {"steps": 5, **options}
    return sample(name, denoise, x, {}, schedule=schedule, noise=lambda i: torch.randn_like(x), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": -3}, "at least 1, got -3"),
        ({"steps": 2.5}, "whole number of at least 1, got 2.5"),
        ({"steps": 1001}, "at most the schedule's 1000, got 1001"),
        ({"name": "odd"}, r"sampler 'odd' is not one of \['ddim', 'ddpm'"),
        ({"eta": 1.5}, r"eta of sampler 'ddim' must be in \[0, 1\], got 1.5"),
        ({"eta": -0.1}, r"must be in \[0, 1\], got -0.1"),
        ({"eta": math.nan}, r"must be in \[0, 1\], got nan"),
        ({"name": "heun", "eta": 0.5}, "must be 0: it has no such choice, got 0.5"),
        ({"name": "tcd", "eta": 2.0}, r"must be in \[0, 1\], got 2"),
        ({"spacing": "odd"}, "spacing 'odd' is not one of"),
        ({"times": [10.0, 10.0]}, "strictly decreasing, got 10 then 10"),
        ({"times": [10.0, 20.0]}, "strictly decreasing, got 10 then 20"),
        ({"times": []}, "times must not be empty"),
        ({"times": [1000.0, 5.0]}, r"times must lie in \[0, 999\], got 1000 to 5"),
        ({"times": [5.0, -1.0]}, r"must lie in \[0, 999\]"),
        ({"times": [math.nan]}, r"must lie in \[0, 999\]"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"start": torch.zeros(2, 4, 4, 4)}, r"start must have the shape of x, \(2, 4, 8, 8\), got \(2, 4, 4, 4\)"),
        ({"name": "ddpm_learned"}, "needs a denoiser from Process.learned_denoiser"),
    ],
)
def test_sample(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddpm_learned"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_output_that_is_not_finite_is_named_by_step(name, value):
    calls = []

    def net(x, t, cond):
        calls.append(float(t[0]))
        out = torch.zeros_like(x)
        if len(set(calls)) == 3:
            out[1, 0, 0, 0] = value
        return out

    with pytest.raises(ValueError, match=r"the network's output is not finite at sampling step [012] \(time"):
        run(name, net=net, steps=4)


def test_learned_variance_needs_twice_the_channels():
    denoise = Process().learned_denoiser(lambda x, t, cond: x)
    with pytest.raises(ValueError, match="needs 8 output channels, got 4"):
        sample("ddpm_learned", denoise, X, {}, schedule=Discrete(), steps=3, noise=lambda i: X)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: edit.img2img_times(Discrete(), 10, 0.0), "strength must lie strictly between 0"),
        (lambda: edit.img2img_times(Discrete(), 10, 1.0), "strength must lie strictly between 0"),
        (lambda: edit.img2img_times(Discrete(), 10, math.nan), "strength must lie strictly between 0"),
        (lambda: edit.img2img_times(Flow(), 0, 0.5), "steps must be a whole number"),
        (lambda: edit.check_mask(torch.ones(2, 1, 4, 4), X), r"mask must be \(1 or 2, 1, 8, 8\), got \(2, 1, 4, 4\)"),
        (lambda: edit.check_mask(torch.ones(3, 1, 8, 8), X), r"mask must be \(1 or 2, 1, 8, 8\)"),
        (lambda: edit.check_mask(torch.ones(8, 8), X), r"mask must be \(1 or 2, 1, 8, 8\), got \(8, 8\)"),
        (lambda: edit.check_mask(torch.full((1, 1, 8, 8), 2.0), X), r"mask must lie in \[0, 1\], got \[2, 2\]"),
        (lambda: edit.inpaint_cond({}, torch.ones(1, 4, 8, 8), X), "mask must be"),
        (lambda: edit.invert(lambda *a: X, X, {}, schedule=Discrete(), steps=3, refine=-1), "refine must be at least"),
        (lambda: edit.invert(lambda *a: X, X, {}, schedule=Discrete(), steps=0), "steps must be a whole number"),
        (lambda: guide.classifier_free(lambda *a: X, {}, 2.0, rescale=1.5), r"rescale must lie in \[0, 1\], got 1.5"),
        (lambda: guide.classifier_free(lambda *a: X, {}, 2.0, interval=(5, 1)), "interval must be"),
        (lambda: guide.projected(lambda *a: X, {}, 2.0, radius=0.0), "radius must be above 0"),
        (lambda: dynamic_threshold(1.5), "quantile must lie in"),
    ],
)
def test_editing_and_guidance(make, message):
    with pytest.raises(ValueError, match=message):
        make()
