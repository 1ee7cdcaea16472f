"""Distances between two sets of features: Fréchet distance, KID, precision and recall; float64 throughout.

Only on Inception features is the Fréchet distance called FID. Its bias falls with the number of pictures: two figures
compare at equal counts only, and below a few thousand pictures KID, which has no bias, is the one to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.metrics import worth
from ldm.rng import generator

SUBSET = 1000
"""Pictures of one of the kernel distance's subsets."""
_EXACT, _COARSE = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D) of features, with their count."""

    mean: Tensor
    covariance: Tensor
    count: int

    @staticmethod
    def of(features: Tensor) -> Gaussian:
        """Statistics of features (N, D); ValueError for fewer than two."""
        _check(features, at_least=2)
        features = features.double()
        return Gaussian(features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1), len(features))


@dataclass(frozen=True)
class Estimate:
    """A mean over subsets and the standard deviation between them."""

    mean: float
    std: float


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6); never below 0.

    What is left of equal Gaussians by rounding is 0.
    """
    # The trace of the product's root is the nuclear norm of the roots' product: no root of rounding errors is taken.
    cross = torch.linalg.svdvals(_root(a.covariance.double()) @ _root(b.covariance.double())).sum()
    traces = a.covariance.double().trace() + b.covariance.double().trace()
    value = ((a.mean - b.mean).double().square().sum() + traces - 2 * cross).item()
    return max(0.0, without_rounding(value, len(a.mean) * (traces + 2 * cross).item()))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def mmd2(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features (N, D), (M, D) under the kernel (x·y/D + 1)³.

    Binkowski et al. 2018, section 4. It may be slightly negative; what is nothing but rounding is 0.
    """
    n, m = len(a), len(b)
    within_a, within_b, between = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    term_a = (within_a.sum() - within_a.trace()) / (n * (n - 1))
    term_b = (within_b.sum() - within_b.trace()) / (m * (m - 1))
    twice = 2 * between.mean()
    return without_rounding((term_a + term_b - twice).item(), (term_a.abs() + term_b.abs() + twice.abs()).item())


def without_rounding(value: float, scale: float) -> float:
    """A difference of float64 terms whose sizes add up to `scale`; 0 where it is no more than their rounding."""
    return 0.0 if abs(value) <= 16 * _EXACT * scale else value


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(a: Tensor, b: Tensor, *, subsets: int = 100, size: int = SUBSET, seed: int = 0) -> Estimate:
    """KID: mean and standard deviation of `mmd2` over random subsets of at most `size` pictures of each set.

    Raises ValueError for sets of fewer than two pictures or of different widths.
    """
    _check_pair(a, b)
    a, b = a.double(), b.double()
    size = min(size, len(a), len(b))
    values = []
    for subset in range(subsets):
        draw = generator(seed, subset, "kid")
        rows_a = torch.randperm(len(a), generator=draw)[:size]
        rows_b = torch.randperm(len(b), generator=draw)[:size]
        values.append(mmd2(a[rows_a], b[rows_b]))
    std, mean = torch.std_mean(torch.tensor(values, dtype=torch.float64), correction=0)
    return Estimate(mean.item(), std.item())


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of fakes inside the reals' manifold, and of reals inside the fakes' (Kynkäänniemi et al. 2019, eq. 1).

    A set's manifold is the union of balls around its points that reach their k-th neighbour; a point within rounding of
    a ball's surface, such as an equal picture, is inside.
    """
    _check_pair(real, fake)
    if min(len(real), len(fake)) <= neighbours:
        raise ValueError(f"precision and recall with {neighbours} neighbours need more than {neighbours} pictures")
    longest = max(x.double().norm(dim=1).max().item() for x in (real, fake))
    between = torch.cdist(real.double(), fake.double()) - 16 * _COARSE * longest
    inside_real = between <= _radii(real, neighbours)[:, None]
    inside_fake = between <= _radii(fake, neighbours)[None, :]
    return inside_real.any(0).double().mean().item(), inside_fake.any(1).double().mean().item()


def _radii(x: Tensor, neighbours: int) -> Tensor:
    distances = torch.cdist(x.double(), x.double())
    distances.fill_diagonal_(0)  # cdist may leave rounding here
    return distances.kthvalue(neighbours + 1, dim=1).values


def compare(real: Tensor, fake: Tensor, *, network: str, seed: int = 0) -> dict[str, Any]:
    """All distances of two sets of features, under names that say on which network they stand, and `warnings`."""
    _check_pair(real, fake)
    frechet = frechet_distance(Gaussian.of(real), Gaussian.of(fake))
    kid = kernel_distance(real, fake, seed=seed)
    result: dict[str, Any] = {"network": network, "real": len(real), "generated": len(fake)}
    result["fid" if network == "inception" else f"frechet_distance[{network}]"] = frechet
    result["kid" if network == "inception" else f"kernel_distance[{network}]"] = {"mean": kid.mean, "std": kid.std}
    if min(len(real), len(fake)) > 3:
        precision, recall = precision_recall(real, fake)
        result |= {"precision": precision, "recall": recall}
    subset = min(SUBSET, len(real), len(fake))
    return result | {"warnings": worth.distance(len(fake), len(real), subset)}


def _check(features: Tensor, at_least: int) -> None:
    if features.ndim != 2:
        raise ValueError(f"features: expected (N, D), got {tuple(features.shape)}")
    if len(features) < at_least:
        raise ValueError(f"features: at least {at_least} pictures are needed on each side, got {len(features)}")
    if not features.isfinite().all():
        raise ValueError("features: some are not finite")


def _check_pair(a: Tensor, b: Tensor) -> None:
    _check(a, at_least=2)
    _check(b, at_least=2)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features: widths differ, {a.shape[1]} and {b.shape[1]}: not of the same network?")
