"""Exponential integrators in lam = log(alpha / sigma): DPM-Solver, DPM-Solver++, their SDE form, DEIS, UniPC.

With h = lam_b - lam_a, the noise form is x_b = (alpha_b / alpha_a) x_a - alpha_b integral of e^{-lam} noise d lam
(DPM-Solver, arXiv 2206.00927, eq. 3.4), the data form x_b = (sigma_b / sigma_a) x_a + alpha_b integral of
e^{lam - lam_b} x_0 d lam (DPM-Solver++, arXiv 2211.01095, eq. 9). The integrand's smooth factor is interpolated through
known estimates; the integral is then exact. Into the data (sigma_b = 0, h infinite) both leave x_0.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ldm.sampling.quadrature import weights
from ldm.sampling.registry import sampler
from ldm.sampling.run import Node, Run, implied_noise

SOLVER = "DPM-Solver, arXiv 2206.00927"
PLUS = "DPM-Solver++, arXiv 2211.01095"
Known = list[tuple[Node, Tensor]]
"""(node, estimate there) of each point of the interpolation, the newest first."""


def step(x: Tensor, a: Node, b: Node, known: Known, data: bool, exact: bool = False) -> Tensor:
    """x at b from x at a. Two points take the papers' midpoint rule (or the `exact` integral), three the parabola's.

    Published code for three points of the past halves the second difference (the term is f'' / 2 twice over), which
    costs it the third order; see the tests of convergence.
    """
    total = -math.expm1(a.lam - b.lam) if data else -b.sigma / b.alpha * math.expm1(b.lam - a.lam)
    scale = b.sigma / a.sigma if data else b.alpha / a.alpha
    if len(known) == 1:
        parts = [total]
    elif len(known) == 2 and not exact:
        slope = 0.5 * total * (b.lam - a.lam) / (known[0][0].lam - known[1][0].lam)
        first = known[0][0] is a
        parts = [total + slope, -slope] if first else [slope, total - slope]
    else:
        lams = [n.lam for n, _ in known]
        parts = weights(lams, a.lam, b.lam, (lambda v: math.exp(v - b.lam)) if data else (lambda v: -math.exp(-v)))
    out = scale * x
    for part, (_, estimate) in zip(parts, known):
        out = out + b.alpha * part * estimate
    return out


def _multistep(run: Run, x: Tensor, order: int, data: bool) -> Tensor:
    known: Known = []
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        known = [(a, x0 if data else implied_noise(x, x0, a)), *known][: run.order(i, order)]
        if b.sigma == 0 or a.alpha == 0:
            x = b.alpha * x0 + b.sigma * implied_noise(x, x0, a)
        else:
            x = step(x, a, b, known, data)
        run.done(i, x)
        known = known if a.alpha > 0 else []
        known = [*known][: order - 1]
    return x


def single_orders(steps: int, order: int, into_data: bool) -> list[int]:
    """The order of each step of a singlestep solver: groups of `order`, the last 1 if into the data."""
    group = list(range(1, order + 1))
    full, rest = divmod(steps, order)
    if rest == 0 and into_data and order > 1:
        return group * (full - 1) + [*range(1, order), 1]
    return group * full + list(range(1, rest + 1))


def _singlestep(run: Run, x: Tensor, order: int, data: bool) -> Tensor:
    """Each group starts over from its first node, whose state is the anchor; inner nodes are nodes of the path.

    Alg. 2 of DPM-Solver integrates the line through its first two points exactly, alg. 1 takes the midpoint rule.
    """
    skipped = 1 if run.nodes[0].alpha == 0 else 0  # lam is infinite there: a group of its own
    orders = [1] * skipped + single_orders(len(run.nodes) - 1 - skipped, order, run.nodes[-1].sigma == 0)
    anchor, origin = x, run.nodes[0]
    known: Known = []
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        if orders[i] == 1:
            anchor, origin, known = x, a, []
        known = [(a, x0 if data else implied_noise(x, x0, a)), *known]
        if b.sigma == 0 or a.alpha == 0:
            x = b.alpha * x0 + b.sigma * implied_noise(x, x0, a)
        else:
            x = step(anchor, origin, b, known, data, exact=order == 3)
        run.done(i, x)
    return x


@sampler("dpm_solver_1", paper=f"{SOLVER}, eq. 3.7", order=1, spacing="open")
def dpm_solver_1(run: Run, x: Tensor, eta: float) -> Tensor:
    return _multistep(run, x, 1, data=False)


@sampler("dpm_solver_2m", paper=f"{SOLVER}, multistep as in {PLUS}, app. B", order=2, spacing="open")
def dpm_solver_2m(run: Run, x: Tensor, eta: float) -> Tensor:
    return _multistep(run, x, 2, data=False)


@sampler("dpm_solver_3m", paper=f"{SOLVER}, multistep as in {PLUS}, app. B", order=3, spacing="open")
def dpm_solver_3m(run: Run, x: Tensor, eta: float) -> Tensor:
    return _multistep(run, x, 3, data=False)


@sampler("dpm_solver_2s", paper=f"{SOLVER}, alg. 1 (inner points on the path)", order=2, spacing="open")
def dpm_solver_2s(run: Run, x: Tensor, eta: float) -> Tensor:
    return _singlestep(run, x, 2, data=False)


@sampler("dpm_solver_3s", paper=f"{SOLVER}, alg. 2 (inner points on the path)", order=3, spacing="open")
def dpm_solver_3s(run: Run, x: Tensor, eta: float) -> Tensor:
    return _singlestep(run, x, 3, data=False)


@sampler("dpmpp_2s", paper=f"{PLUS}, alg. 1 (inner points on the path)", order=2, spacing="open")
def dpmpp_2s(run: Run, x: Tensor, eta: float) -> Tensor:
    return _singlestep(run, x, 2, data=True)


@sampler("dpmpp_2m", paper=f"{PLUS}, alg. 2", order=2, spacing="open")
def dpmpp_2m(run: Run, x: Tensor, eta: float) -> Tensor:
    return _multistep(run, x, 2, data=True)


@sampler("dpmpp_3m", paper=f"{PLUS}, app. B with the exact third term", order=3, spacing="open")
def dpmpp_3m(run: Run, x: Tensor, eta: float) -> Tensor:
    return _multistep(run, x, 3, data=True)


@sampler("deis", paper="DEIS tAB in log rho, arXiv 2204.13902, eq. 15", order=3, spacing="open")
def deis(run: Run, x: Tensor, eta: float) -> Tensor:
    """As DPM-Solver in its noise form with every order's integral exact, also the second's."""
    known: Known = []
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        noise = implied_noise(x, x0, a)
        known = [(a, noise), *known][: run.order(i, 3)]
        if b.sigma == 0 or a.alpha == 0:
            x = b.alpha * x0 + b.sigma * noise
        else:
            parts = weights([n.lam for n, _ in known], a.lam, b.lam, lambda v: -math.exp(-v))
            x = b.alpha / a.alpha * x
            for part, (_, estimate) in zip(parts, known):
                x = x + b.alpha * part * estimate
        known = known[:2] if a.alpha > 0 else []
        run.done(i, x)
    return x


@sampler("dpmpp_2m_sde", paper=f"SDE-{PLUS}, eq. 16", order=2, stochastic=True, spacing="open")
def dpmpp_2m_sde(run: Run, x: Tensor, eta: float) -> Tensor:
    old: tuple[Node, Tensor] | None = None
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        fade = math.exp(2 * (a.lam - b.lam))  # e^{-2h}
        estimate = x0
        if old is not None and run.order(i, 2) == 2:
            ratio = (b.lam - a.lam) / (a.lam - old[0].lam)
            estimate = x0 + 0.5 * ratio * (x0 - old[1])
        x = b.sigma / a.sigma * math.sqrt(fade) * x + b.alpha * (1 - fade) * estimate
        if b.sigma > 0 and fade < 1:
            x = x + b.sigma * math.sqrt(1 - fade) * run.noise(i, x)
        old = (a, x0)
        run.done(i, x)
    return x


def unipc_parts(places: list[float], h: float, corrector: bool) -> list[float]:
    """UniPC's B_2(h) coefficients in the data form for points at `places` (in units of h, before 0), and 1 last.

    arXiv 2302.04867, eqs. 5 and 6; one point takes the paper's 1/2.
    """
    rows = [*places, 1.0]
    size = len(rows) if corrector else len(places)
    if size == 0:
        return []
    if size == 1:
        return [0.5]
    scale, phi, factorial = math.expm1(-h), math.expm1(-h) / -h - 1, 1.0
    right = []
    for k in range(1, size + 1):
        right.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    left = np.array([[r**k for r in rows[:size]] for k in range(size)])
    return np.linalg.solve(left, np.array(right)).tolist()


def _unipc_step(x: Tensor, a: Node, b: Node, known: Known, ahead: Tensor | None) -> Tensor:
    """Predictor (UniP) from a to b, or the corrector (UniC) if the estimate `ahead` at b is known."""
    h = b.lam - a.lam
    scale = math.expm1(-h)
    base = known[0][1]
    out = b.sigma / a.sigma * x - b.alpha * scale * base
    places = [(n.lam - a.lam) / h for n, _ in known[1:]]
    parts = unipc_parts(places, h, ahead is not None)
    for part, place, (_, estimate) in zip(parts, places, known[1:]):
        out = out - b.alpha * scale * part / place * (estimate - base)
    return out if ahead is None else out - b.alpha * scale * parts[-1] * (ahead - base)


def _unipc(run: Run, x: Tensor, order: int) -> Tensor:
    known: Known = []  # used by the last predictor
    before = x
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        if i > 0 and run.nodes[i - 1].alpha > 0:
            x = _unipc_step(before, run.nodes[i - 1], a, known[: run.order(i - 1, order, settle=None)], x0)
        known = [(a, x0), *known][:order]
        used = run.order(i, order, settle=None)
        before = x
        if b.sigma == 0 or a.alpha == 0:
            x = b.alpha * x0 + b.sigma * implied_noise(x, x0, a)
            known = known if a.alpha > 0 else []
        elif b.sigma < a.sigma:
            x = _unipc_step(x, a, b, known[:used], None)
        run.done(i, x)
    return x


@sampler("unipc", paper="UniPC (B2, data form), arXiv 2302.04867, alg. 7 and 8", order=3, spacing="open")
def unipc(run: Run, x: Tensor, eta: float) -> Tensor:
    """Order 2 of the predictor; the corrector adds one."""
    return _unipc(run, x, 2)


@sampler("unipc_3", paper="UniPC (B2, data form), arXiv 2302.04867, alg. 7 and 8", order=4, spacing="open")
def unipc_3(run: Run, x: Tensor, eta: float) -> Tensor:
    """Order 3 of the predictor; the corrector adds one."""
    return _unipc(run, x, 3)
