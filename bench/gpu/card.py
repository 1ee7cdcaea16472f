"""Which card this is: its makers' figures by its name, or measured ones."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.timing import machine
from ldm.cli.doctor.measures import copies, product
from ldm.plan.hardware import HARDWARE, Hardware

NEAR = 0.12
"""How far a card's memory may be from the figure that its makers print, which some of them mean as 2^30 bytes."""
_OTHERS = {"ti", "super", "d", "laptop", "mobile", "max", "pcie", "nvl", "mig"}
"""Words that make another card of a name; A100s have the same products with them."""
_SAME = {"a100"}
LINKS = 16.0
"""GB/s between cards and nodes of a card that is not known; nothing here is sent."""


def recognised(name: str, memory: float) -> Hardware | None:
    """The card of a driver's name ("NVIDIA A100-SXM4-80GB") and so many bytes; None where it is not in the list."""
    words = re.findall(r"[a-z0-9]+", name.lower().replace("rtx ", "rtx"))
    found = []
    for hardware in HARDWARE.values():
        model = hardware.name.split("-")[0]
        at = next((i for i, word in enumerate(words) if word == model), None)
        joined = next((i + 1 for i in range(len(words) - 1) if words[i] + words[i + 1] == model), None)
        at = at if joined is None else joined
        if at is None or (model not in _SAME and _OTHERS & set(words[at + 1 :])):
            continue
        apart = min(abs(memory / (hardware.memory * unit) - 1) for unit in (1e9, 2**30))
        found.append((apart, hardware))
    apart, hardware = min(found, key=lambda pair: pair[0], default=(1.0, None))
    return hardware if apart < NEAR else None


def measured(device: str) -> dict[str, float]:
    """TFLOP/s of matrix products in bf16 and float32, and GB/s of the memory, read and written."""
    name = "cuda:0" if device == "cuda" else device
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        found = {"bf16": product(torch, name, torch.bfloat16) / 1e3, "fp32": product(torch, name, torch.float32) / 1e3}
        return found | {"memory": copies(torch, name, name)}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def hardware_of(name: str, memory: float, rates: dict[str, float], device: str) -> tuple[Hardware, str]:
    """The card for the planner, and where its peak rate is from: "maker" or "measured"."""
    known = recognised(name, memory)
    if known is not None:
        return known, "maker"
    own = Hardware(
        name=name, memory=memory / 1e9, matmul=rates["bf16"], matmul_fp32=rates["fp32"], bandwidth=rates["memory"],
        inside=LINKS, outside=LINKS, host=device == "cpu",
    )  # fmt: skip
    return own, "measured"


def facts(device: str) -> dict[str, Any]:
    """The machine: card, driver, torch, CUDA; the card's rates, and the one that shares are of (`peak_tflops`)."""
    import psutil

    told = machine(torch.get_num_threads(), [])
    found: dict[str, Any] = {k: told[k] for k in ("cpu", "cores_of_machine", "torch")}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda, "device": device, "driver": _driver()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "memory_bytes": properties.total_memory}
        found |= {"capability": f"{properties.major}.{properties.minor}", "cudnn": torch.backends.cudnn.version()}
    else:
        found |= {"card": told["cpu"] or "cpu", "memory_bytes": psutil.virtual_memory().total}
        found |= {"capability": None, "cudnn": None, "cuda": None, "driver": None}
    rates = measured(device)
    hardware, source = hardware_of(found["card"], found["memory_bytes"], rates, device)
    found |= {"known_as": hardware.name if source == "maker" else None, "peak_of": source}
    found |= {"peak_tflops": hardware.matmul, "measured_tflops": rates["bf16"], "measured_gb_per_s": rates["memory"]}
    return found | {"rates": rates, "packages": packages()}


def hardware_from(found: dict[str, Any]) -> Hardware:
    """The card of `facts`."""
    return hardware_of(found["card"], found["memory_bytes"], found["rates"], found["device"])[0]


def _driver() -> str | None:
    try:
        argv = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.split() or [None])[0] if done.returncode == 0 else None


def main(argv: list[str]) -> int:
    """Write `facts` of a device to a file: `python -m bench.gpu.card RESULT DEVICE`."""
    path, device = Path(argv[0]), argv[1]
    if device == "cuda" and not torch.cuda.is_available():
        return 3
    path.write_text(json.dumps(facts(device)), encoding="utf-8")
    return 0


OPTIONAL = (
    "triton",
    "diffusers",
    "peft",
    "transformers",
    "deepspeed",
    "xformers",
    "open_clip",
    "bitsandbytes",
    "pytest",
)
"""Packages that rows or tests need, by the names that are imported."""


def packages() -> dict[str, str | None]:
    """Versions of what is installed; None where it is not. Nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    found: dict[str, str | None] = {}
    for name in OPTIONAL:
        try:
            there = find_spec(name) is not None
            found[name] = version({"open_clip": "open_clip_torch"}.get(name, name)) if there else None
        except (PackageNotFoundError, ValueError):
            found[name] = "unknown"
        except ImportError:
            found[name] = None
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
