"""Exponential integrators in lam = log(alpha / sigma): DPM-Solver, DPM-Solver++, their SDE form, UniPC, DEIS.

With h = lam_b - lam_a the noise form is x_b = (alpha_b / alpha_a) x_a - sigma_b integral e^{...} noise (DPM-Solver,
arXiv 2206.00927, eq. 3.4) and the data form x_b = (sigma_b / sigma_a) x_a + alpha_b integral e^{-...} x_0
(DPM-Solver++, arXiv 2211.01095, eq. 9). At the data end (sigma_b = 0, h infinite) both leave x_0.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.sampling.registry import sampler
from ldm.sampling.run import Node, Run


def data_step(x: Tensor, x0: Tensor, a: Node, b: Node, slope: Tensor | None = None) -> Tensor:
    """First order in the data form, plus the second-order term for `slope` = h/2 times d x_0 / d lam."""
    grown = -math.expm1(a.lam - b.lam)  # 1 - e^{-h}
    estimate = x0 if slope is None else x0 + slope
    return b.sigma / a.sigma * x + b.alpha * grown * estimate


@sampler("dpmpp_2m", paper="DPM-Solver++ 2M, arXiv 2211.01095, alg. 2", order=2, spacing="open")
def dpmpp_2m(run: Run, x: Tensor, eta: float) -> Tensor:
    old: tuple[Node, Tensor] | None = None
    for i, a, b in run.pairs:
        x0 = run.x0(x, a)
        slope = None
        if old is not None and run.order(i, 2) == 2:
            ratio = (a.lam - old[0].lam) / (b.lam - a.lam)
            slope = (x0 - old[1]) / (2 * ratio)
        x = data_step(x, x0, a, b, slope)
        old = (a, x0)
        run.done(i, x)
    return x
