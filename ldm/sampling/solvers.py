"""Solvers that are ancestral or live in sigma / alpha: DDPM, DDIM, Euler, Heun, KDPM2, LMS, LCM, TCD.

Each is a function (run, x, eta) -> sample over `run.pairs`. In the variable z = x / alpha with r = sigma / alpha the
probability-flow ODE is dz/dr = noise (EDM, eq. 1), so one Euler step is DDIM's (arXiv 2010.02502, eq. 13).
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.process import LearnedDenoise, interpolate_log_variance, posterior
from ldm.sampling.quadrature import weights
from ldm.sampling.registry import sampler
from ldm.sampling.run import Node, Run, implied_noise


def flow(x: Tensor, noise: Tensor, a: Node, b: Node) -> Tensor:
    """x at b if the noise were constant from a: (alpha_b / alpha_a) x + (sigma_b - sigma_a alpha_b / alpha_a) noise."""
    scale = b.alpha / a.alpha
    return scale * x + (b.sigma - a.sigma * scale) * noise


def place(x0: Tensor, noise: Tensor, b: Node) -> Tensor:
    """alpha_b x_0 + sigma_b noise: the same step as `flow`, fit for alpha_a = 0."""
    return b.alpha * x0 + b.sigma * noise if b.sigma > 0 else b.alpha * x0


def _ddpm(run: Run, x: Tensor, variance: str) -> Tensor:
    for i, a, b in run.pairs:
        q = posterior(a.alpha, a.sigma, b.alpha, b.sigma)
        x = q.on_x * x + q.on_x0 * run.x0(x, a)
        if b.sigma > 0:
            x = x + math.sqrt(q.large if variance == "large" else q.small) * run.noise(i, x)
        run.done(i, x)
    return x


@sampler("ddpm", paper="DDPM, arXiv 2006.11239, alg. 2 (variance beta_tilde)", order=1, stochastic=True)
def ddpm(run: Run, x: Tensor, eta: float) -> Tensor:
    return _ddpm(run, x, "small")


@sampler("ddpm_large", paper="DDPM, arXiv 2006.11239, alg. 2 (variance beta)", order=1, stochastic=True)
def ddpm_large(run: Run, x: Tensor, eta: float) -> Tensor:
    return _ddpm(run, x, "large")


@sampler("ddpm_learned", paper="Improved DDPM, arXiv 2102.09672, eq. 15", order=1, stochastic=True)
def ddpm_learned(run: Run, x: Tensor, eta: float) -> Tensor:
    if not isinstance(run.denoise, LearnedDenoise):
        raise ValueError("sampler 'ddpm_learned' needs a denoiser from Process.learned_denoiser")
    for i, a, b in run.pairs:
        q = posterior(a.alpha, a.sigma, b.alpha, b.sigma)
        raw, fraction = run.denoise.both(x, run.times(x, a), run.cond)
        run.watch(raw)
        x = q.on_x * x + q.on_x0 * run.clipped(raw)
        if b.sigma > 0:
            small, large = (fraction.new_tensor(v) for v in (q.small, q.large))
            spread = (0.5 * interpolate_log_variance(fraction, small, large)).exp()
            x = x + spread * run.noise(i, x)
        run.done(i, x)
    return x


@sampler(
    "ddim",
    paper="DDIM, arXiv 2010.02502, eq. 12",
    order=1,
    stochastic=False,
    eta_range=(0.0, 1.0),
)
def ddim(run: Run, x: Tensor, eta: float) -> Tensor:
    for i, a, b in run.pairs:
        x0, noise = run.both(x, a)
        x = _ddim_step(run, i, x0, noise, a, b, eta)
        run.done(i, x)
    return x


def _ddim_step(run: Run, i: int, x0: Tensor, noise: Tensor, a: Node, b: Node, eta: float) -> Tensor:
    """eta 0 is the ODE, eta 1 DDPM's variance beta_tilde (eq. 16)."""
    spread = eta * math.sqrt(max(posterior(a.alpha, a.sigma, b.alpha, b.sigma).small, 0.0))
    if spread == 0:
        return place(x0, noise, b)
    keep = math.sqrt(max(b.sigma**2 - spread**2, 0.0))
    return b.alpha * x0 + keep * noise + spread * run.noise(i, x0)


@sampler("euler", paper="EDM, arXiv 2206.00364, alg. 1 without correction", order=1, spacing="even")
def euler(run: Run, x: Tensor, eta: float) -> Tensor:
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        x = place(x0, implied_noise(x, x0, a), b)
        run.done(i, x)
    return x


