"""Pseudo numerical methods (PNDM, arXiv 2202.09778): classical formulas for the noise in DDIM's transfer (eq. 11)."""

from __future__ import annotations

from torch import Tensor

from ldm.sampling.registry import sampler
from ldm.sampling.run import Node, Run, implied_noise
from ldm.sampling.solvers import flow, place

_ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _transfer(x: Tensor, x0: Tensor, noise: Tensor, a: Node, b: Node) -> Tensor:
    """From a to b along `noise`; where a is pure noise, or b the data, through x_0 instead."""
    return flow(x, noise, a, b) if a.alpha > 0 and b.sigma > 0 else place(x0, noise, b)


def _adams(past: list[Tensor]) -> Tensor:
    """Adams-Bashforth of up to four noises, the newest first, as if evenly spaced (eq. 12)."""
    parts = _ADAMS[len(past) - 1]
    out = parts[0] * past[0]
    for part, noise in zip(parts[1:], past[1:]):
        out = out + part * noise
    return out


@sampler("pndm", paper="PNDM, arXiv 2202.09778, alg. 2 (Runge-Kutta, then multistep)", order=2, end="first")
def pndm(run: Run, x: Tensor, eta: float) -> Tensor:
    """The first three steps cost four network calls each."""
    past: list[Tensor] = []
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        noise = implied_noise(x, x0, a)
        past = [noise, *past][:4]
        if i < 3 and a.alpha > 0 and b.sigma > 0:
            x = _runge_kutta(run, x, noise, a, b)
        else:
            x = _transfer(x, x0, _adams(past), a, b)
        run.done(i, x)
    return x


def _runge_kutta(run: Run, x: Tensor, first: Tensor, a: Node, b: Node) -> Tensor:
    """The pseudo Runge-Kutta step (eq. 13) with the middle halfway in time."""
    time = (a.t + b.t) / 2
    middle = Node(time, *run.schedule.at(time))
    second = run.noise_at(flow(x, first, a, middle), middle)
    third = run.noise_at(flow(x, second, a, middle), middle)
    fourth = run.noise_at(flow(x, third, a, b), b)
    return flow(x, (first + 2 * second + 2 * third + fourth) / 6, a, b)


@sampler("plms", paper="PNDM without Runge-Kutta, arXiv 2202.09778, as in LDM", order=2, end="first")
def plms(run: Run, x: Tensor, eta: float) -> Tensor:
    """The first step costs two network calls: a trapezium instead of a past."""
    past: list[Tensor] = []
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        noise = implied_noise(x, x0, a)
        past = [noise, *past][:4]
        if i == 0 and a.alpha > 0 and b.sigma > 0:
            x = flow(x, (noise + run.noise_at(flow(x, noise, a, b), b)) / 2, a, b)
        else:
            x = _transfer(x, x0, _adams(past), a, b)
        run.done(i, x)
    return x
