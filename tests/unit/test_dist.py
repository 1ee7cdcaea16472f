"""Ranks from the environment, and the collectives on real gloo processes."""

from __future__ import annotations

import pytest
import torch

from ldm import dist
from tests import ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "LDM_RANKS_FROM_SLURM")


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def who() -> tuple[int, int, int]:
    return dist.rank(), dist.world_size(), dist.local_rank()


def test_one_process_without_a_launcher(clean: pytest.MonkeyPatch) -> None:
    assert who() == (0, 1, 0)
    value = torch.arange(3.0)
    mean = dist.mean(value)
    assert torch.equal(mean, value)
    assert mean is not value
    assert dist.any_rank(True)
    assert not dist.any_rank(False)
    dist.barrier()


def test_slurm_counts_only_when_the_launcher_says_so(clean: pytest.MonkeyPatch) -> None:
    """Inside an allocation SLURM sets its variables for every process, also for one that is not a rank."""
    for name, value in {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}.items():
        clean.setenv(name, value)
    assert who() == (0, 1, 0)
    clean.setenv("LDM_RANKS_FROM_SLURM", "1")
    assert who() == (5, 8, 1)
    clean.setenv("RANK", "2")
    assert dist.rank() == 2


def test_say_is_rank_zero_on_standard_error(clean: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    dist.say("hello")
    clean.setenv("RANK", "1")
    dist.say("not this")
    captured = capsys.readouterr()
    assert captured.err == "hello\n"
    assert captured.out == ""


def collectives() -> tuple[list[float], bool, bool, list[float]]:
    own = torch.tensor([1.0, 10.0]) * (dist.rank() + 1)
    mean = dist.mean(own)
    dist.barrier()
    return mean.tolist(), dist.any_rank(dist.rank() == 1), dist.any_rank(False), own.tolist()


def test_mean_and_any_on_two_ranks() -> None:
    for rank, (mean, some, none, own) in enumerate(ranks.run(collectives, 2)):
        assert mean == [1.5, 15.0]
        assert own == [1.0 + rank, 10.0 + 10 * rank]
        assert some
        assert not none
