"""Python and packages: there, new enough, made for each other, importable."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ldm.cli.doctor.facts import EXTRAS, NEEDED
from ldm.cli.doctor.findings import Finding, Level, at
from ldm.cli.doctor.versions import fits, local, numbers, partner

PYTHON = (3, 10)
SLOW = 15.0
"""Seconds; it takes 2 to 4 from a local disk."""


def python(facts: dict[str, Any]) -> Iterator[Finding]:
    """The version, and a Python that pip may not write to."""
    version = at(facts, "python", "version")
    if numbers(version) and numbers(version)[:2] < PYTHON:
        yield Finding("stops", "python", f"Python {version}: ldm needs 3.10 or newer", "python3.12 -m venv .venv")


def needed(facts: dict[str, Any]) -> Iterator[Finding]:
    """Required packages that are missing or of another version; a torch that is missing is one finding with all."""
    have = facts.get("packages") or {}
    missing = [name for name in NEEDED if not have.get(name)]
    if missing:
        told = ", ".join(missing) if len(missing) < len(NEEDED) else "torch and every other package that ldm needs"
        yield Finding("stops", "packages-missing", f"not installed: {told}", "pip install .   # in the clone of ldm")
    for name, wanted in NEEDED.items():
        version = have.get(name)
        if version and not fits(version, wanted):
            asked = f'"{name}{wanted}"'
            yield Finding(
                "stops", "package-version", f"{name} is {version}; ldm needs {wanted}", f"pip install {asked}"
            )


def torch(facts: dict[str, Any]) -> Iterator[Finding]:
    """A torch that is installed and does not import, or takes very long to."""
    state, error = at(facts, "torch", "state"), at(facts, "torch", "error") or ""
    again = "pip install --force-reinstall torch torchvision"
    if state == "stuck":
        what = f"`import torch` has {error or 'no end'}; is the environment on a network disk that is slow or gone?"
        yield Finding("stops", "torch-stuck", what, "python -X importtime -c 'import torch' 2>&1 | tail")
    elif state == "broken" and re.search(r"(libcu\w+|libnv\w+|libnccl|libcudnn)[\w.]*", error):
        what = f"torch does not find a library of CUDA, or finds another version's: {error}"
        yield Finding("stops", "torch-libraries", what, f"unset LD_LIBRARY_PATH; {again}")
    elif state == "broken":
        yield Finding("stops", "torch-broken", f"torch is installed and does not import: {error}", again)
    seconds, worked = (at(facts, "torch", f"import_{name}") or 0.0 for name in ("seconds", "work_seconds"))
    busy = (at(facts, "cpu", "load") or 0.0) > (at(facts, "cpu", "usable") or 1)
    if seconds > SLOW and worked < seconds / 2 and not busy:
        what = f"`import torch` took {seconds:.0f} s, {worked:.0f} of them work: the environment's disk is slow"
        yield Finding("slows", "torch-slow-import", what, "python -m venv /tmp/ldm-venv   # on a local disk")
    if cut := at(facts, "torch", "cut_short"):
        yield Finding("slows", "torch-cut-short", f"the trial of torch and its kernels was not finished: {cut}")


def numpy(facts: dict[str, Any]) -> Iterator[Finding]:
    """A torch, or another package, that was built for NumPy 1."""
    told = " ".join([*(at(facts, "torch", "warnings") or []), at(facts, "torch", "error") or ""])
    if re.search(r"compiled using NumPy 1\.x|_ARRAY_API not found|Failed to initialize NumPy", told):
        version = at(facts, "packages", "numpy")
        what = f"torch was built for NumPy 1 and NumPy {version or 2} is installed: tensors do not turn into arrays"
        yield Finding("stops", "numpy-2", what, 'pip install "numpy<2"   # or a newer torch')


def torchvision(facts: dict[str, Any]) -> Iterator[Finding]:
    """torchvision of another torch, or for another CUDA."""
    mine, theirs = at(facts, "torch", "version"), at(facts, "packages", "torchvision")
    found = at(facts, "imports", "torchvision") or {"ok": True}
    if not theirs or at(facts, "torch", "state") != "ok":
        return
    pair = partner(mine or "")
    other = bool(pair) and numbers(theirs)[:2] != numbers(pair)
    builds = bool(local(mine) and local(theirs)) and local(mine) != local(theirs)
    if _late(found) or (found.get("ok") and not builds):
        return
    want = f'"torchvision=={pair}.*"' if pair and other else "torchvision"
    why = f": {found['error']}" if found.get("error") else f", built for {local(theirs)}, not {local(mine)}"
    level = "slows" if found.get("ok") else "stops"
    what = f"torchvision {theirs} does not fit torch {mine}{why}"
    yield Finding(level, "torchvision", what, f"pip install --force-reinstall --no-deps {want}")


def stuck(facts: dict[str, Any]) -> Iterator[Finding]:
    """Imports that were not over in time, of which nothing more is known."""
    names = [n for n, f in (facts.get("imports") or {}).items() if _late(f)]
    if names and at(facts, "torch", "state") == "ok":
        what = f"importing {', '.join(names)} was not over in time: a busy machine, a slow disk, or a lock that is held"
        yield Finding("slows", "import-stuck", what, f"python -X faulthandler -c 'import {names[0]}'")


def _late(found: dict[str, Any] | None) -> bool:
    return (at(found, "error") or "").startswith("no end")


def deepspeed(facts: dict[str, Any]) -> Iterator[Finding]:
    """DeepSpeed does not import: no compiler of CUDA, or anything else."""
    found = at(facts, "imports", "deepspeed")
    if not found or found.get("ok") or _late(found) or at(facts, "torch", "state") != "ok":
        return
    error = found.get("error") or ""
    if "CUDA_HOME" in error or "nvcc" in error:
        what = f"DeepSpeed does not import, as it finds no CUDA toolkit (nvcc): {error}"
        mend = "export CUDA_HOME=/usr/local/cuda   # where bin/nvcc is; without any: export DS_IGNORE_CUDA_DETECTION=1"
        yield Finding("stops", "deepspeed-cuda-home", what, mend)
    elif "mpi4py" in error:
        yield Finding("stops", "deepspeed-mpi", f"DeepSpeed takes this for an MPI job: {error}", "pip install mpi4py")
    else:
        mend = f'pip install --force-reinstall --no-deps "deepspeed{NEEDED["deepspeed"]}"'
        yield Finding(
            "stops", "deepspeed", f"DeepSpeed does not import: {error}; drawing works, training does not", mend
        )


def others(facts: dict[str, Any]) -> Iterator[Finding]:
    """Further packages that do not import; xformers and flash-attn are told of with the kernels."""
    levels: dict[str, Level] = {"open_clip": "stops", "transformers": "slows", "bitsandbytes": "slows"}
    for name, level in levels.items():
        found = at(facts, "imports", name)
        if found and not found.get("ok") and not _late(found) and at(facts, "torch", "state") == "ok":
            package = {"open_clip": "open_clip_torch"}.get(name, name)
            use = EXTRAS[name][1] if name in EXTRAS else "the CLIP towers"
            what = f"{package} does not import ({use}): {found.get('error')}"
            yield Finding(level, "import", what, f"pip install --upgrade --force-reinstall --no-deps {package}")


def extras(facts: dict[str, Any]) -> Iterator[Finding]:
    """Optional packages that are not there, and what they are for; xformers only where a GPU is."""
    have = facts.get("packages") or {}
    missing = {extra: use for name, (extra, use) in EXTRAS.items() if not have.get(name)}
    if not at(facts, "torch", "gpus"):
        missing.pop("xformers", None)
    if missing and have.get("torch"):
        told = "; ".join(f"{extra}: {use}" for extra, use in missing.items())
        yield Finding("note", "extras", f"optional, not installed: {told}", f'pip install "ldm[{",".join(missing)}]"')


def compiler(facts: dict[str, Any]) -> Iterator[Finding]:
    """torch.compile, and Triton below it, call a C++ compiler."""
    if at(facts, "torch", "state") == "ok" and not facts.get("compiler"):
        what = "no C++ compiler: engine.compile and --compile fail (Failed to find C compiler)"
        yield Finding(
            "note", "compiler", what, "apt install g++   # without root: conda install -c conda-forge cxx-compiler"
        )


CHECKS = (python, needed, torch, numpy, torchvision, stuck, deepspeed, others, compiler, extras)
