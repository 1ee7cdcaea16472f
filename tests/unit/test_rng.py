"""Keyed randomness: right distributions, no correlation between neighbours, no dependence on the batch."""

from __future__ import annotations

import hashlib

import pytest
import torch
from scipy import stats

from ldm.rng import Rng, generator, key, seed_torch


def test_a_key_is_the_documented_hash() -> None:
    seed, position, purpose = 7, 123_456_789_012, "noise"
    message = seed.to_bytes(8, "little") + position.to_bytes(8, "little") + purpose.encode()
    digest = hashlib.blake2b(message, digest_size=8).digest()
    assert key(seed, position, purpose) == int.from_bytes(digest, "little") // 2


def test_keys_of_neighbours_do_not_collide() -> None:
    keys = {key(s, p, purpose) for s in range(10) for p in range(500) for purpose in ("time", "noise")}
    assert len(keys) == 10 * 500 * 2


def test_normal_and_uniform_are_what_they_say() -> None:
    rng = Rng.of(0, range(2000))
    normal = rng.normal("noise", (20,))
    uniform = rng.uniform("time", (20,))
    assert normal.dtype == uniform.dtype == torch.float32
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_rows_are_independent_of_each_other() -> None:
    """Neighbouring positions, seeds and purposes: correlations as small as those of independent draws."""
    n = 4000
    a = Rng.of(0, range(n)).normal("noise", (2,))
    others = {
        "next position": Rng.of(0, range(1, n + 1)).normal("noise", (2,)),
        "next seed": Rng.of(1, range(n)).normal("noise", (2,)),
        "other purpose": Rng.of(0, range(n)).normal("offset", (2,)),
        "next element": a.flip(1),
    }
    for name, b in others.items():
        correlation = (a[:, 0] * b[:, 0]).mean().item()
        assert abs(correlation) < 4 / n**0.5, name
    first = Rng.of(0, range(n)).uniform("time")
    assert stats.kstest(first.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("positions", [[5], [5, 9, 2], [9, 5], list(range(64))])
def test_a_row_does_not_depend_on_its_batch(positions: list[int]) -> None:
    batch = Rng.of(3, positions).normal("noise", (4, 8, 8))
    alone = Rng.of(3, [5]).normal("noise", (4, 8, 8))[0]
    assert torch.equal(batch[positions.index(5)], alone)
    uniform = Rng.of(3, positions).uniform("time")
    assert uniform.shape == (len(positions),)
    assert torch.equal(uniform[positions.index(5)], Rng.of(3, [5]).uniform("time")[0])


def test_draws_ignore_and_leave_the_global_generator() -> None:
    rng = Rng.of(0, torch.tensor([1, 2]))
    before = torch.get_rng_state()
    first = rng.normal("noise", (3,))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, rng.normal("noise", (3,)))
    assert len(rng) == 2


def test_the_stream_is_frozen() -> None:
    """A changed stream would change every resumed run and every seeded picture: it needs a changelog entry."""
    assert key(0, 0, "noise") == KEY_0_0_NOISE
    assert torch.allclose(torch.randn(3, generator=generator(0, 0, "noise")), torch.tensor(NORMAL_0_0_NOISE))


KEY_0_0_NOISE = 4419425034601282272
NORMAL_0_0_NOISE = [0.628619, -0.366302, -0.747633]


SEEDS = [-1, 2**31, 2**63 - 1, 2**63, 2**64 - 5, 2**64, -(2**63), -(2**63) - 1, 10**25, -5]


def test_any_whole_number_is_a_seed_of_its_own() -> None:
    """None is taken modulo 2**64, where 2**64 - 5 would be -5."""
    assert len({key(seed, 0, "noise") for seed in SEEDS}) == len(SEEDS)
    draws = [Rng(seed, (3,)).normal("noise", (8,)) for seed in SEEDS]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert all(torch.equal(a, Rng(seed, (3,)).normal("noise", (8,))) for a, seed in zip(draws, SEEDS, strict=True))


def test_torch_is_seeded_by_any_whole_number() -> None:
    before = torch.get_rng_state()
    try:
        seed_torch(5)
        small = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(small, torch.rand(3))
        drawn = []
        for seed in (2**64, 10**25, -(2**70)):
            seed_torch(seed)
            drawn.append(float(torch.rand(1)))
        assert len(set(drawn)) == 3
    finally:
        torch.set_rng_state(before)
