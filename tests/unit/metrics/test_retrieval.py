"""Retrieval: chance for a blind model, certainty for a perfect one, torchmetrics in between."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from ldm.metrics import clip_score, retrieval


def test_a_blind_model_is_exactly_at_chance() -> None:
    ones = torch.ones(30, 8)
    result = retrieval.caption_retrieval(ones, torch.ones(100, 8), range(30), candidates=64)
    for k in (1, 5, 10):
        assert result.at(k).rate == pytest.approx(k / 64)
        assert result.at(k).times_chance == pytest.approx(1)


@pytest.mark.parametrize("size", [0.0, 1e-16, 1e-12, 2.0**-24, 2.0**-22])
def test_ties_are_ties_whatever_the_rounding(size: float) -> None:
    """Noise of the size of float64's or float32's rounding decides nothing: neither of the scores nor of features."""
    noise = torch.Generator().manual_seed(5)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + size * (2 * torch.rand(x.shape, generator=noise, dtype=torch.float64) - 1))

    scores = torch.full((50, 64), 0.7, dtype=torch.float64)
    scores[:, 10:20], scores[:, 20:] = 0.9, 0.2
    truth = torch.arange(50) % 10  # ten are better, ten tied
    for scale in (1.0, 100.0, -1.0):  # the order turned round: 44 are better, ten tied
        for k in (1, 5, 12, 20, 50):
            better = 10 if scale > 0 else 44
            want = min(max((k - better) / 10, 0), 1)
            found = retrieval.recall_at(rounded(scale * scores), truth, k)
            assert found.tolist() == pytest.approx([want] * 50), (scale, k)
    image, text = torch.randn(30, 512, dtype=torch.float64), torch.randn(1, 512, dtype=torch.float64).expand(100, 512)
    result = retrieval.caption_retrieval(rounded(image).float(), rounded(text).float(), range(30), candidates=64)
    assert [r.rate for r in result.recalls] == pytest.approx([k / 64 for k in (1, 5, 10)])


def test_a_difference_above_rounding_is_none() -> None:
    scores = torch.tensor([[0.5, 0.5 + 1e-5, 0.2]]).double()
    assert retrieval.recall_at(scores, torch.tensor([0]), 1).tolist() == [0]
    assert retrieval.recall_at(scores, torch.tensor([1]), 1).tolist() == [1]


def test_scores_that_are_not_finite_do_not_win() -> None:
    broken = torch.full((2, 8), math.nan)
    with pytest.raises(ValueError, match="features: some are not finite"):
        retrieval.caption_retrieval(broken, torch.randn(9, 8), [0, 1], candidates=4, ks=(1,))
    with pytest.raises(ValueError, match="scores: some are not finite"):
        retrieval.recall_at(broken, torch.tensor([0, 1]), 1)


def test_a_random_model_is_at_chance_within_its_interval() -> None:
    n = 2000
    result = retrieval.caption_retrieval(torch.randn(n, 32), torch.randn(300, 32), [i % 300 for i in range(n)])
    for recall in result.recalls:
        assert abs(recall.rate - recall.chance) < 4 * math.sqrt(recall.chance * (1 - recall.chance) / n)


def test_a_perfect_model_finds_every_caption() -> None:
    texts = torch.randn(80, 16)
    truth = [79, 0, 41, 40]
    result = retrieval.caption_retrieval(3 * texts[truth], texts, truth, candidates=64)
    assert result.at(1).rate == 1
    assert result.at(1).high == pytest.approx(1)
    assert result.at(1).times_chance == 64


@pytest.mark.parametrize("k", [1, 3, 10])
def test_recall_equals_torchmetrics(k: int) -> None:
    peer = pytest.importorskip("torchmetrics.functional.retrieval")
    scores, truth = torch.rand(50, 20), torch.randint(20, (50,))  # theirs drops scores that are not positive
    theirs = [peer.retrieval_recall(s, torch.arange(20) == t, top_k=k).item() for s, t in zip(scores, truth)]
    assert retrieval.recall_at(scores, truth, k).tolist() == theirs


def test_candidates_hold_the_truth_once() -> None:
    for index in range(200):
        truth = index % 70
        rows = retrieval._candidates(0, index, truth, 70, 64).tolist()
        assert rows[0] == truth
        assert len(set(rows)) == 64
        assert set(rows) <= set(range(70))
    rest = torch.cat([retrieval._candidates(0, i, 3, 10, 4)[1:] for i in range(3000)])
    counts = torch.bincount(rest, minlength=10)
    assert counts[3] == 0
    assert stats.chisquare(counts[[0, 1, 2, 4, 5, 6, 7, 8, 9]].numpy()).pvalue > 1e-3


def test_the_same_seed_gives_the_same_candidates_whatever_the_set() -> None:
    images, texts = torch.randn(40, 8), torch.randn(90, 8)
    whole = retrieval.caption_retrieval(images, texts, range(40), seed=3)
    assert whole == retrieval.caption_retrieval(images, texts, range(40), seed=3)
    assert torch.equal(retrieval._candidates(3, 5, 5, 90, 64), retrieval._candidates(3, 5, 5, 90, 64))


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (3, 10), (10, 10), (57, 512)])
def test_wilson_equals_scipy(hits: int, total: int) -> None:
    theirs = stats.binomtest(hits, total).proportion_ci(method="wilson")
    assert retrieval.wilson(hits, total) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_measure_with_two_encoders() -> None:
    """Pictures whose mean colour names their caption, seen through encoders that know just that."""
    names = {"red": 0, "green": 1, "blue": 2}
    images = torch.full((6, 3, 4, 4), -1.0)
    captions = ["red", "green", "blue", "red", "green", "red"]
    for image, caption in zip(images, captions):
        image[names[caption]] = 1
    images[5] = images[1]  # one wrong: a green picture called red
    table = torch.cat([2 * torch.eye(3) - 1, torch.zeros(2, 3)])
    words = [*names, "grey", "black"]
    result = retrieval.measure(
        lambda x: x.mean((2, 3)),
        lambda texts: torch.stack([table[words.index(t)] for t in texts]),
        images,
        captions,
        pool=["grey", "black", "red"],
        candidates=5,
        ks=(1,),
        batch=4,
    )
    assert result.captions == 5
    assert result.at(1).rate == pytest.approx(5 / 6)
    record = result.record()
    assert record["R@1"]["chance"] == pytest.approx(0.2)
    assert record["candidates"] == 5


@pytest.mark.parametrize(
    ("truth", "options", "message"),
    [
        ([0], {}, "truth: expected one caption for each of 2 pictures"),
        ([0, 1], {"candidates": 9}, "candidates: 9 is not between 2 and the number of distinct captions, 8"),
        ([0, 1], {"candidates": 4, "ks": (1, 5)}, r"ks: \[1, 5\] must lie between 1 and the number of candidates, 4"),
    ],
)
def test_bad_requests(truth: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval.caption_retrieval(torch.randn(2, 3), torch.randn(8, 3), truth, **options)
    with pytest.raises(ValueError, match=r"R@7 was not measured; have \[1\]"):
        retrieval.caption_retrieval(torch.randn(2, 3), torch.randn(8, 3), [0, 1], candidates=4, ks=(1,)).at(7)


def test_clip_score_in_closed_form() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    b = torch.tensor([[5.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    assert clip_score.clip_score(a, b).tolist() == pytest.approx([100, 100 / 2**0.5, 0])
    with pytest.raises(ValueError, match="expected equal shapes"):
        clip_score.clip_score(a, b[:2])


def test_nearest_neighbours() -> None:
    bank = torch.eye(4)
    values, rows = clip_score.nearest(torch.tensor([[0.1, 3.0, 0.2, 0.0]]), bank, 2)
    assert rows.tolist() == [[1, 2]]
    assert values[0, 0] > values[0, 1]
    with pytest.raises(ValueError, match="count: 5 is not between 1 and the bank's size, 4"):
        clip_score.nearest(bank, bank, 5)


def test_equal_neighbours_come_in_the_order_of_their_rows() -> None:
    """Copies of two features, but for rounding: the nearer one's rows come first, each kind from the lowest row on."""
    near, far = torch.randn(2, 256).unbind()
    bank = torch.stack([far, near, near, far, near]) * (1 + 2.0**-24 * torch.randn(5, 256))
    _, rows = clip_score.nearest(near[None], bank, 5)
    assert rows.tolist() == [[1, 2, 4, 0, 3]]