@sampler(
    "euler_ancestral",
    paper="k-diffusion's ancestral step, Score SDE, arXiv 2011.13456, appendix F",
    order=1,
    stochastic=True,
    spacing="even",
    eta=1.0,
    eta_range=(0.0, 1.0),
)
def euler_ancestral(run: Run, x: Tensor, eta: float) -> Tensor:
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        x = _ddim_step(run, i, x0, implied_noise(x, x0, a), a, b, eta)
        run.done(i, x)
    return x


@sampler("heun", paper="EDM, arXiv 2206.00364, alg. 1", order=2, cost=2, spacing="even")
def heun(run: Run, x: Tensor, eta: float) -> Tensor:
    """On flows in x and sigma, where a constant velocity is exact (as diffusers' FlowMatchHeun has it)."""
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        first = implied_noise(x, x0, a)
        ahead = place(x0, first, b)
        if b.sigma > 0 and not run.schedule.discrete:
            clean = run.x0(ahead, b)
            velocity = first - x0 + implied_noise(ahead, clean, b) - clean
            ahead = x + (b.sigma - a.sigma) / 2 * velocity
        elif b.sigma > 0 and a.alpha > 0:
            ahead = flow(x, (first + run.noise_at(ahead, b)) / 2, a, b)
        x = ahead
        run.done(i, x)
    return x


@sampler("kdpm2", paper="DPM-Solver-2 as in EDM's code, arXiv 2206.00364, appendix", order=2, cost=2, spacing="even")
def kdpm2(run: Run, x: Tensor, eta: float) -> Tensor:
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        first = implied_noise(x, x0, a)
        if b.sigma > 0 and a.alpha > 0:
            middle = run.at_lam((a.lam + b.lam) / 2)
            x = flow(x, run.noise_at(place(x0, first, middle), middle), a, b)
        else:
            x = place(x0, first, b)
        run.done(i, x)
    return x


@sampler("lms", paper="Linear multistep (Adams-Bashforth) in sigma, k-diffusion", order=4, spacing="even")
def lms(run: Run, x: Tensor, eta: float) -> Tensor:
    past: list[Tensor] = []
    ratios: list[float] = []
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        noise = implied_noise(x, x0, a)
        if a.alpha == 0:  # z is infinite there: one Euler step, and no past
            x = place(x0, noise, b)
        else:
            past, ratios = [noise, *past][:4], [a.ratio, *ratios][:4]
            parts = weights(ratios, a.ratio, b.ratio)
            x = b.alpha / a.alpha * x + b.alpha * sum((w * n for w, n in zip(parts, past)), start=0 * noise)
        run.done(i, x)
    return x


@sampler(
    "lcm",
    paper="Latent consistency models, arXiv 2310.04378, alg. 3",
    order=1,
    stochastic=True,
    spacing="lcm",
)
def lcm(run: Run, x: Tensor, eta: float) -> Tensor:
    """On flows without the boundary's factors, as diffusers' FlowMatchLCM; from t = 16 on they are within 1e-5."""
    for i, a, b in run.pairs:
        skip, out = lcm_boundary(a.t) if run.schedule.discrete else (0.0, 1.0)
        clean = out * run.x0(x, a) + skip * x
        last = i == len(run.nodes) - 2
        x = clean if last else place(clean, run.noise(i, x), b)
        run.done(i, x)
    return x


def lcm_boundary(t: float, scaling: float = 10.0, data: float = 0.5) -> tuple[float, float]:
    """(c_skip, c_out) of a consistency function, 1 and 0 at t = 0 (arXiv 2310.04378, section 4.1)."""
    scaled = t * scaling
    return data**2 / (scaled**2 + data**2), scaled / math.sqrt(scaled**2 + data**2)


@sampler(
    "tcd",
    paper="Trajectory consistency distillation, arXiv 2402.19159, alg. 2 (eta is gamma)",
    order=1,
    stochastic=True,
    spacing="lcm",
    end="first",
    eta=0.3,
    eta_range=(0.0, 1.0),
)
def tcd(run: Run, x: Tensor, eta: float) -> Tensor:
    for i, a, b in run.pairs:
        x0, noise = run.both(x, a)
        if i == len(run.nodes) - 2:
            x = place(x0, noise, b)
        else:
            time = (1 - eta) * b.t
            time = math.floor(time + 1e-9) if run.schedule.discrete else time
            middle = Node(time, *run.schedule.at(time))
            x = place(x0, noise, middle)
            if eta > 0:
                scale = b.alpha / middle.alpha
                spread = math.sqrt(max(b.sigma**2 - (scale * middle.sigma) ** 2, 0.0))
                x = scale * x + spread * run.noise(i, x)
        run.done(i, x)
    return x
