"""Distances of feature sets against torch-fidelity on the same features, and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.metrics import fid


def features(n: int, width: int, seed: int) -> torch.Tensor:
    """Correlated, non-Gaussian features, as a network's are."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return (torch.randn(n, width, generator=draw) @ mix).relu() + 0.05 * seed


def test_frechet_of_gaussians_with_a_known_distance() -> None:
    """Commuting covariances: |m1 - m2|² + Σ(√λ1 - √λ2)², in any basis."""
    width = 24
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    l1, l2 = torch.rand(width).double() + 0.1, torch.rand(width).double() * 3
    m1, m2 = torch.randn(width).double(), torch.randn(width).double()
    a = fid.Gaussian(m1, basis @ l1.diag() @ basis.T, 100)
    b = fid.Gaussian(m2, basis @ l2.diag() @ basis.T, 100)
    expected = (m1 - m2).square().sum() + (l1.sqrt() - l2.sqrt()).square().sum()
    assert fid.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)
    assert fid.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_of_one_dimension() -> None:
    a = fid.Gaussian(torch.tensor([1.0]), torch.tensor([[4.0]]), 9)
    b = fid.Gaussian(torch.tensor([-2.0]), torch.tensor([[1.0]]), 9)
    assert fid.frechet_distance(a, b) == pytest.approx(9 + 1)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (30, 40)])
def test_frechet_equals_torch_fidelity(n: int, m: int) -> None:
    """Also with fewer pictures than features, where the covariances are singular."""
    peer = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = features(n, 64, 1), features(m, 64, 2)
    ours = fid.frechet_distance(fid.Gaussian.of(a), fid.Gaussian.of(b))
    statistics = [peer.fid_features_to_statistics(x.double()) for x in (a, b)]
    theirs = peer.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_frechet_equals_torchmetrics() -> None:
    peer = pytest.importorskip("torchmetrics.image.fid")
    a, b = (fid.Gaussian.of(features(200, 32, s)) for s in (1, 2))
    theirs = peer._compute_fid(a.mean, a.covariance, b.mean, b.covariance)
    assert fid.frechet_distance(a, b) == pytest.approx(theirs.item(), rel=1e-4)


def test_kernel_distance_equals_torch_fidelity() -> None:
    """With subsets as large as the sets there is nothing random in either."""
    peer = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = features(150, 48, 1), features(150, 48, 3)
    theirs = peer.kid_features_to_metric(a, b, kid_subsets=2, kid_subset_size=150, verbose=False)
    ours = fid.kernel_distance(a, b, subsets=2, size=150)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours.std == pytest.approx(0, abs=1e-12)


def test_distances_equal_clean_fid() -> None:
    """Its Fréchet distance on the same features to 1e-4; its KID's mean within the spread of its own random subsets."""
    peer = pytest.importorskip("cleanfid.fid")
    a, b = features(300, 12, 3), 1.3 * features(260, 12, 4) + 0.2
    x, y = a.double().numpy(), b.double().numpy()
    theirs = peer.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    ours = fid.frechet_distance(fid.Gaussian.of(a), fid.Gaussian.of(b))
    assert ours == pytest.approx(float(theirs), rel=1e-4)
    found = fid.kernel_distance(a, a + 1.0, subsets=1, size=300)  # whole sets: nothing is drawn
    whole = peer.kernel_distance(x, x + 1.0, num_subsets=1, max_subset_size=300)
    assert found.mean == pytest.approx(float(whole), rel=1e-4)


def test_kernel_distance_has_no_bias() -> None:
    """Two samples of one distribution: zero within the spread; another distribution: far outside it."""
    same = fid.kernel_distance(features(400, 16, 1), features(400, 16, 1)[torch.randperm(400)], subsets=50, size=100)
    assert abs(same.mean) < 2 * same.std
    draws = [fid.mmd2(torch.randn(40, 8).double(), torch.randn(40, 8).double()) for _ in range(300)]
    values = torch.tensor(draws)
    assert abs(values.mean()) < 4 * values.std() / 300**0.5
    other = fid.kernel_distance(features(400, 16, 1), features(400, 16, 9), subsets=50, size=100)
    assert other.mean > 10 * same.std


