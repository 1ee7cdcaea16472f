"""The order against what it promises: exactly once, the same for every division, cheap anywhere."""

import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.order import Order, clumping, mix, permute, slots

SIZES = st.lists(st.integers(0, 25), min_size=1, max_size=6).filter(lambda s: sum(s) > 0)


def batch_ids(order: Order, step: int, world: int, accumulate: int) -> list[int]:
    ids = []
    for rank in range(world):
        for micro in range(accumulate):
            part = slots(order.batch, rank=rank, world=world, accumulate=accumulate, micro_step=micro)
            ids += order.ids(step, part).tolist()
    return ids


@given(st.integers(1, 5000), st.integers(0, 2**62))
@settings(max_examples=30, deadline=None)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    index = np.arange(size)
    out = permute(index, size, mix(key))
    assert sorted(out.tolist()) == index.tolist()


@given(SIZES, st.integers(1, 24), st.integers(0, 9), st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_every_sample_exactly_once_an_epoch(sizes: list[int], batch: int, seed: int, window: int) -> None:
    total = sum(sizes)
    order = Order(sizes=tuple(sizes), batch=batch, seed=seed, window=window, last="wrap")
    for epoch in range(2):
        first = epoch * order.steps_per_epoch
        ids = [i for s in range(order.steps_per_epoch) for i in order.ids(first + s, np.arange(batch)).tolist()]
        assert set(ids) == set(range(total))
        assert len(ids) == order.steps_per_epoch * batch
    if total >= batch:
        order = Order(sizes=tuple(sizes), batch=batch, seed=seed, window=window, last="drop")
        ids = [i for s in range(order.steps_per_epoch) for i in order.ids(s, np.arange(batch)).tolist()]
        assert len(ids) == len(set(ids)) == total // batch * batch


@given(SIZES, st.integers(0, 9), st.integers(0, 10**7))
@settings(max_examples=20, deadline=None)
def test_global_batches_do_not_depend_on_ranks_or_accumulation(sizes: list[int], seed: int, step: int) -> None:
    order = Order(sizes=tuple(sizes), batch=24, seed=seed, window=16, last="wrap")
    whole = order.ids(step, np.arange(24)).tolist()
    for world in (1, 2, 3, 4, 6, 8, 12, 24):
        for accumulate in (1, 2, 3):
            if 24 % (world * accumulate) == 0:
                assert batch_ids(order, step, world, accumulate) == whole


def test_epochs_and_seeds_differ() -> None:
    lines = {
        tuple(Order(sizes=(100, 100), batch=10, seed=seed).at(epoch, np.arange(200)).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(lines) == 9


def test_unshuffled_is_in_order() -> None:
    order = Order(sizes=(3, 4), batch=2, shuffle=False, last="wrap")
    assert [i for s in range(4) for i in order.ids(s, [0, 1]).tolist()] == [0, 1, 2, 3, 4, 5, 6, 0]


def test_shuffle_is_uniform_when_the_window_holds_all() -> None:
    # chi-square of the place of each sample over epochs: 50 cells, expectation 16 each per sample
    order = Order(sizes=(20, 30), batch=1, seed=3)
    counts = np.zeros((50, 50))
    for epoch in range(800):
        counts[order.at(epoch, np.arange(50)), np.arange(50)] += 1
    chi = ((counts - 16) ** 2 / 16).sum() / (49 * 49)
    assert 0.9 < chi < 1.1


def test_a_batch_mixes_far_apart_places_while_windows_stay_local() -> None:
    shards, size, batch = 400, 1000, 64
    order = Order(sizes=(size,) * shards, batch=batch, seed=1, window=2000)
    touched = [np.unique(order.ids(s, np.arange(batch)) // size) for s in range(50)]
    assert np.mean([len(t) for t in touched]) > 50  # nearly every sample of a batch comes from another shard
    assert len(np.unique(np.concatenate(touched))) < 220  # yet 50 steps open few of them: reading stays sequential


def test_shuffle_quality() -> None:
    """On 400 shards: ours with a small window against no shuffle, and against a buffer over the stream of shards."""
    size, batch = (1000,) * 400, 64
    steps = list(range(0, 6250, 25))
    assert clumping(Order(sizes=size, batch=batch, window=2000), steps) < 1.3
    none = clumping(Order(sizes=size, batch=batch, shuffle=False), steps)
    assert none == pytest.approx(batch, rel=0.1)

    # What streams do: shards in random order, then a buffer of 1,000 from which samples are drawn.
    rng = np.random.default_rng(0)
    stream = np.concatenate([np.arange(1000) + 1000 * s for s in rng.permutation(400)])
    buffer, means = list(stream[:1000]), []
    for first in range(1000, 120_000, batch):
        drawn = []
        for value in stream[first : first + batch]:
            slot = int(rng.integers(1000))
            drawn.append(buffer[slot])
            buffer[slot] = value
        means.append(np.mean(drawn))
    buffered = float(((np.array(means) - 200_000) ** 2).mean() / (400_000**2 / 12 / batch))
    assert buffered > 15


def test_a_billion_samples_cost_memory_of_the_shards_only() -> None:
    rng = np.random.default_rng(0)
    sizes = tuple(rng.integers(9_000, 11_000, 100_000).tolist())
    order = Order(sizes=sizes, batch=2048, seed=0)
    part = slots(2048, rank=3, world=8, accumulate=1, micro_step=0)
    tracemalloc.start()
    first = order.ids(10, part)
    assert tracemalloc.get_traced_memory()[1] < 40 * len(sizes)
    tracemalloc.stop()
    start = time.perf_counter()
    for step in range(10_000_000, 10_000_020):
        order.ids(step, part)
    assert (time.perf_counter() - start) / 20 < 0.05  # a loose bound for busy machines
    assert len(set(first.tolist())) == 256


def test_repeats_come_that_often() -> None:
    order = Order(sizes=(5, 7), repeats=(3, 1), starts=(100, 200), batch=2)
    ids = [i for s in range(order.steps_per_epoch) for i in order.ids(s, [0, 1]).tolist()]
    assert Counter(ids) == Counter({**{100 + i: 3 for i in range(5)}, **{200 + i: 1 for i in range(7)}})


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="fewer than the global batch 8"):
        Order(sizes=(5,), batch=8)
    with pytest.raises(ValueError, match="no samples"):
        Order(sizes=(0, 0), batch=1)
    with pytest.raises(ValueError, match="not divisible by world size 3"):
        slots(8, rank=0, world=3, accumulate=1, micro_step=0)
