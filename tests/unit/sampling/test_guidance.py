"""Guidance in closed form: linear denoisers, Gaussian data, and how often the network is called."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion import Discrete, Epsilon, Process, Sample
from ldm.sampling.guidance import classifier_free, of_text_and_picture, perpendicular, project, projected, similarity

SHAPE = (3, 2, 4, 4)
T = torch.tensor([100.0, 500.0, 900.0])


class Network:
    """x_0 = 0.5 x + text, remembering the batch of each call."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, cond):
        self.batches.append(len(x))
        return 0.5 * x + cond["text"][:, :, None, None]


def parts():
    x = torch.randn(SHAPE)
    return x, {"text": torch.randn(3, 2)}, {"text": torch.randn(1, 2)}, {"text": torch.randn(1, 2)}


def plain(x, cond):
    return 0.5 * x + cond["text"][:, :, None, None]


def test_classifier_free_is_one_doubled_call():
    network, (x, cond, uncond, _) = Network(), parts()
    got = classifier_free(network, uncond, 7.5)(x, T, cond)
    c, u = plain(x, cond), plain(x, uncond)
    assert torch.allclose(got, u + 7.5 * (c - u), atol=1e-5)
    assert network.batches == [6]


def test_a_learned_variance_stays_the_prompts_own():
    """One doubled call; the mean is guided, the fraction is that of the conditional rows."""
    network, (x, cond, uncond, _) = Network(), parts()

    def net(x, t, cond):
        return torch.cat([network(x, t, cond), torch.tanh(x + cond["text"][:, :, None, None])], 1)

    process = Process(prediction=Sample(), variance="learned")
    mean, fraction = classifier_free(process.denoiser(net), uncond, 3.0).both(x, T, cond)
    c, u = plain(x, cond), plain(x, uncond)
    assert torch.allclose(mean, u + 3 * (c - u), atol=1e-5)
    assert torch.allclose(fraction, torch.tanh(x + cond["text"][:, :, None, None]), atol=1e-6)
    assert network.batches == [6]


def test_rows_that_differ_in_more_than_their_text_are_not_called_copies():
    network, (x, cond, uncond, negative) = Network(), parts()
    seen = []

    def net(x, t, c):
        seen.append(c["copies"].shape[0] if "copies" in c else 1)
        return network(x, t, c)

    perpendicular(net, uncond, negative, 2.0)(x, T, cond)
    sizes = {"time_ids": torch.zeros(1, 6)}
    classifier_free(net, {**uncond, **sizes}, 2.0)(x, T, {**cond, "time_ids": torch.ones(3, 6)})
    assert seen == [3, 1]


def test_scale_1_costs_nothing():
    network, (_, _, uncond, _) = Network(), parts()
    assert classifier_free(network, uncond, 1.0) is network


def test_guidance_of_x0_is_guidance_of_the_noise():
    """The papers combine noises; at fixed x that is the same."""
    network, (x, cond, uncond, _) = Network(), parts()
    alpha, sigma = Discrete().alpha_sigma(T, torch.float64)
    wide = x.double()
    noises = [
        Epsilon().target(
            plain(x, c), (wide - alpha.view(-1, 1, 1, 1) * plain(x, c)) / sigma.view(-1, 1, 1, 1), alpha, sigma
        )
        for c in (cond, uncond)
    ]
    want = Epsilon().x0(noises[1] + 7.5 * (noises[0] - noises[1]), wide, alpha, sigma)
    assert torch.allclose(classifier_free(network, uncond, 7.5)(x, T, cond).double(), want, atol=1e-4)


def test_sizes_of_the_prompt_serve_the_empty_one():
    x, cond, uncond, _ = parts()
    seen = {}

    def net(x, t, c):
        seen.update(c)
        return x

    classifier_free(net, uncond, 2.0)(x, T, {**cond, "time_ids": torch.arange(18.0).view(3, 6)})
    assert seen["copies"].shape == (2, 0)
    assert torch.equal(seen["time_ids"], torch.arange(18.0).view(3, 6).repeat(2, 1))
    with pytest.raises(ValueError, match=r"cond 'text' has batch 2, expected 1 or 3"):
        classifier_free(net, {"text": torch.zeros(2, 2)}, 2.0)(x, T, cond)


def test_rescale_restores_the_deviation():
    x, cond, uncond, _ = parts()
    got = classifier_free(Network(), uncond, 7.5, rescale=1.0)(x, T, cond)
    assert torch.allclose(got.std((1, 2, 3)), plain(x, cond).std((1, 2, 3)), rtol=1e-4)
    half = classifier_free(Network(), uncond, 7.5, rescale=0.5)(x, T, cond)
    none = classifier_free(Network(), uncond, 7.5)(x, T, cond)
    assert torch.allclose(half, (got + none) / 2, atol=1e-5)


