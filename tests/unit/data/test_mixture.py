"""Mixtures: exact shares, each source whole, the same for any division and resume."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config.load import decode, encode
from ldm.config.schema import load_run
from ldm.data.loader import DataConfig
from ldm.data.mixture import Mixture, MixtureConfig, Source, divide, open_data

Make = Callable[..., Path]


@pytest.fixture
def config(make_set: Make) -> MixtureConfig:
    small = DataConfig(path=str(make_set(6, name="a")), size=8, template="sks {}")
    large = DataConfig(path=str(make_set(25, name="b")), size=8, crop="random")
    return MixtureConfig(sources=(Source(data=small, share=2, weight=0.5), Source(data=large, share=3)))


def test_shares_are_exact_and_sources_go_whole(config: MixtureConfig) -> None:
    mixture = Mixture(config, seed=0, micro_batch=10)
    batches = list(itertools.islice(mixture.batches(), 50))
    for batch in batches:
        assert sum(c.startswith("sks ") for c in batch["caption"]) == 4
        assert batch["weight"].tolist() == [0.5 if c.startswith("sks ") else 1.0 for c in batch["caption"]]
    small = [k for b in batches for k, c in zip(b["key"], b["caption"], strict=True) if c.startswith("sks ")]
    large = [k for b in batches for k, c in zip(b["key"], b["caption"], strict=True) if not c.startswith("sks ")]
    for keys, size in ((small, 6), (large, 25)):
        for start in range(0, len(keys) // size * size, size):
            assert len(set(keys[start : start + size])) == size
    assert max(Counter(large).values()) - min(Counter(large).values()) <= 1
    assert mixture.steps_per_epoch == 5  # 25 samples, 6 a step


def test_the_same_for_any_division_workers_and_resume(config: MixtureConfig) -> None:
    whole = list(itertools.islice(Mixture(config, seed=3, micro_batch=12).batches(), 4))
    for world, accumulate, workers in ((2, 1, 1), (3, 2, 0), (4, 3, 0)):
        for step in (0, 3):
            parts = [
                b
                for r in range(world)
                for b in itertools.islice(
                    Mixture(
                        config,
                        seed=3,
                        micro_batch=12 // world // accumulate,
                        accumulate=accumulate,
                        rank=r,
                        world=world,
                        workers=workers,
                    ).batches(step),
                    accumulate,
                )
            ]
            assert [k for p in parts for k in p["key"]] == whole[step]["key"]
            assert torch.equal(torch.cat([p["image"] for p in parts]), whole[step]["image"])
            assert torch.equal(torch.cat([p["position"] for p in parts]), whole[step]["position"])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_places_count_each_source_without_gaps(shares: list[int], start: int) -> None:
    """Against counting: every stretch of sum-of-shares places has each source's share, numbered without a gap."""
    total = sum(shares)
    source, number = divide(np.arange(start, start + 3 * total), shares)
    for k, share in enumerate(shares):
        mine = number[source == k]
        assert len(mine) == 3 * share
        assert mine.tolist() == list(range(mine[0], mine[0] + 3 * share))
        # Never behind or ahead by a whole place of those that earlier sources left.
        counts = np.cumsum(divide(np.arange(total), shares)[0] == k)
        if k == 0:
            assert np.all(np.abs(counts - np.arange(1, total + 1) * share / total) < 1)


def test_a_billion_to_one() -> None:
    source, number = divide(np.array([0, 10**9 - 1, 10**9, 10**15]), (10**9, 1))
    assert source.tolist() == [1, 0, 0, 0]
    assert number[2] == 10**9 - 1
    with pytest.raises(ValueError, match=r"over 2\^31"):
        divide(np.zeros(1, np.int64), (1 << 31, 1))


def test_repeats_and_shares_by_size(make_set: Make) -> None:
    """With "size", an epoch has each sample its source's repeats times."""
    few = DataConfig(path=str(make_set(4, name="few")), size=8, repeats=5)
    many = DataConfig(path=str(make_set(10, name="many")), size=8)
    config = MixtureConfig(sources=(Source(data=few, share="size", name="kept"), Source(data=many, share="size")))
    mixture = Mixture(config, seed=0, micro_batch=5)
    assert mixture.steps_per_epoch == 6
    batches = list(itertools.islice(mixture.batches(), 6))
    pairs = Counter((n, k) for b in batches for n, k in zip(b["source"], b["key"], strict=True))
    assert {n for n, _ in pairs} == {"kept", "many"}
    assert all(count == (5 if n == "kept" else 1) for (n, _), count in pairs.items())
    assert len(pairs) == 14