def test_precision_and_recall_equal_torch_fidelity() -> None:
    peer = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = features(120, 24, 1), features(90, 24, 2)
    theirs = peer.prc_features_to_metric(real, fake, prc_neighborhood=3, prc_batch_size=50, verbose=False)
    precision, recall = fid.precision_recall(real, fake)
    # Their real set is their first argument; the two rates are told apart by their extreme values below.
    assert {round(precision, 6), round(recall, 6)} == {round(theirs["precision"], 6), round(theirs["recall"], 6)}


def test_precision_and_recall_of_a_collapsed_generator() -> None:
    """All fakes in one corner of the reals: precise, and hardly any real covered."""
    real = torch.rand(300, 2)
    fake = real[:1] + 1e-4 * torch.rand(50, 2)
    precision, recall = fid.precision_recall(real, fake)
    assert precision == 1
    assert recall < 0.05


def test_only_inception_gives_fid() -> None:
    a, b = features(40, 8, 1), features(40, 8, 2)
    other = fid.compare(a, b, network="efficientnet_lite0@224")
    assert "fid" not in other
    assert "frechet_distance[efficientnet_lite0@224]" in other
    assert fid.compare(a, b, network="inception")["fid"] == other["frechet_distance[efficientnet_lite0@224]"]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(5, 4), "features: at least 2 pictures are needed on each side, got 1"),
        (torch.zeros(5, 4), torch.zeros(0, 4), "features: at least 2 pictures are needed on each side, got 0"),
        (torch.zeros(5), torch.zeros(5, 4), r"features: expected \(N, D\), got \(5,\)"),
        (torch.zeros(5, 4), torch.zeros(5, 3), "features: widths differ, 4 and 3: not of the same network?"),
        (torch.zeros(5, 4), torch.full((5, 4), torch.nan), "features: some are not finite"),
    ],
)
def test_bad_features(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fid.compare(a, b, network="x")


@pytest.mark.parametrize("n", [2, 10, 50, 200])
@pytest.mark.parametrize("width", [5, 64])
def test_what_rounding_leaves_of_a_distance_is_zero(n: int, width: int) -> None:
    """Equal sets, also in another order, and constant ones: exactly 0, so that no -4e-13 is printed."""
    x = torch.randn(n, width, dtype=torch.float64) * 3 + 7
    for other in (x.clone(), x.flip(0), x[torch.randperm(n)]):
        assert fid.frechet_distance(fid.Gaussian.of(x), fid.Gaussian.of(other)) == 0
    flat = torch.full((n, width), 0.3)
    assert fid.frechet_distance(fid.Gaussian.of(flat), fid.Gaussian.of(flat)) == 0
    assert fid.mmd2(flat.double(), flat.double()) == 0
    small = fid.Gaussian(torch.zeros(2), torch.eye(2), 9), fid.Gaussian(torch.full((2,), 1e-5), torch.eye(2), 9)
    assert fid.frechet_distance(*small) == pytest.approx(2e-10, rel=1e-3), "a small distance is kept"


def test_equal_pictures_lie_on_their_neighbours_whatever_the_rounding() -> None:
    """Five copies of each picture: all radii are 0, and every fake, a real one but for rounding, is inside one."""
    real = (torch.randn(40, 16) * 10).repeat(5, 1)
    assert fid.precision_recall(real, real * (1 + 1e-7 * torch.randn(200, 16))) == (1, 1)
    far = real[:40] + torch.nn.functional.normalize(torch.randn(40, 16), dim=1) * 1e-3
    assert fid.precision_recall(real, far)[0] == 0, "what is further than rounding is outside"