def test_interval():
    x, cond, uncond, _ = parts()
    got = classifier_free(Network(), uncond, 3.0, interval=(200, 600))(x, T, cond)
    c, u = plain(x, cond), plain(x, uncond)
    assert torch.allclose(got[[0, 2]], c[[0, 2]])
    assert torch.allclose(got[1], (u + 3 * (c - u))[1], atol=1e-6)


def test_text_and_picture_have_scales_of_their_own():
    """InstructPix2Pix, eq. 3, in one call of three times the batch; a scale of 1 twice is no guidance."""
    network, (x, cond, uncond, _) = Network(), parts()
    picture = torch.randn(SHAPE)

    def denoise(x, t, cond):
        return network(x, t, cond) + cond["concat"] * (1 + cond["text"][:, :1, None, None])

    def estimate(text, shown):
        return plain(x, text) + shown * (1 + text["text"][:, :1, None, None])

    got = of_text_and_picture(denoise, uncond, 7.5, 1.5)(x, T, cond | {"concat": picture})
    full, alone, none = estimate(cond, picture), estimate(uncond, picture), estimate(uncond, 0 * picture)
    assert torch.allclose(got, none + 1.5 * (alone - none) + 7.5 * (full - alone), atol=1e-5)
    assert network.batches == [9]
    assert of_text_and_picture(denoise, uncond, 1.0, 1.0) is denoise
    got = of_text_and_picture(denoise, uncond, 7.5, 1.5, interval=(400.0, 600.0))(x, T, cond | {"concat": picture})
    assert torch.allclose(got[[0, 2]], full[[0, 2]], atol=1e-6)
    with pytest.raises(ValueError, match="the network is told none"):
        of_text_and_picture(denoise, uncond, 7.5, 1.5)(x, T, cond)


def test_projected():
    x, cond, uncond, _ = parts()
    c, u = plain(x, cond), plain(x, uncond)
    whole = projected(Network(), uncond, 5.0, parallel=1.0)(x, T, cond)
    assert torch.allclose(whole, u + 5 * (c - u), atol=1e-5)
    across = projected(Network(), uncond, 5.0)(x, T, cond) - c
    assert torch.allclose((across * c).sum((1, 2, 3)), torch.zeros(3), atol=1e-3)
    short = projected(Network(), uncond, 5.0, parallel=1.0, radius=0.1)(x, T, cond) - c
    assert torch.allclose(short.flatten(1).norm(dim=1), torch.full((3,), 0.4), atol=1e-5)


def test_perpendicular():
    """A negative prompt along the prompt does nothing; one across it is pushed away in full."""
    network, (x, cond, uncond, negative) = Network(), parts()
    cond = {"text": cond["text"][:1].expand(3, 2)}
    c, u = plain(x, cond), plain(x, uncond)
    along = {"text": uncond["text"] + 2 * (cond["text"][:1] - uncond["text"])}
    got = perpendicular(network, uncond, along, 4.0)(x, T, cond)
    assert torch.allclose(got, u + 4 * (c - u), atol=1e-5)
    assert network.batches == [9]
    n = plain(x, negative)
    got = perpendicular(network, uncond, negative, 4.0)(x, T, cond)
    away = n - u - project(n - u, c - u)
    assert torch.allclose(got, u + 4 * (c - u - away), atol=1e-5)
    assert torch.allclose((away * (c - u)).sum((1, 2, 3)), torch.zeros(3), atol=1e-4)


STD, TAU = 0.6, 0.8


def gaussian(x, t, cond):
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in Discrete().alpha_sigma(t, torch.float64))
    return alpha * STD**2 * x / (alpha**2 * STD**2 + sigma**2)


@pytest.mark.parametrize("through", [True, False])
def test_similarity_is_classifier_guidance(through):
    """score = log N(y | x_0, tau^2): x_0 moves by Cov[x_0 | x] (y - x_0) / tau^2, also under no_grad."""
    x, y = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in Discrete().alpha_sigma(T, torch.float64))

    def score(pixels):
        return -((pixels / 2 - y) ** 2).flatten(1).sum(1) / (2 * TAU**2)

    steer = similarity(gaussian, score, 3.0, schedule=Discrete(), decode=lambda x0: 2 * x0, through_network=through)
    with torch.no_grad():
        got = steer(x, T, {})
    x0 = gaussian(x, T, {})
    assert not got.requires_grad
    covariance = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2) if through else sigma**2 / (alpha**2 + sigma**2)
    assert torch.allclose(got, x0 + 3 * covariance * (y - x0) / TAU**2, atol=1e-5)
    assert similarity(gaussian, score, 0.0, schedule=Discrete()) is gaussian
    with pytest.raises(ValueError, match="score must give one value per sample"):
        similarity(gaussian, lambda p: p.sum(), 1.0, schedule=Discrete())(x, T, {})
