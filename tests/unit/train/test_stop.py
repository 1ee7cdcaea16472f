"""Ctrl-C once and twice, SIGTERM before and in training: what is said, and the exit code; real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LOOP = """
import os, signal, sys, time
from ldm.train.stop import Stop, before_training
stop = Stop()
restore = stop.listen()
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(0.05)
print("asked" if stop.asked else "not asked")
"""
BEFORE = """
import os, signal, sys, time
from ldm.train.stop import before_training
with before_training():
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(5)
"""


def run(code: str, *signals: str, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *signals], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**os.environ, **env},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("signals", "code", "lines"),
    [
        (("SIGINT",), 0, ["stopping: finishing this step and saving (Ctrl-C again to end at once)"]),
        (("SIGTERM", "SIGTERM"), 0, ["stopping: finishing this step and saving (SIGTERM)"]),
        (("SIGTERM", "SIGINT"), 0, ["stopping: finishing this step and saving (SIGTERM)"]),
        (
            ("SIGINT", "SIGINT"),
            130,
            [
                "stopping: finishing this step and saving (Ctrl-C again to end at once)",
                "ended at once; the steps since the last checkpoint are lost",
            ],
        ),
    ],
)
def test_in_training(signals: tuple[str, ...], code: int, lines: list[str]) -> None:
    returned, out, err = run(LOOP, *signals)
    assert (returned, err.splitlines()) == (code, lines)
    assert out == ("asked\n" if code == 0 else "")


def test_other_ranks_say_nothing() -> None:
    assert run(LOOP, "SIGINT", RANK="1", WORLD_SIZE="2") == (0, "asked\n", "")


def test_before_training() -> None:
    code, _, err = run(BEFORE, "SIGTERM")
    assert code == 75
    assert err == "asked to stop (SIGTERM) before a step was made; run the same command again\n"
