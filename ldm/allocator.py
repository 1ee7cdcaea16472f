"""How the C library keeps freed memory: on CPUs returning every large tensor costs page faults at the next one."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import sys

log = logging.getLogger(__name__)
# malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
LARGE = 1 << 30
"""Tensors above so many bytes still come from the kernel and return to it."""
PAD = 64 << 20
"""By how many bytes the heap grows at a time; they take memory only where they are used."""
_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


@functools.cache
def keep_freed_memory(device: str = "cpu") -> bool:
    """Let glibc keep what this process frees, for its next tensors, if it computes on the CPU; whether that was set.

    It holds for the whole process and to its end, whose memory then stays at its peak. Does nothing for other types of
    `device` (a GPU's host need not keep what it loaded), other C libraries and allocators, and where MALLOC_* or
    GLIBC_TUNABLES already say how memory is kept.
    """
    reason = _why_not(os.environ) if device == "cpu" else f"computes on {device}"
    if reason:
        log.debug("freed memory: as the C library has it (%s)", reason)
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # Either of the last two: before 2.35 no threshold above 32 MiB is taken.
    kept = mallopt(MMAP_THRESHOLD, LARGE) or mallopt(MMAP_MAX, 0)
    done = bool(kept and mallopt(TRIM_THRESHOLD, -1) and mallopt(TOP_PAD, PAD))  # -1: never
    log.debug("freed memory: %s", "kept" if done else "mallopt refused")
    return done


def _why_not(environment: os._Environ[str] | dict[str, str]) -> str:
    """Empty if glibc's malloc is in use and nobody has set it up, else the reason."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return "not glibc"
    for name in _ENVIRONMENT:
        if name in environment:
            return f"{name} is set"
    if "glibc.malloc." in environment.get("GLIBC_TUNABLES", ""):
        return "GLIBC_TUNABLES is set"
    preloaded = environment.get("LD_PRELOAD", "")
    return f"LD_PRELOAD is {preloaded!r}" if "malloc" in preloaded else ""