def test_batches_of_one_source_have_their_own_resolution(make_set: Make) -> None:
    a = Source(data=DataConfig(path=str(make_set(24, name="a")), size=8), weight=0.5)
    b = Source(data=DataConfig(path=str(make_set(36, name="b")), size=16, template="big {}"), share=2)
    config = MixtureConfig(sources=(a, b), per="batch")
    mixture = Mixture(config, seed=2, micro_batch=12, tokenize=lambda t: torch.tensor([[len(c)] for c in t]))
    assert mixture.steps_per_epoch == 6
    whole = list(itertools.islice(mixture.batches(), 9))
    shapes = [tuple(batch["image"].shape) for batch in whole]
    assert Counter(shapes) == {(12, 3, 8, 8): 3, (12, 3, 16, 16): 6}
    for step, batch in enumerate(whole):
        small = batch["image"].shape[-1] == 8
        assert batch["weight"].tolist() == [0.5 if small else 1.0] * 12
        assert all(c.startswith("big ") != small for c in batch["caption"])
        assert set(batch["source"]) == {"a" if small else "b"}
        assert batch["position"].tolist() == list(range(step * 12, step * 12 + 12))
        parts = [Mixture(config, seed=2, micro_batch=4, rank=r, world=3).batch(step, 0) for r in range(3)]
        assert [k for p in parts for k in p["key"]] == batch["key"]
        assert torch.equal(torch.cat([p["image"] for p in parts]), batch["image"])
    keys = [k for batch in whole if batch["image"].shape[-1] == 16 for k in batch["key"]]
    assert len(set(keys[:36])) == len(set(keys[36:])) == 36


def test_a_run_takes_a_mixture_from_yaml(tmp_path: Path, make_set: Make) -> None:
    dog, prior = make_set(6, name="dog"), make_set(9, name="prior")
    text = (Path(__file__).parents[3] / "configs" / "data" / "mixture.yaml").read_text()
    (tmp_path / "data.yaml").write_text(text.replace("data/dog-prior", str(prior)).replace("data/dog\n", f"{dog}\n"))
    (tmp_path / "run.yaml").write_text(
        "base: data.yaml\nname: x\nout: x\ntrain: {steps: 1, batch: 4}\ntask: {kind: clip}\n"
    )
    run = load_run(tmp_path / "run.yaml")
    assert isinstance(run.data, MixtureConfig)
    assert decode(type(run), encode(run)) == run
    batch = open_data(run.data, seed=0, micro_batch=4).batch(0, 0)
    assert Counter(batch["source"]) == {"dog": 2, "prior": 2}
    (tmp_path / "plain.yaml").write_text("base: run.yaml\ndata: {kind: shards, sise: 4}\n")
    with pytest.raises(ValueError, match=r"config.data: unknown key.*'sise'"):
        load_run(tmp_path / "plain.yaml")


def test_config() -> None:
    tree = {"kind": "mixture", "sources": [{"data": {"path": "emoji"}, "share": 1}]}
    config = decode(MixtureConfig, tree)
    assert isinstance(open_data(config, seed=0, micro_batch=2), Mixture)
    a, b = DataConfig(path="a"), DataConfig(path="b", size=8)
    with pytest.raises(ValueError, match="agree on size"):
        MixtureConfig(sources=(Source(data=a), Source(data=b)))
    with pytest.raises(ValueError, match="for all sources or none"):
        MixtureConfig(sources=(Source(data=a), Source(data=a, share="size")))
    with pytest.raises(ValueError, match="set per: batch"):
        MixtureConfig(sources=(Source(data=DataConfig(path="a", buckets=True)),))
    with pytest.raises(ValueError, match="agree on cached"):
        MixtureConfig(sources=(Source(data=a), Source(data=DataConfig(path="b", cached=True))))
    with pytest.raises(ValueError, match="share must be at least 1"):
        Source(data=a, share=0)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        DataConfig(path="a", repeats=0)
    with pytest.raises(ValueError, match=r"config.sources\[0\].share: .*'half'"):
        decode(MixtureConfig, {"kind": "mixture", "sources": [{"data": {"path": "emoji"}, "share": "half"}]})
