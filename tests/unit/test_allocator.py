"""Kept memory is seen by the kernel's count of page faults, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ldm import allocator

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
CONVOLUTIONS = """
import resource, sys
import torch
from ldm.allocator import keep_freed_memory
torch.set_num_threads(1)
done = keep_freed_memory() if sys.argv[1] == "1" else None
layer, x = torch.nn.Conv2d(16, 64, 3, padding=1), torch.randn(8, 16, 160, 160)  # 52 MB out, above any default threshold
def forward():
    with torch.no_grad():
        torch.nn.functional.silu(layer(x)).sum()
for _ in range(3):
    forward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    forward()
used = resource.getrusage(resource.RUSAGE_SELF)
print(done, used.ru_minflt - before, used.ru_maxrss)
"""


def measured(code: str, *argv: str, **environment: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    clean |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *argv], env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def glibc() -> bool:
    return not allocator._why_not({})


@LINUX
def test_kept_memory_takes_no_page_faults_and_no_higher_peak() -> None:
    if not glibc():
        pytest.skip("another C library")
    said, faults, peak = measured(CONVOLUTIONS, "0")
    assert said == "None"
    assert int(faults) > 4 * 2 * 52_000_000 / 4096 * 0.5  # both outputs of every pass come back as new pages
    said, kept, kept_peak = measured(CONVOLUTIONS, "1")
    assert said == "True"
    assert int(kept) < int(faults) / 50
    assert int(kept_peak) < 1.1 * int(peak)


SPAN = """
import ctypes, sys
from ldm.allocator import keep_freed_memory
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
assert keep_freed_memory()
import torch
whole = rss()
for i in range(60):  # lives of many sizes and lengths, as in a long run of other shapes
    held = [torch.ones(1 + (7919 * (i * j + 1)) % 3_000_000) for j in range(12)]
    held = held[::2]
print((rss() - whole) / 2**20)
"""


@LINUX
def test_a_long_run_of_other_sizes_does_not_grow() -> None:
    if not glibc():
        pytest.skip("another C library")
    assert float(measured(SPAN)[0]) < 3 * 12 * 12  # MB; all that live at once take at most 12 x 12 MB


@LINUX
@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "1000000"},
        {"MALLOC_MMAP_THRESHOLD_": "100000"},
        {"GLIBC_TUNABLES": "glibc.malloc.top_pad=1000"},
        {"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"},
    ],
)
def test_what_the_user_has_set_stays(environment: dict[str, str]) -> None:
    if not glibc():
        pytest.skip("another C library")
    assert next(iter(environment)) in allocator._why_not(environment)


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert allocator._why_not({}) == "not glibc"
    monkeypatch.setattr("sys.platform", "darwin")
    assert allocator._why_not({}) == "not glibc"


def test_the_host_of_a_gpu_keeps_nothing() -> None:
    assert not allocator.keep_freed_memory("cuda")


def test_importing_sets_nothing() -> None:
    code = "import ldm.pipeline, ldm.allocator; print(ldm.allocator.keep_freed_memory.cache_info().currsize)"
    assert measured(code) == ["0"]
