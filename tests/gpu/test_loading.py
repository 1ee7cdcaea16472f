"""Batches that threads make ahead: the same on either device; for a card they lie in pinned memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.data import stream
from ldm.data.loader import DataConfig, Loader
from ldm.types import Batch
from tests.devices import DEVICES

STEPS = 4


def batches(workers: int) -> list[Batch]:
    loader = Loader(DataConfig(path="emoji", size=16), seed=3, micro_batch=4, workers=workers)
    return list(loader.batches(0, STEPS))


@pytest.mark.parametrize("device", DEVICES)
def test_batches_arrive_as_they_were_made(device: str) -> None:
    """Also where the copy does not wait, and the batch is gone before the card has done it."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("batches are pinned where a card is there")
    plain = batches(0)
    arrived = []
    for batch in batches(2):
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        assert {v.is_pinned() for v in tensors.values()} == {device == "cuda"}
        arrived.append({k: v.to(device, non_blocking=True) for k, v in tensors.items()})
        del batch, tensors
    assert len(arrived) == STEPS
    for made, there in zip(plain, arrived, strict=True):
        assert set(there) == {k for k, v in made.items() if isinstance(v, Tensor)}
        for key, value in there.items():
            assert value.device.type == device
            assert torch.equal(value.cpu(), made[key])


def test_all_tensors_of_a_batch_are_pinned_and_the_rest_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a card that is pretended: threads pin what they made; without threads nothing is."""
    pinned: list[int] = []

    def pin(x: Tensor) -> Tensor:
        pinned.append(x.data_ptr())
        return x.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(stream.torch.cuda, "is_available", lambda: True)
    plain = batches(0)
    assert pinned == []
    ahead = batches(1)
    kinds = sum(isinstance(v, Tensor) for v in plain[0].values())
    assert len(pinned) >= STEPS * kinds
    for a, b in zip(plain, ahead, strict=True):
        assert list(a) == list(b)
        same = [torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()]
        assert all(same)
