"""Mixtures: exact shares, each source whole, the same for any division and resume."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.config.load import decode
from ldm.data.loader import DataConfig
from ldm.data.mixture import Mixture, MixtureConfig, Source, open_data

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


def test_places_count_each_source_without_gaps(config: MixtureConfig) -> None:
    source, number = Mixture(config, seed=1, micro_batch=1).places(np.arange(500))
    for k in range(2):
        assert number[source == k].tolist() == list(range(int((source == k).sum())))


def test_config() -> None:
    tree = {"kind": "mixture", "sources": [{"data": {"path": "emoji"}, "share": 1}]}
    config = decode(MixtureConfig, tree)
    assert isinstance(open_data(config, seed=0, micro_batch=2), Mixture)
    with pytest.raises(ValueError, match="agree on size"):
        MixtureConfig(sources=(Source(data=DataConfig(path="a")), Source(data=DataConfig(path="b", size=8))))
    with pytest.raises(ValueError, match="share must be at least 1"):
        Source(data=DataConfig(path="a"), share=0)
