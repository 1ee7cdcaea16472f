"""What the tests of remote reading share."""

from __future__ import annotations

import itertools

import torch

from ldm.data.loader import DataConfig, Loader
from ldm.data.remote import RemoteConfig

QUICK = RemoteConfig(retries=8, timeout=3.0, backoff=0.01)
Batches = list[tuple[list[str], torch.Tensor]]


def batches(path: str, remote: RemoteConfig, workers: int = 0) -> Batches:
    """Three batches of ten."""
    config = DataConfig(path=path, size=8, remote=remote)
    stream = Loader(config, seed=0, micro_batch=10, workers=workers).batches(0)
    return [(b["key"], b["image"]) for b in itertools.islice(stream, 3)]


def same(a: Batches, b: Batches) -> bool:
    """Equal keys and pixels."""
    return all(x[0] == y[0] and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True))
