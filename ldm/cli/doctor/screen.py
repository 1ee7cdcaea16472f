"""The facts and findings on one screen, fit to be pasted into a report: no host names, no user's name in paths."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Iterable, Iterator
from typing import Any

from ldm.cli.doctor.findings import Finding, at

WIDTH = 110
_LABEL = 11
_TELL = (
    "torchvision", "deepspeed", "xformers", "triton", "transformers", "open_clip_torch", "diffusers", "bitsandbytes",
    "numpy",
)  # fmt: skip


def anonymous(value: Any) -> Any:
    """The same with ~ for the home folder, in every string."""
    home = os.path.expanduser("~")
    if isinstance(value, str):
        return value.replace(home, "~") if len(home) > 1 else value
    if isinstance(value, dict):
        return {k: anonymous(v) for k, v in value.items()}
    return [anonymous(v) for v in value] if isinstance(value, list) else value


def text(facts: dict[str, Any], findings: list[Finding]) -> str:
    """The whole screen."""
    lines = [line for label, told in _rows(facts) for line in _row(label, told)]
    return "\n".join([*lines, "", *_findings(findings)])


def _row(label: str, told: str) -> list[str]:
    wrapped = textwrap.wrap(told, WIDTH - _LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{label if not i else '':<{_LABEL}}{line}" for i, line in enumerate(wrapped)]


def _findings(findings: list[Finding]) -> Iterator[str]:
    for f in findings:
        told = textwrap.wrap(anonymous(f.what), WIDTH - 8, break_long_words=False, break_on_hyphens=False)
        yield from (f"{f.level if not i else '':<8}{line}" for i, line in enumerate(told))
        if f.mend:
            yield f"        $ {anonymous(f.mend)}" if _is_command(f.mend) else f"        -> {anonymous(f.mend)}"
    count = sum(f.level == "stops" for f in findings)
    if count:
        yield f"{count} thing{'s' * (count > 1)} to mend before work can start."
    else:
        yield "Nothing stops work here."


def _is_command(mend: str) -> bool:
    """Whether it can be run as it stands: not a setting of a config, nor a sentence."""
    word = mend.split()[0]
    return word not in ("update", "mount") and ("=" not in word or word.split("=")[0].isupper())


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    python = facts["python"]
    yield "ldm", f"{facts['ldm']['version']}, looked at {time.strftime('%Y-%m-%d %H:%M %Z')}"
    where = f"{python['platform']}{', ' + python['libc'] if python.get('libc') else ''}"
    inside = f", in a container ({facts['container']})" if facts.get("container") else ""
    yield "python", f"{python['version']} ({python['environment']}), {where}{inside}"
    yield "cpu", _cpu(facts)
    yield "torch", _torch(facts)
    yield from _gpus(facts)
    for kind, kernels in (facts.get("attention") or {}).items():
        yield f"attn {kind}", _kernels(kernels)
    yield "packages", _packages(facts)
    yield "ranks", _ranks(facts)
    if facts.get("slurm"):
        yield "slurm", _slurm(facts["slurm"])
    yield "disks", _disks(facts)
    if told := ", ".join(f"{k}={v!r}" for k, v in sorted((facts.get("environment") or {}).items())):
        yield "variables", told
    for i, told in enumerate(_measured(facts.get("measured") or {})):
        yield "" if i else "measured", told


def _cpu(facts: dict[str, Any]) -> str:
    cpu = facts["cpu"]
    quota = f", a quota of {cpu['quota']:g}" if cpu.get("quota") else ""
    limit = f", limited to {cpu['limit_gb']:g}" if cpu.get("limit_gb") else ""
    load = "" if cpu.get("load") is None else f", load {cpu['load']:g}"
    cores = f"{cpu['usable']} of {cpu['cores']} cores{quota}"
    memory = f"{cpu['memory_gb']:g} GB of memory, {cpu['available_gb']:g} free{limit}"
    return f"{cpu['name']}, {cores}, bf16 instructions: {'yes' if cpu['bf16'] else 'no'}; {memory}{load}"


def _torch(facts: dict[str, Any]) -> str:
    torch = facts["torch"]
    if torch["state"] != "ok":
        return f"{torch['state']}{': ' + torch['error'] if torch.get('error') else ''}"
    made = f"for CUDA {torch['cuda_build']}" if torch.get("cuda_build") else "for CPUs"
    made = f"for ROCm {torch['hip_build']}" if torch.get("hip_build") else made
    told = [f"{torch['version']} ({made})", f"{torch['threads']} threads"]
    for kind, found in (torch.get("precision") or {}).items():
        times = f" ({found['fp32_ms']:g} ms in fp32, {found['bf16_ms']:g} in bf16)" if "fp32_ms" in found else ""
        told.append(f"precision auto on {kind}: {found.get('auto') or found.get('error')}{times}")
    if version := at(torch, "cuda", "cudnn"):
        told.append(f"cuDNN {version}")
    return ", ".join(told)


def _gpus(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    driver, gpus = facts.get("driver") or {}, at(facts, "torch", "gpus") or []
    if driver.get("version"):
        yield "driver", f"{driver['version']}, up to CUDA {driver.get('cuda')}"
    elif driver.get("error"):
        yield "driver", driver["error"]
    for i, gpu in enumerate(gpus):
        if "name" not in gpu:
            yield f"gpu {i}", str(gpu.get("error"))
            continue
        capability = ".".join(map(str, gpu["capability"]))
        free = f", {gpu['free_gb']:g} free" if gpu.get("free_gb") is not None else ""
        half = "bf16" if gpu["bf16"] else "no bf16"
        yield f"gpu {i}", f"{gpu['name']}, {gpu['memory_gb']:g} GB{free}, compute capability {capability}, {half}"
    if not gpus:
        seen = [g["name"] for g in driver.get("gpus") or []]
        yield "gpus", f"none that torch can use; nvidia-smi shows {', '.join(seen)}" if seen else "none"


def _kernels(kernels: dict[str, Any]) -> str:
    if "error" in kernels:
        return kernels["error"]
    runs = [f"{k} {v['ms']:g} ms" for k, v in kernels.items() if isinstance(v, dict) and v.get("runs")]
    fails = [
        f"{k} ({v.get('why')})" for k, v in kernels.items() if isinstance(v, dict) and not v.get("runs") and k != "ldm"
    ]
    chosen = kernels["ldm"] if isinstance(kernels.get("ldm"), str) else "?"
    told = f"{kernels.get('dtype')}: {', '.join(runs) or 'none'} run; ldm takes {chosen}"
    return told + (f"; not: {', '.join(fails)}" if fails else "")


def _packages(facts: dict[str, Any]) -> str:
    told = []
    for name in _TELL:
        version = at(facts, "packages", name)
        found = at(facts, "imports", {"open_clip_torch": "open_clip", "xformers": "xformers.ops"}.get(name, name))
        broken = bool(version and found and not found.get("ok"))
        told.append(f"{name} {version or '-'}{' (does not import)' if broken else ''}")
    return ", ".join(told)


def _ranks(facts: dict[str, Any]) -> str:
    if at(facts, "torch", "state") != "ok":
        return "unknown without torch"
    version = at(facts, "torch", "cuda", "nccl")
    nccl = f"NCCL {version}" if version else f"NCCL {'built in' if at(facts, 'torch', 'nccl') else 'no'}"
    files = facts.get("open_files")
    return f"gloo {'yes' if at(facts, 'torch', 'gloo') else 'no'}, {nccl}; {files or 'any number of'} open files"


def _slurm(slurm: dict[str, Any]) -> str:
    if not slurm.get("job"):
        return "its commands are here; this is no allocation"
    tasks = f"{slurm['tasks']} tasks" if slurm.get("tasks") else ""
    here = [f"{slurm['cores_here']} cores" if slurm.get("cores_here") else "", f"{slurm.get('gpus_here') or 0} GPUs"]
    here += [f"{slurm['cores_per_task']} cores a task" if slurm.get("cores_per_task") else ""]
    here += [f"{slurm['memory_gb']:g} GB" if slurm.get("memory_gb") else ""]
    ends = slurm.get("ends")
    until = f"; ends in {max(0, ends - time.time()) / 3600:.1f} h" if ends else ""
    count = len(slurm.get("nodes") or ["this"])
    nodes = f"{count} node{'s' * (count != 1)}"
    return f"job {slurm['job']}: {_joined([nodes, tasks])}; here {_joined(here)}{until}"


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(filter(None, parts))


def _disks(facts: dict[str, Any]) -> str:
    told = []
    for d in [*(facts.get("disks") or []), {"of": "/dev/shm"} | (facts.get("shm") or {}), {"of": "hub"} | facts["hub"]]:
        if d.get("free_gb") is not None:
            ends = "" if d.get("writable", True) else ", read-only for you"
            told.append(f"{d['of']}: {d['free_gb']:g} of {d['total_gb']:g} GB free{ends}")
    hub = facts["hub"]
    if hub.get("path"):
        told[-1] += (
            f", {hub['path']}{', offline' if hub.get('offline') else ''}, {'a' if hub.get('token') else 'no'} token"
        )
    return "; ".join(told) or "no answer"


def _measured(found: dict[str, Any]) -> Iterator[str]:
    for device, rates in (found.get("matrix_product_gflop_per_s") or {}).items():
        told = ", ".join(f"{k} {v:,.0f}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in rates.items())
        yield f"{device}: matrix product {told} GFLOP/s{_threads(found, device)}"
    memory = found.get("memory_gb_per_s") or {}
    if memory:
        yield "memory " + ", ".join(
            f"{k} {v:g} GB/s" if isinstance(v, float) else f"{k} {v}" for k, v in memory.items()
        )
    disk = found.get("disk") or {}
    told = [f"{k} {disk[f'{k}_gb_per_s']:g} GB/s" for k in ("write", "read") if f"{k}_gb_per_s" in disk]
    told += [disk["error"]] if disk.get("error") else []
    parts = [f"disk {', '.join(told)}"] if told else []
    for backend in ("gloo", "nccl"):
        reduced = found.get(f"all_reduce_{backend}")
        if reduced:
            parts.append(f"all-reduce {backend}, {reduced['ranks']} ranks: {_reduced(reduced)}")
    if found.get("error"):
        parts.append(found["error"])
    if parts:
        yield "; ".join(parts)


def _threads(found: dict[str, Any], device: str) -> str:
    count = found.get("threads")
    return f" ({count} thread{'s' * (count != 1)})" if device == "cpu" and count else ""


def _reduced(found: dict[str, Any]) -> str:
    if "error" in found:
        return found["error"]
    rate = f"{found['bus_gb_per_s']:g} GB/s, " if "bus_gb_per_s" in found else ""
    return f"{rate}{found['microseconds']:g} us for a number"
