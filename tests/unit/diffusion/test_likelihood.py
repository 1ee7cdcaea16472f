"""The variational bound where the truth is known: Gaussian data, in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.diffusion import Discrete, Process, bound, hybrid_loss, posterior
from ldm.diffusion.likelihood import discrete_nll, first_variance, gaussian_nll, normal_kl, variance_term
from ldm.diffusion.process import interpolate_log_variance

SCHEDULE = Discrete(steps=50, beta_start=0.002, beta_end=0.2)
PROCESS = Process(schedule=SCHEDULE)
SHAPE = (40, 1, 40, 40)


def draws(i):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(10 + i), dtype=torch.float64)


def exact(std):
    """E[x_0 | x_t] for data N(0, std^2)."""

    def denoise(x, t, cond):
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in SCHEDULE.alpha_sigma(t, torch.float64))
        return alpha * std**2 * x / (alpha**2 * std**2 + sigma**2)

    return denoise


def expected(std, times, variance):
    """The expectation of every term for the exact denoiser, nats per dimension: (prior, steps, decoder)."""
    terms = []
    for i, t in enumerate(times):
        alpha, sigma = SCHEDULE.at(t)
        before = SCHEDULE.at(times[i - 1]) if i else (1.0, 0.0)
        q = posterior(alpha, sigma, *before)
        error = q.on_x0**2 * std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)
        small = q.small if i else first_variance(SCHEDULE, times)
        v = small if variance == "small" else q.large
        if i:
            terms.append(0.5 * (q.small / v - 1 + math.log(v / q.small) + error / v))
        else:
            terms.append(0.5 * (math.log(2 * math.pi * v) + error / v))
    alpha, sigma = SCHEDULE.at(times[-1])
    prior = 0.5 * (alpha**2 * std**2 + sigma**2 - 1 - math.log(sigma**2))
    return prior, terms[1:], terms[0]


@pytest.mark.parametrize("times", [[float(t) for t in range(50)], [0.0, 3.0, 10.0, 24.0, 49.0]])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("std", [0.3, 1.0])
def test_terms_in_closed_form(std, variance, times):
    x0 = std * draws(-1)
    got = bound(PROCESS, exact(std), x0, {}, noise=draws, times=times, variance=variance, bins=None)
    prior, steps, decoder = expected(std, times, variance)
    assert float(got.prior.mean()) / 1600 == pytest.approx(prior, rel=0.05, abs=1e-4)
    assert float(got.decoder.mean()) / 1600 == pytest.approx(decoder, abs=0.015)
    for mine, want in zip(got.steps.mean(0) / 1600, steps):
        assert float(mine) == pytest.approx(want, rel=0.03, abs=1e-5)
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    assert prior + sum(steps) + decoder > entropy - 1e-9
    assert float(got.total.mean()) / 1600 > entropy - 0.02
    assert torch.allclose(got.bits_per_dim, got.total / 1600 / math.log(2))


def test_white_data_reach_the_truth():
    """Data N(0, 1): with variance beta the reverse chain is exact, so the bound is the entropy, strided or not."""
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    for times in ([float(t) for t in range(50)], [0.0, 7.0, 30.0, 49.0]):
        prior, steps, decoder = expected(1.0, times, "large")
        assert prior + sum(steps) + decoder == pytest.approx(entropy, abs=1e-12)
        got = bound(PROCESS, exact(1.0), draws(-1), {}, noise=draws, times=times, variance="large", bins=None)
        assert float(got.total.mean()) / 1600 == pytest.approx(entropy, abs=0.01)


def optimal(std):
    """A network whose learned variance is the true one of data N(0, std^2), so that its chain is exact."""

    def net(x, t, cond):
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in SCHEDULE.alpha_sigma(t, torch.float64))
        noise = sigma * x / (alpha**2 * std**2 + sigma**2)
        fraction = []
        for time in t.tolist():
            pair = SCHEDULE.at(time)
            before = SCHEDULE.at(time - 1) if time >= 1 else (1.0, 0.0)
            q = posterior(*pair, *before)
            small = q.small if time >= 1 else first_variance(SCHEDULE, [0.0, 1.0])
            error = q.on_x0**2 * std**2 * pair[1] ** 2 / (pair[0] ** 2 * std**2 + pair[1] ** 2)
            true = (q.small if time >= 1 else 0.0) + error
            fraction.append(2 * math.log(true / small) / math.log(q.large / small) - 1)
        part = torch.tensor(fraction, dtype=x.dtype).view(-1, 1, 1, 1).expand_as(x)
        return torch.cat([noise, part], 1)

    return net


def test_learned_variance_reaches_the_truth():
    """For Gaussian data the right variance makes the bound the entropy plus what the prior misses."""
    std = 0.5
    alpha, sigma = SCHEDULE.at(49)
    last = alpha**2 * std**2 + sigma**2
    truth = 0.5 * math.log(2 * math.pi * math.e * std**2) + 0.5 * (last - 1 - math.log(last))
    denoise = PROCESS.learned_denoiser(optimal(std))
    got = bound(PROCESS, denoise, std * draws(-1), {}, noise=draws, variance="learned", bins=None)
    assert float(got.total.mean()) / 1600 == pytest.approx(truth, abs=0.01)


@pytest.mark.parametrize("mean", [-1.3, -0.2, 0.0, 0.999])
@pytest.mark.parametrize("std", [1e-3, 0.05, 2.0])
@pytest.mark.parametrize("bins", [2, 256])
def test_decoder_is_a_distribution(bins, std, mean):
    """The masses of all levels sum to 1 and are the differences of the distribution function."""
    levels = torch.linspace(-1, 1, bins, dtype=torch.float64)
    log_var = torch.tensor(2 * math.log(std), dtype=torch.float64)
    mass = torch.exp(-discrete_nll(levels, torch.tensor(mean, dtype=torch.float64), log_var, bins))
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-9)
    edges = torch.cat([torch.tensor([-math.inf]), (levels[1:] + levels[:-1]) / 2, torch.tensor([math.inf])])
    assert torch.allclose(mass, torch.special.ndtr((edges - mean) / std).diff(), atol=1e-12)


def test_decoder_far_away_is_finite():
    """float32, a hundred standard deviations off: finite, with a gradient."""
    mean = torch.tensor([-1.0, 0.9, 0.0], requires_grad=True)
    nll = discrete_nll(torch.tensor([1.0, -1.0, 0.5]), mean, torch.tensor(2 * math.log(0.01)))
    nll.sum().backward()
    assert bool(torch.isfinite(nll).all() and torch.isfinite(mean.grad).all())


def test_kl_and_nll_against_torch():
    a, b = torch.distributions.Normal(0.3, 1.7), torch.distributions.Normal(-0.5, 0.6)
    kl = normal_kl(a.mean, 2 * a.scale.log(), b.mean, 2 * b.scale.log())
    assert float(kl) == pytest.approx(float(torch.distributions.kl_divergence(a, b)), rel=1e-6)
    assert float(gaussian_nll(torch.tensor(2.0), a.mean, 2 * a.scale.log())) == pytest.approx(
        -float(a.log_prob(torch.tensor(2.0))), rel=1e-6
    )


def half(x):
    return x.float()[:3, :, :4, :4]


def test_hybrid_loss_is_simple_plus_the_bound():
    """T times its second term, over all t, is the bound without the prior; its gradient spares the mean."""
    x0 = (half(draws(-1)) / 3).clamp(-1, 1)
    mix = torch.tensor([[0.4], [0.3]])

    def net(x, t, cond):
        return torch.sin(torch.einsum("oi,bihw->bohw", mix, x) + t.view(-1, 1, 1, 1) / 50)

    got = bound(PROCESS, PROCESS.learned_denoiser(net), x0, {}, noise=lambda i: half(draws(i)), variance="learned")
    total = torch.zeros(3)
    for t in range(50):
        noise, time = half(draws(t)), torch.full((3,), t)
        mean, fraction = net(PROCESS.add_noise(x0, noise, time), time.float(), {}).chunk(2, 1)
        total += variance_term(PROCESS, mean, fraction, x0, noise, time)
    want = (got.total - got.prior) / 16 / math.log(2)
    assert torch.allclose(total, want, rtol=1e-3)
    out = torch.randn(3, 2, 4, 4).requires_grad_()
    time, noise = torch.tensor([0, 7, 49]), half(draws(0))
    loss = hybrid_loss(PROCESS, out, x0, noise, time, weight=1.0)
    loss.sum().backward()
    plain = out.detach()[:, :1].clone().requires_grad_()
    PROCESS.loss(plain, x0, noise, time).sum().backward()
    assert torch.equal(out.grad[:, :1], plain.grad)
    assert float(out.grad[:, 1:].abs().min()) > 0


def test_interpolation_ends():
    value = interpolate_log_variance(torch.tensor(-1.0), torch.tensor(0.5), torch.tensor(2.0))
    assert float(value.exp()) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": [3.0, 1.0]}, "strictly increasing"),
        ({"times": []}, "not empty"),
        ({"variance": "odd"}, "variance 'odd' is not one of"),
        ({"variance": "learned"}, "needs a denoiser from Process.learned_denoiser"),
        ({"bins": 1}, "bins must be at least 2"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bound(PROCESS, exact(1.0), half(draws(0)), {}, noise=lambda i: half(draws(i)), **options)
