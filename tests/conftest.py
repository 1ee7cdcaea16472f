"""Settings of every test: offline, one thread, deterministic; what the machine lacks is skipped by marker."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LDM_AUTO_PRECISION", "fp32")  # the same losses on every processor; nothing is measured

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ldm", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ldm")
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in a shell's background job; what it starts would be deaf too
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_slurm = os.geteuid() == 0 and all(map(shutil.which, ("slurmctld", "slurmd", "munged", "ip")))
    for item in items:  # by their marks: keywords have the names of folders too
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("slurm") and not has_slurm:
            item.add_marker(pytest.mark.skip(reason="no SLURM daemons, or not root"))


@pytest.fixture(autouse=True)
def _global_seed() -> Iterator[None]:
    """Tests may draw from torch's global generator; each starts from the same state, whatever ran before."""
    torch.manual_seed(0)
    yield
    torch.set_grad_enabled(True)
