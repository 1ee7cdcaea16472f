"""Random masks: what each kind may paint, and that a mask belongs to its sample and epoch."""

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from ldm.data.captions import uniform
from ldm.data.masks import KINDS, random_mask
from ldm.data.pairs import RandomMask, make


def draws(seed: int) -> Callable[[str], float]:
    return lambda purpose: uniform(seed, 0, purpose)


@pytest.mark.parametrize("size", [(64, 48), (8, 8), (1, 1), (17, 512)])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_two_valued_and_never_empty(kind: str, size: tuple[int, int]) -> None:
    for seed in range(60):
        mask = random_mask(kind, size, draws(seed))
        assert mask.shape == size[::-1]
        assert set(np.unique(mask)) <= {0, 255}
        assert mask.any(), seed


def test_shares_of_the_picture_that_are_painted() -> None:
    """At most four rectangles of a quarter each, at least one of 1/64; sides a quarter to three quarters; all."""
    shares = {k: [float((random_mask(k, (64, 64), draws(s)) > 0).mean()) for s in range(200)] for k in KINDS}
    assert set(shares["whole"]) == {1.0}
    assert min(shares["half"]) >= 0.25 - 1 / 64
    assert max(shares["half"]) <= 0.75 + 1 / 64
    assert min(shares["rectangles"]) >= 1 / 64
    assert max(shares["rectangles"]) < 0.8
    assert np.mean(shares["strokes"]) < 0.35
    assert max(shares["strokes"]) < 0.8
    assert len(set(shares["strokes"])) > 150


def test_halves_are_one_side_and_come_from_all_four() -> None:
    corners = set()
    for seed in range(60):
        mask = random_mask("half", (10, 6), draws(seed)) > 0
        assert (mask.all(0) | ~mask.any(0)).all() or (mask.all(1) | ~mask.any(1)).all()  # straight cut
        corners.add((mask[0, 0], mask[0, -1], mask[-1, 0], mask[-1, -1]))
    assert {sum(c) for c in corners} == {2}
    assert len(corners) == 4


def test_kinds_come_by_their_shares() -> None:
    pair = RandomMask(rectangles=0, strokes=0, half=1, whole=3)
    pixels = np.zeros((400, 8, 8, 3), np.uint8)
    made = make({"m": pair}, pixels, {}, lambda row, purpose: uniform(1, row, purpose))["m"]
    whole = sum(bool(one.all()) for one in made)
    assert abs(whole / 400 - 0.75) < 0.07  # three deviations


def test_a_mask_does_not_change_from_version_to_version() -> None:
    """Of kinds that are boxes, whose drawing is exact: a run that resumes after an update sees the same."""
    found = [random_mask(kind, (32, 24), draws(s)).tobytes() for kind in ("rectangles", "half") for s in range(8)]
    assert hashlib.sha256(b"".join(found)).hexdigest()[:16] == "9826c432df722e14"
