"""The facts of a machine and an environment, as a tree of plain data; nothing is judged here."""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import hostlist
from ldm import __version__
from ldm.cli.doctor.children import IMPORTING, Answer, Question, ask, ours

Facts = dict[str, Any]
"""Sections by name: python, cpu, torch, driver, attention, packages, disks, shm, hub, slurm, ..., and measured."""
NEEDED = {
    "torch": ">=2.4",
    "torchvision": ">=0.19",
    "deepspeed": ">=0.19.8,<0.20",
    "open_clip_torch": ">=3.0",
    "webdataset": ">=1.0",
    "omegaconf": ">=2.3",
    "einops": ">=0.8",
    "safetensors": ">=0.4",
    "huggingface-hub": ">=0.24",
    "fsspec": ">=2024.2",
    "numpy": ">=1.26",
    "pillow": ">=10.3",
    "tqdm": ">=4.66",
    "tensorboard": ">=2.16",
    "psutil": ">=5.9",
    **({"tomli": ">=2"} if sys.version_info < (3, 11) else {}),
}
EXTRAS = {
    "xformers": ("xformers", "another attention kernel on NVIDIA GPUs"),
    "transformers": ("transformers", "the text encoders of SD3, FLUX.1, PixArt, Z-Image (T5, Qwen3)"),
    "bitsandbytes": ("bitsandbytes", "AdamW with 8-bit state, frozen weights of 4 bits"),
    "pytorch-optimizer": ("optimizers", "the optimizers CAME, Prodigy and schedule-free AdamW"),
    "wandb": ("wandb", "logs at Weights & Biases"),
    "s3fs": ("remote", "shards on S3 or behind HTTP"),
    "gcsfs": ("gcs", "shards on Google Cloud Storage"),
    "simplejpeg": ("fast", "faster JPEG decoding"),
    "pyarrow": ("parquet", "captions in Parquet files"),
    "beautifulsoup4": ("captions", "captions cleaned as diffusers cleans them"),
    "gradio": ("web", "the studio, and drawing in a browser"),
    "scipy": ("eval", "distances between sets of pictures"),
    "shtab": ("completion", "verbs and options completed by the shell"),
}
"""One package of each optional extra, the extra, and what it is for."""
ALSO = ("triton", "flash-attn", "diffusers", "peft")
"""Not of ours, but what they are is asked in every report."""
IMPORTED = (
    "torchvision", "deepspeed", "open_clip", "transformers", "xformers.ops", "flash_attn", "bitsandbytes",
)  # fmt: skip
"""What is imported to see whether it can be, where it is installed."""
_DISTRIBUTION = {"open_clip": "open_clip_torch", "xformers.ops": "xformers", "flash_attn": "flash-attn"}
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_HOME", "LD_LIBRARY_PATH", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "OMP_PROC_BIND", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE",
    "GLOO_SOCKET_IFNAME", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "LDM_AUTO_PRECISION", "DS_ACCELERATOR",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "TMPDIR", "CC", "CXX",
)  # fmt: skip
"""That change what the packages do; none of them holds a secret."""


def collect(folder: Path, limit: float) -> Facts:
    """All facts but the measured ones; `folder` is where runs are written, `limit` the seconds of one trial."""
    packages = _packages()
    smi = shutil.which("nvidia-smi")
    there = [n for n in IMPORTED if packages.get(_DISTRIBUTION.get(n, n))]
    questions = [
        ours("files", str(folder.absolute()), _temporary(), limit=min(limit, 10.0)),
        ours("torch", limit=limit),
        ours("imports", *there, limit=2 * limit, **_quiet()),  # several
    ]
    if smi:
        query = "--query-gpu=name,memory.total,driver_version,compute_cap"
        questions += [Question((smi,), 20.0), Question((smi, query, "--format=csv,noheader,nounits"), 20.0)]
    files, torch, imports, *driver = ask(questions)
    return {
        "ldm": {"version": __version__},
        "python": _python(),
        "cpu": cpu(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "packages": packages,
        "torch": _torch(torch, packages.get("torch")),
        "attention": torch.values.get("attention", {}),
        "driver": _driver(smi, driver),
        "imports": _imports(there, imports, limit),
        "compiler": next(
            filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "c++", "clang++"))), None
        ),
        "container": _container(),
        "slurm": slurm(os.environ),
        "open_files": _open_files(),
        "hub": {"error": files.ended},
        "disks": [],
        "shm": None,
    } | files.values


