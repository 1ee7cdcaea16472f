"""Another batch size in the middle of an epoch: the place is counted in samples, none is lost and none comes twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm.data.buckets import BucketedOrder
from ldm.data.loader import DataConfig, Loader
from ldm.data.mixture import Mixture, MixtureConfig, Source
from ldm.data.order import Order
from ldm.data.resized import Regrouped, Resized, Sizes
from tests import miniature


def parts(*sizes: tuple[int, int]) -> Sizes:
    return Sizes(tuple(sizes))


def test_the_first_sample_of_a_step_is_the_sum_of_the_batches_before() -> None:
    sizes = parts((0, 4), (2, 8), (5, 6))
    batches = [4, 4, 8, 8, 8, 6, 6, 6]
    assert [sizes.first(s) for s in range(8)] == [sum(batches[:s]) for s in range(8)]


def test_a_change_at_the_place_of_another_replaces_it() -> None:
    sizes = parts((0, 4)).changed(2, 8)
    assert sizes.parts == ((0, 4), (2, 8))
    assert sizes.changed(2, 16).parts == ((0, 4), (2, 16))
    assert sizes.changed(2, 4).parts == ((0, 4),)
    assert parts((0, 4)).changed(0, 8).parts == ((0, 8),)


@pytest.mark.parametrize("sizes", [[(0, 4), (2, 8)], [(0, 8), (1, 4)], [(0, 6), (3, 4), (5, 10)], [(0, 4), (1, 16)]])
def test_whole_epochs_of_changed_batches_hold_each_sample_once(sizes: Sequence[tuple[int, int]]) -> None:
    """48 samples divide by the first batch, so that none is left out of an epoch."""
    order = Order(sizes=(10, 20, 18), batch=sizes[0][1], seed=3, last="drop")
    resized, told = Resized(order, parts(*sizes)), parts(*sizes)
    step, seen = 0, []
    while len(seen) < 3 * 48:
        batch = next(b for s, b in reversed(sizes) if s <= step)
        assert told.first(step) == len(seen)
        seen += resized.ids(step, np.arange(batch)).tolist()
        step += 1
    for epoch in range(3):
        assert sorted(seen[48 * epoch : 48 * (epoch + 1)]) == list(range(48))
    before = [i for s in range(sizes[1][0]) for i in order.ids(s, np.arange(sizes[0][1])).tolist()]
    assert seen[: len(before)] == before


def buckets(batch: int, last: Any = "drop") -> BucketedOrder:
    sizes, start, orders = (24, 60, 36), 0, {}
    for k, size in enumerate(sizes):
        orders[(64, 64 * (k + 1))] = Order(sizes=(size,), starts=(start,), batch=batch, seed=k, last=last)
        start += size
    return BucketedOrder(orders, seed=5)


@pytest.mark.parametrize("sizes", [[(0, 4), (7, 12)], [(0, 12), (4, 4)], [(0, 6), (5, 4), (9, 8)], [(0, 12), (3, 5)]])
def test_buckets_lose_nothing_either(sizes: Sequence[tuple[int, int]]) -> None:
    """Each batch is of one bucket, and each bucket's samples come in whole epochs of its own."""
    regrouped, rows = Regrouped(buckets(sizes[0][1]), parts(*sizes)), {0: [], 1: [], 2: []}
    ends = np.cumsum([24, 60, 36])
    total = 0
    for step in range(200):
        batch = next(b for s, b in reversed(sizes) if s <= step)
        ids = regrouped.ids(step, np.arange(batch))
        assert len(set(np.searchsorted(ends, ids, side="right").tolist())) == 1
        rows[int(np.searchsorted(ends, ids[0], side="right"))] += ids.tolist()  # type: ignore[arg-type]
        total += batch
    assert sum(map(len, rows.values())) == total
    for k, size in enumerate((24, 60, 36)):
        first = int(ends[k]) - size
        for epoch in range(len(rows[k]) // size):
            assert sorted(rows[k][epoch * size : (epoch + 1) * size]) == list(range(first, first + size))  # type: ignore[index]
        assert len(rows[k]) / total == pytest.approx(size / 120, abs=0.06)  # type: ignore[arg-type]


def test_an_order_whose_batch_does_not_change_is_cut_as_before() -> None:
    plain = buckets(4)
    regrouped = Regrouped(plain, parts((0, 4)))
    for step in [*range(65), 1000, 12345]:
        assert regrouped.ids(step, np.arange(4)).tolist() == plain.ids(step, np.arange(4)).tolist()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.data(tmp_path_factory.mktemp("resized"))


def keys(stream: Loader | Mixture, steps: Sequence[int]) -> list[str]:
    return [k for s in steps for k in stream.batch(s, 0)["key"]]


def test_a_loader_goes_on_with_what_the_epoch_still_has(data: Path) -> None:
    """16 samples: two batches of 4, then one of 8; on two ranks, accumulated, the same, at the same positions."""
    config = DataConfig(path=str(data), size=16)
    seen = keys(Loader(config, seed=0, micro_batch=4), [0, 1])
    after = Loader(config, seed=0, micro_batch=8)
    after.follow([(0, 4), (2, 8)])
    assert sorted(seen + keys(after, [2])) == sorted(set(seen + keys(after, [2])))
    assert len(set(seen + keys(after, [2]))) == 16
    whole = after.batch(2, 0)
    assert whole["position"].tolist() == list(range(8, 16))
    found = []
    for rank in range(2):
        part = Loader(config, seed=0, micro_batch=2, accumulate=2, rank=rank, world=2)
        part.follow([(0, 4), (2, 8)])
        found += [part.batch(2, micro) for micro in range(2)]
    assert [k for b in found for k in b["key"]] == whole["key"]
    assert [p for b in found for p in b["position"].tolist()] == whole["position"].tolist()


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_a_mixture_keeps_its_shares(data: Path, per: Any) -> None:
    """Of two sources with shares 2 and 1, each goes through its own 16 and 8 samples before any comes again."""
    train = DataConfig(path=str(data), size=16)
    config = MixtureConfig(
        per=per,
        sources=(
            Source(data=train, share=2, name="many"),
            Source(data=DataConfig(path=str(data), size=16, split="heldout"), share=1, name="few"),
        ),
    )
    first = Mixture(config, seed=1, micro_batch=4)
    second = Mixture(config, seed=1, micro_batch=2)
    second.follow([(0, 4), (3, 2)])
    rows: list[tuple[str, str]] = []
    for stream, steps in ((first, range(3)), (second, range(3, 9))):
        for step in steps:
            batch = stream.batch(step, 0)
            assert batch["position"].tolist() == list(range(len(rows), len(rows) + len(batch["key"])))
            rows += zip(batch["source"], batch["key"], strict=True)
    assert Counter(source for source, _ in rows) == {"many": 16, "few": 8}
    assert set(Counter(rows).values()) == {1}
