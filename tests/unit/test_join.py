"""Ranks that find each other, or end with a sentence that names who is missing; real processes on a real port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm import dist

ROOT = Path(__file__).parents[2]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LDM_RANKS_FROM_SLURM",
         "LDM_JOIN_SECONDS")  # fmt: skip
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        (dict.fromkeys(WHOLE), ""),
        (dict.fromkeys(WHOLE, ""), ""),
        ({"RANK": None}, "^RANK is not set, but WORLD_SIZE is 2"),
        ({"WORLD_SIZE": None}, "^RANK is 1, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": None, "RANK": None}, "^LOCAL_RANK is 1, but WORLD_SIZE is not set"),
        ({"MASTER_ADDR": None}, "^MASTER_ADDR is not set, but WORLD_SIZE is 2"),
        ({"MASTER_PORT": None}, "^MASTER_PORT is not set, but WORLD_SIZE is 2"),
        ({"MASTER_PORT": "70000"}, r"^MASTER_PORT: 70000 is not in \[1, 65535\]"),
        ({"MASTER_PORT": "here"}, "^MASTER_PORT: 'here' is not a whole number"),
        ({"RANK": "3"}, r"^RANK: 3 is not in \[0, 1\], as WORLD_SIZE is 2"),
        ({"RANK": "-1"}, r"^RANK: -1 is not in \[0, 1\]"),
        ({"RANK": "one"}, "^RANK: 'one' is not a whole number"),
        ({"WORLD_SIZE": "two"}, "^WORLD_SIZE: 'two' is not a whole number"),
        ({"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0"}, "^WORLD_SIZE: must be at least 1, got 0"),
        ({"LOCAL_RANK": "2"}, r"^LOCAL_RANK: 2 is not in \[0, 1\]"),
        ({"LOCAL_WORLD_SIZE": "1"}, "^LOCAL_RANK: 1 is not below LOCAL_WORLD_SIZE, 1"),
        (
            {"LDM_RANKS_FROM_SLURM": "1", "RANK": None, "SLURM_PROCID": "x"},
            "^SLURM_PROCID: 'x' is not a whole number",
        ),
    ],
)
def test_the_variables_are_checked_together(
    changes: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**WHOLE, **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    if not said:
        dist.check()
        return
    with pytest.raises(ValueError, match=said) as error:
        dist.check()
    assert "unset what is left over" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_local_rank_beyond_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"^LOCAL_RANK: 1, but this machine has 1 GPUs"):
        dist.check()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(code: str, rank: int, port: int, world: int = 2, **env: str) -> subprocess.Popen[str]:
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", **ranks, "MASTER_PORT": str(port), **env},
    )  # fmt: skip


JOIN = """
import sys
from ldm import dist
try:
    dist.join()
except ValueError as error:
    print(error)
    sys.exit(2)
"""


def test_a_rendezvous_that_nobody_joins_and_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        taken = int(other.getsockname()[1])
        port = free_port()
        alone = start(JOIN, 0, port, world=3, LDM_JOIN_SECONDS="2")
        lost = start(JOIN, 1, free_port(), LDM_JOIN_SECONDS="2")
        blocked = start(JOIN, 0, taken, LDM_JOIN_SECONDS="2")
        told = [p.communicate(timeout=120)[0] for p in (alone, lost, blocked)]
    assert [p.returncode for p in (alone, lost, blocked)] == [2, 2, 2]
    assert told[0].startswith(f"ranks 1, 2 of 3 did not come to 127.0.0.1:{port} within 2 s; LDM_JOIN_SECONDS")
    assert told[1].startswith("rank 0 does not answer at 127.0.0.1:")
    assert told[2] == f"MASTER_PORT: {taken} is taken by another program; give another\n"
    assert all(text.count("\n") == 1 for text in told)


def test_a_rank_that_dies_is_named_by_the_others() -> None:
    code = """
import os, sys, time
import torch
from ldm import dist
dist.join()
value = dist.sums([float(dist.rank())])
print(value, flush=True)
if dist.rank() == 1:
    os._exit(9)
try:
    while True:
        dist.sums([1.0])
except RuntimeError as error:
    print(dist.lost(error), flush=True)
    os._exit(1)
"""
    port = free_port()
    processes = [start(code, r, port, world=3) for r in range(3)]
    told = [p.communicate(timeout=120)[0] for p in processes]
    assert all(text.startswith("[3.0]\n") for text in told)
    assert "rank 0: rank 1 does not answer any more" in told[0]
    assert "rank 2: rank 1 does not answer any more" in told[2]


def test_an_error_of_another_kind_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dist.lost(RuntimeError("connection closed by peer")) is None  # one process: there is nobody else
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert dist.lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert dist.lost(ValueError("connection closed by peer")) is None
    began = time.monotonic()
    assert dist.lost(RuntimeError("connection closed by peer")) is None  # no group was made
    assert time.monotonic() - began < 1


def test_under_torchrun_the_agent_holds_the_store(tmp_path: Path) -> None:
    script = tmp_path / "join.py"
    # A file a rank: both write to one pipe, where their lines may mix.
    script.write_text(JOIN + f"open(r'{tmp_path}/%d' % dist.rank(), 'w').write(str(dist.sums([1.0])))\n")
    env = {k: v for k, v in os.environ.items() if k not in NAMES} | {"PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--master-port", str(free_port()), script],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["[2.0]", "[2.0]"]