def _quiet() -> dict[str, str]:
    """What keeps imports from printing."""
    return {"DEEPSPEED_LOG_LEVEL": "warning", "TRANSFORMERS_VERBOSITY": "error"}


def _temporary() -> str:
    import tempfile

    return tempfile.gettempdir()


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in (*NEEDED, *EXTRAS, *ALSO):
        found[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _python() -> Facts:
    kind = "conda" if os.environ.get("CONDA_PREFIX") == sys.prefix else "venv" if sys.prefix != sys.base_prefix else ""
    libc = " ".join(platform.libc_ver()).strip()
    return {
        "version": platform.python_version(),
        "environment": kind or "system",
        "executable": sys.executable,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": libc or None,
    }


# --- the machine ----------------------------------------------------------------------------------------------------
def cpu() -> Facts:
    """Name, cores of the machine, of this process and of its quota, memory in GB and its limit."""
    lines = _read("/proc/cpuinfo").splitlines()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Hardware"))]
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    return {
        "name": named[0] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "usable": usable,
        "quota": _quota(),
        "bf16": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        "memory_gb": round(int(memory.get("MemTotal", 0)) * 1024 / 1e9, 1),
        "available_gb": round(int(memory.get("MemAvailable", 0)) * 1024 / 1e9, 1),
        "limit_gb": _memory_limit(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cgroups(controller: str) -> list[Path]:
    """This process's control groups, the innermost first: of version 2, then of version 1."""
    found: list[Path] = []
    for line in _read("/proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, inside = rest.partition(":")
        if number == "0" or controller in names.split(","):
            base = Path("/sys/fs/cgroup") / ("" if number == "0" else names)
            place = base / inside.strip("/")
            found += [p for p in (place, *place.parents) if p == base or base in p.parents]
    return found


def _quota() -> float | None:
    """Cores that the control group allows, the fewest of all levels; None without a limit."""
    found = []
    for place in _cgroups("cpu"):
        words = _read(place / "cpu.max").split()
        old = [_read(place / f"cpu.cfs_{n}_us").strip() for n in ("quota", "period")]
        for share, period in (words[:2] if len(words) == 2 else ("", ""), old):
            if share.isdigit() and period.isdigit() and int(period):
                found.append(round(int(share) / int(period), 2))
    return min(found, default=None)


def _memory_limit() -> float | None:
    """GB that the control group allows; None without a limit."""
    found = [
        int(text)
        for place in _cgroups("memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (text := _read(place / name).strip()).isdigit()
    ]
    least = min(found, default=1 << 60)
    return round(least / 1e9, 1) if least < 1 << 50 else None


def _container() -> str | None:
    for path, name in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if os.path.exists(path):
            return name
    for variable, name in (
        ("APPTAINER_CONTAINER", "apptainer"),
        ("SINGULARITY_CONTAINER", "singularity"),
        ("KUBERNETES_SERVICE_HOST", "kubernetes"),
    ):
        if os.environ.get(variable):
            return name
    return None


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def slurm(env: Mapping[str, str]) -> Facts | None:
    """What the allocation gives on this node; `job` is None where only SLURM's commands are; None without SLURM."""
    if "SLURM_JOB_ID" not in env:
        return {"job": None} if shutil.which("sbatch") else None
    number = lambda name: int(env[name]) if env.get(name, "").isdigit() else None  # noqa: E731
    nodes = env.get("SLURM_JOB_NODELIST", "")
    with contextlib.suppress(ValueError):
        nodes = " ".join(hostlist.expand(nodes))
    gpus = env.get("SLURM_GPUS_ON_NODE") or env.get("SLURM_STEP_GPUS") or env.get("SLURM_JOB_GPUS") or ""
    memory = number("SLURM_MEM_PER_NODE")
    return {
        "job": env["SLURM_JOB_ID"],
        "partition": env.get("SLURM_JOB_PARTITION"),
        "nodes": nodes.split(),
        "node": env.get("SLURMD_NODENAME"),
        "tasks": number("SLURM_NTASKS"),
        "tasks_here": number("SLURM_NTASKS_PER_NODE"),
        "cores_here": number("SLURM_CPUS_ON_NODE"),
        "cores_per_task": number("SLURM_CPUS_PER_TASK"),
        "gpus_here": int(gpus) if gpus.isdigit() else len([g for g in gpus.split(",") if g]),
        "memory_gb": None if memory is None else round(memory * 2**20 / 1e9, 1),
        "ends": number("SLURM_JOB_END_TIME"),
        "restarts": number("SLURM_RESTART_COUNT") or 0,
    }


# --- what children found --------------------------------------------------------------------------------------------
def _torch(answer: Answer, version: str | None) -> Facts:
    """`state` is ok, missing, broken (it does not import) or stuck; what came before an end is kept."""
    found = dict(answer.values.get("torch", {}))
    error = found.get("error") or ("" if found else answer.ended)
    state = "ok" if found and not error else "missing" if version is None else "broken"
    if not found and answer.ended.startswith("no end"):
        state = "stuck"
    warned = [line.strip() for line in answer.log.splitlines() if re.search(r"Warning|NumPy 1\.x|WARNING", line)]
    return found | {
        "state": state,
        "error": error or None,
        "version": found.get("version") or version,
        "cut_short": answer.ended if found and answer.ended else None,
        "warnings": list(dict.fromkeys(line[:300] for line in warned))[:8],
        **{k: answer.values.get(k, default) for k, default in (("gpus", []), ("cuda", {}), ("precision", {}))},
    }


def _imports(names: list[str], first: Answer, limit: float) -> dict[str, Facts]:
    """Each package's import: ok and its seconds, or why not. One that takes the process with it is left out next."""
    found: dict[str, Facts] = {}
    answer, left = first, list(names)
    while left:
        said = {name: rest for name, _, rest in (p.partition("\n") for p in answer.log.split(IMPORTING)[1:])}
        found |= {n: answer.values[n] | {"said": said.get(n, "")[-2000:]} for n in left if n in answer.values}
        left = [n for n in left if n not in found]
        if left:
            error = answer.ended or "no answer"
            found[left[0]] = {"ok": False, "error": error, "said": said.get(left[0], "")[-2000:]}
            left = left[1:]
            if left:
                answer = ask([ours("imports", *left, limit=limit, **_quiet())])[0]
    return found


def _driver(smi: str | None, answers: list[Answer]) -> Facts:
    """What nvidia-smi says, and whether there is an NVIDIA card for which it should be there."""
    found: Facts = {
        "nvidia_smi": bool(smi),
        "devices": len(glob.glob("/dev/nvidia[0-9]*")),
        "cards": sum(_read(p).strip() == "0x10de" for p in glob.glob("/sys/bus/pci/devices/*/vendor") if _shows(p)),
        "error": None, "version": None, "cuda": None, "gpus": [],
    }  # fmt: skip
    if not answers:
        return found
    page, rows = answers
    if page.ended:
        found["error"] = " ".join(page.log.split())[:300] or page.ended
        return found
    version, cuda = (re.search(rf"{name} Version:\s*([\d.]+)", page.log) for name in ("Driver", "CUDA"))
    for row in rows.log.splitlines() if not rows.ended else ():
        name, memory, *rest = [cell.strip() for cell in row.split(",")] + [""]
        gb = round(float(memory) * 2**20 / 1e9, 1) if memory.replace(".", "", 1).isdigit() else None
        found["gpus"].append({"name": name, "memory_gb": gb, "capability": rest[1] if len(rest) > 1 else None})
    return found | {"version": version and version[1], "cuda": cuda and cuda[1]}


def _shows(vendor: str) -> bool:
    """Whether the PCI device is a display or 3D controller."""
    return _read(Path(vendor).with_name("class")).startswith("0x03")
