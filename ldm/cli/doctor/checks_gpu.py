"""Cards, their driver, the torch that is to use them, and the attention kernels on them.

Which wheels there are: torch's own support matrix. CUDA 13 begins with compute capability 7.5 and driver 580; CUDA 12.6
is built up to torch 2.14 and has 5.0 to 9.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ldm.cli.doctor.findings import Finding, at
from ldm.cli.doctor.versions import covered, encoded_cuda, local, numbers

WHEELS = "https://download.pytorch.org/whl"
NEW = "pip install --force-reinstall torch torchvision"
"""On Linux the default wheels are those of the newest CUDA."""
OLD = f'pip install --force-reinstall "torch<2.15" torchvision --index-url {WHEELS}/cu126'
DRIVER_OF_13 = "580"


def driver(facts: dict[str, Any]) -> Iterator[Finding]:
    """A card without a driver, or a driver that does not answer."""
    found = facts.get("driver") or {}
    error, cards = found.get("error") or "", found.get("cards") or 0
    if "version mismatch" in error.lower():
        what = f"the driver was updated and its kernel module was not: {error}"
        yield Finding("stops", "driver-mismatch", what, "sudo reboot   # in a container: restart it after the host")
    elif "couldn't communicate" in error or "No devices were found" in error:
        yield Finding(
            "stops", "driver-not-loaded", f"the driver does not run: {error}", "sudo modprobe nvidia; dmesg | tail"
        )
    elif error:
        what = f"nvidia-smi fails: {error}"
        yield Finding("stops" if cards or found.get("devices") else "note", "driver", what, "nvidia-smi; dmesg | tail")
    elif (
        not found.get("nvidia_smi") and (cards or found.get("devices")) and not at(facts, "torch", "cuda", "available")
    ):
        if facts.get("container"):
            what = "there is an NVIDIA card, and this container was not given it"
            mend = "docker run --gpus all ...   # with nvidia-container-toolkit on the host; apptainer: --nv"
            yield Finding("stops", "container-without-gpu", what, mend)
        else:
            mend = "sudo apt install nvidia-driver-580-server   # or your system's package; then reboot"
            yield Finding("stops", "driver-missing", "there is an NVIDIA card and no driver for it", mend)


def build(facts: dict[str, Any]) -> Iterator[Finding]:
    """GPUs that nvidia-smi shows and torch does not use: the wrong build, hidden, or a driver that is too old."""
    gpus = at(facts, "driver", "gpus") or []
    if not gpus or at(facts, "torch", "state") != "ok" or at(facts, "torch", "cuda", "available"):
        return
    version, made = at(facts, "torch", "version"), at(facts, "torch", "cuda_build")
    there = f"{len(gpus)} x {gpus[0]['name']}"
    error, hidden = at(facts, "torch", "cuda", "error") or "", at(facts, "environment", "CUDA_VISIBLE_DEVICES")
    if at(facts, "torch", "hip_build"):
        what = f"torch {version} is built for AMD, and the card is NVIDIA's ({there})"
        yield Finding("stops", "torch-rocm", what, _fitting(facts))
    elif not made:
        what = f"torch {version} is built for CPUs alone, and nvidia-smi shows {there}"
        yield Finding("stops", "torch-cpu-build", what, _fitting(facts))
    elif hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        what = f"CUDA_VISIBLE_DEVICES={hidden!r} hides {there}"
        yield Finding("stops", "gpu-hidden", what, "unset CUDA_VISIBLE_DEVICES")
    elif _too_old(facts):
        have = at(facts, "driver", "version") or "?"
        what = f"torch {version} is for CUDA {made}, and driver {have} goes up to CUDA {_driver_cuda(facts)}"
        newer = f"update the driver to {DRIVER_OF_13} or newer, or: " if numbers(made)[:1] == (13,) else ""
        yield Finding("stops", "driver-too-old", what, newer + _fitting(facts))
    else:
        why = f": {error}" if error else ""
        what = f"nvidia-smi shows {there}, and torch {version} cannot use CUDA{why}"
        yield Finding("stops", "cuda-unusable", what, "python -c 'import torch; torch.cuda.init()'; dmesg | tail")


def _driver_cuda(facts: dict[str, Any]) -> str:
    """The newest CUDA that the driver knows: what nvidia-smi or torch says."""
    told = re.search(r"found version (\d+)", at(facts, "torch", "cuda", "error") or "")
    if told:
        return ".".join(map(str, encoded_cuda(int(told[1]))))
    return at(facts, "driver", "cuda") or ""


def _too_old(facts: dict[str, Any]) -> bool:
    """Within a major version of CUDA every driver runs every build."""
    told = "driver on your system is too old" in (at(facts, "torch", "cuda", "error") or "")
    mine, theirs = numbers(at(facts, "torch", "cuda_build")), numbers(_driver_cuda(facts))
    return told or bool(mine and theirs and theirs[0] < mine[0])


def _fitting(facts: dict[str, Any]) -> str:
    """The line that installs a torch for this driver and these cards."""
    known = numbers(_driver_cuda(facts))
    capabilities = [numbers(g.get("capability")) for g in at(facts, "driver", "gpus") or []]
    older = any((0,) < c < (7, 5) for c in capabilities)
    if known and known[0] < 12:
        return f"update the driver to {DRIVER_OF_13} or newer, then: {NEW}"
    return OLD if older or (known and known[0] == 12) else NEW


def cards(facts: dict[str, Any]) -> Iterator[Finding]:
    """Each kind of card: code for it in torch, whether it answers, bfloat16, memory that others hold."""
    built = at(facts, "torch", "cuda", "architectures") or []
    seen: set[str] = set()
    for number, gpu in enumerate(at(facts, "torch", "gpus") or []):
        name, capability = gpu.get("name") or f"GPU {number}", tuple(gpu.get("capability") or ())
        if capability and not at(facts, "torch", "hip_build"):
            dotted = ".".join(map(str, capability))
            if name not in seen and built and not covered(capability, built):
                what = f"torch has no code for {name} (compute capability {dotted}); it has {' '.join(built)}"
                mend = OLD if capability < (7, 5) else NEW.replace("install", "install --upgrade")
                yield Finding("stops", "no-kernel-image", what, mend)
            elif gpu.get("error"):
                yield Finding(
                    "stops", "gpu-fails", f"GPU {number}, {name}: {gpu['error']}", "nvidia-smi; dmesg | grep -i xid"
                )
            if name not in seen and not gpu.get("bf16"):
                what = f"{name} (compute capability {dotted}) has no bfloat16; precision auto is {_auto(facts)} there"
                yield Finding("slows", "no-bf16", what, "train.engine.precision=fp16   # --precision fp16 when drawing")
        seen.add(name)
        total, free = gpu.get("memory_gb"), gpu.get("free_gb")
        if total and free is not None and free < 0.8 * total:
            what = f"GPU {number}: {free:g} of {total:g} GB are free; another process holds the rest"
            mend = "nvidia-smi --query-compute-apps=pid,used_memory --format=csv"
            yield Finding("stops" if free < 1 else "slows", "gpu-memory-taken", what, mend)


def _auto(facts: dict[str, Any]) -> str:
    return at(facts, "torch", "precision", "cuda", "auto") or "fp32"


def attention(facts: dict[str, Any]) -> Iterator[Finding]:
    """xformers and flash-attn that do not fit this torch, kernels that do not run, kernels that answer wrongly."""
    yield from _xformers(facts)
    flash = at(facts, "imports", "flash_attn")
    if flash and not flash.get("ok") and at(facts, "torch", "state") == "ok":
        what = (
            f"flash-attn was built for another torch; ldm does not use it, transformers tries to: {flash.get('error')}"
        )
        yield Finding("slows", "flash-attn", what, "pip uninstall flash-attn")
    for kind, kernels in (facts.get("attention") or {}).items():
        tried = {k: v for k, v in kernels.items() if isinstance(v, dict)}
        for name, found in tried.items():
            if (found.get("why") or "").startswith("wrong by"):
                what = f"attention on {kind}: {name} answers {found['why']} in {kernels.get('dtype')}"
                yield Finding("stops", "kernel-wrong", what, f"pip install --force-reinstall {_package(name)}")
        if kind == "cuda" and tried and not any(tried.get(n, {}).get("runs") for n in ("flash", "efficient", "cudnn")):
            what = "attention on cuda: only the plain kernel runs; it holds all weights of a layer at once"
            yield Finding("slows", "attention-plain", what, NEW)


def _package(kernel: str) -> str:
    return kernel if kernel in ("xformers", "flash-attn") else "torch"


def _xformers(facts: dict[str, Any]) -> Iterator[Finding]:
    version, found = at(facts, "packages", "xformers"), at(facts, "imports", "xformers.ops") or {}
    if not version or at(facts, "torch", "state") != "ok":
        return
    said = " ".join([*(at(facts, "torch", "warnings") or []), found.get("error") or "", found.get("said") or ""])
    made = re.search(r"built for:?\s+PyTorch ([\w.+]+)(?: with CUDA (\d+))?\s*\(you have ([\w.+]+)\)", said)
    runs = at(facts, "attention", "cuda", "xformers")
    mend = "pip install --upgrade --force-reinstall xformers   # or: pip uninstall xformers, SDPA is as good"
    if made:
        cpu = local(made[3]) == "cpu"
        what = f"xformers {version} was built for torch {made[1]}, and torch is {made[3]}: it does not run"
        yield Finding("slows", "xformers", what, _fitting(facts) if cpu and at(facts, "driver", "gpus") else mend)
    elif found and not found.get("ok"):
        yield Finding("slows", "xformers", f"xformers {version} does not import: {found.get('error')}", mend)
    elif runs and not runs.get("runs"):
        yield Finding("slows", "xformers", f"xformers {version} does not run: {runs.get('why')}", mend)
    elif not at(facts, "torch", "gpus"):
        yield Finding("note", "xformers-idle", f"xformers {version} is installed; without a GPU it is not used")


CHECKS = (driver, build, cards, attention)
