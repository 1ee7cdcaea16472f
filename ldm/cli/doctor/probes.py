"""What is tried in a process of its own: `python -m ldm.cli.doctor.probes files|torch|imports ...`.

Each trial reports as soon as it knows (`children.say`), because the next one may take the process with it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.cli.doctor.children import IMPORTING, in_a_line, say

SHAPE = (1, 4, 256, 64)
"""Rows, heads, tokens, width of a head in which attention is tried."""
APART = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
"""How far a kernel's answer may be from the plain one's in float32, as a share of the largest number."""


def main(argv: list[str]) -> int:
    """Run one trial."""
    {"files": files, "torch": try_torch, "imports": imports}[argv[0]](*argv[1:])
    return 0


# --- files: a dead network disk hangs whoever looks at it ------------------------------------------------------------
def files(folder: str, temporary: str) -> None:
    """Free space and permission of the folders that are written to, of /dev/shm, and of the hub's cache."""
    say("disks", [{"of": "runs"} | disk(Path(folder)), {"of": "temporary files"} | disk(Path(temporary))])
    say("shm", disk(Path("/dev/shm")) if os.path.isdir("/dev/shm") else None)
    say("hub", hub())


def disk(path: Path) -> dict[str, Any]:
    """GB, and whether a file can be written there; of a path that is not there, its nearest folder that is."""
    there = next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))
    found: dict[str, Any] = {"path": str(path), "exists": there == path, "writable": True, "error": None}
    try:
        usage = shutil.disk_usage(there)
        found |= {"total_gb": round(usage.total / 1e9, 2), "free_gb": round(usage.free / 1e9, 2)}
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        found |= {"writable": False, "error": error.strerror or str(error)}
    return found


def hub() -> dict[str, Any]:
    """The hub's cache as huggingface_hub finds it, and whether a token is there (not which)."""
    home, source = os.environ.get("HF_HOME"), "HF_HOME"
    if not home:
        base = os.environ.get("XDG_CACHE_HOME")
        home, source = os.path.join(base or os.path.join("~", ".cache"), "huggingface"), "XDG_CACHE_HOME"
        source = source if base else ""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    place = Path(os.path.expanduser(cache or os.path.join(home, "hub")))
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    token = bool(os.environ.get("HF_TOKEN")) or (Path(os.path.expanduser(home)) / "token").is_file()
    told = {"source": "HF_HUB_CACHE" if cache else source, "offline": offline, "token": token}
    return disk(place) | told


# --- imports ---------------------------------------------------------------------------------------------------------
def imports(*names: str) -> None:
    """Import each, and say how long that took or why it failed."""
    for name in names:
        if name == "deepspeed":
            _as_the_engine_does()
        print(f"{IMPORTING}{name}", flush=True)
        began = time.perf_counter()
        try:
            importlib.import_module(name)
        except BaseException as error:  # whatever it raises, SystemExit too, is the answer
            say(name, {"ok": False, "error": in_a_line(error)})
        else:
            say(name, {"ok": True, "error": None, "seconds": round(time.perf_counter() - began, 2)})


def _as_the_engine_does() -> None:
    """Without a GPU DeepSpeed is told so, as `ldm.train.engine` tells it."""
    with contextlib.suppress(Exception):
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")


# --- torch -----------------------------------------------------------------------------------------------------------
def try_torch() -> None:
    """Import torch, look at the GPUs, then try attention kernels and half precision."""
    began, worked = time.perf_counter(), time.process_time()
    try:
        import torch
    except BaseException as error:  # a library that is missing, a file that is cut off, an interrupt of its own
        say("torch", {"error": in_a_line(error)})
        return
    seconds = {"import_seconds": time.perf_counter() - began, "import_work_seconds": time.process_time() - worked}
    say("torch", _build(torch) | {name: round(value, 2) for name, value in seconds.items()})
    kinds = ["cpu"]
    if torch.version.cuda or torch.version.hip:
        say("cuda", _guarded(lambda: _cuda(torch)))
        if torch.cuda.is_available():
            say("gpus", [_guarded(lambda i=i: _gpu(torch, i)) for i in range(torch.cuda.device_count())])
            kinds.append("cuda")
    say("precision", {kind: _guarded(lambda kind=kind: _precision(kind)) for kind in kinds})
    tried: dict[str, Any] = {}
    for kind in kinds:
        tried[kind] = _guarded(lambda kind=kind: _kernels(torch, kind))
        say("attention", tried)


def _guarded(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return {"error": in_a_line(error)}


def _build(torch: Any) -> dict[str, Any]:
    dist = torch.distributed
    able = dist.is_available()
    return {
        "version": str(torch.__version__),
        "cuda_build": torch.version.cuda,
        "hip_build": torch.version.hip,
        "threads": torch.get_num_threads(),
        "gloo": able and dist.is_gloo_available(),
        "nccl": able and dist.is_nccl_available(),
        "mps": bool(torch.backends.mps.is_available()),
    }


def _cuda(torch: Any) -> dict[str, Any]:
    """Whether CUDA can be used; torch's own reason where it cannot."""
    able, why = torch.cuda.is_available(), None
    if not able:
        try:
            torch.cuda.init()
        except Exception as error:
            why = in_a_line(error)
    found = {"available": able, "error": why, "architectures": torch.cuda.get_arch_list() if able else []}
    if able:
        found["cudnn"] = torch.backends.cudnn.version()
        with contextlib.suppress(Exception):
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    found: dict[str, Any] = {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": [properties.major, properties.minor],
        "bf16": bool(torch.version.hip) or properties.major >= 8,
        "error": None,
    }
    try:
        found["free_gb"] = round(torch.cuda.mem_get_info(index)[0] / 1e9, 1)
        value = torch.ones(8, device=f"cuda:{index}") * 2
        assert float(value.sum()) == 16.0
    except Exception as error:
        found["error"] = in_a_line(error)
    return found


def _precision(kind: str) -> dict[str, Any]:
    """What `precision: auto` means there, and what was measured for it."""
    from ldm import precision

    chosen = precision.chosen("auto", kind)
    measured = precision.measured() if kind == "cpu" else None
    found: dict[str, Any] = {"auto": chosen}
    return (
        found if measured is None else found | {"fp32_ms": round(measured.fp32, 2), "bf16_ms": round(measured.bf16, 2)}
    )


# --- attention -------------------------------------------------------------------------------------------------------
def _kernels(torch: Any, kind: str) -> dict[str, Any]:
    """Each kernel's answer and gradient there: its milliseconds, or why it does not run; and which one ldm takes."""
    dtype = torch.float32
    if kind == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    torch.manual_seed(0)
    wide = [torch.randn(SHAPE, device=kind).requires_grad_(True) for _ in range(3)]
    right = _plain(torch, *wide)
    wanted = [right.detach(), *torch.autograd.grad(right.square().sum(), wide)]
    given = [w.detach().to(dtype).requires_grad_(True) for w in wide]
    calls: dict[str, Callable[..., Any]] = {name: _fused(torch, name) for name in _fused_names(torch, kind)}
    if kind == "cuda":
        calls |= {"xformers": _xformers, "flash-attn": _flash}
    found: dict[str, Any] = {"dtype": str(dtype).split(".")[-1]}
    for name, call in calls.items():
        found[name] = _tried(torch, call, given, wanted, APART[found["dtype"]])
    found["ldm"] = _guarded(lambda: importlib.import_module("ldm.models.attention").choose(kind))
    return found


def _plain(torch: Any, q: Any, k: Any, v: Any) -> Any:
    return ((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5).softmax(-1) @ v


def _fused_names(torch: Any, kind: str) -> list[str]:
    names = ["math", "flash", "efficient", "cudnn"] if kind == "cuda" else ["math", "flash"]
    return [n for n in names if n != "cudnn" or hasattr(torch.nn.attention.SDPBackend, "CUDNN_ATTENTION")]


def _fused(torch: Any, name: str) -> Callable[..., Any]:
    backends = torch.nn.attention.SDPBackend
    of = {"math": "MATH", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION"}

    def call(q: Any, k: Any, v: Any) -> Any:
        with torch.nn.attention.sdpa_kernel(getattr(backends, of[name])):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return call


def _xformers(q: Any, k: Any, v: Any) -> Any:
    ops = importlib.import_module("xformers.ops")
    turned = (x.transpose(1, 2) for x in (q, k, v))
    return ops.memory_efficient_attention(*turned).transpose(1, 2)


def _flash(q: Any, k: Any, v: Any) -> Any:
    package = importlib.import_module("flash_attn")
    turned = (x.transpose(1, 2) for x in (q, k, v))
    return package.flash_attn_func(*turned).transpose(1, 2)


def _tried(torch: Any, call: Callable[..., Any], given: list[Any], wanted: list[Any], bound: float) -> dict[str, Any]:
    """Milliseconds of forward and backward, the fastest of three, and how far it is from the plain answer."""
    try:
        best, made = float("inf"), []
        for _ in range(3):
            began = time.perf_counter()
            out = call(*given)
            made = [out.detach(), *torch.autograd.grad(out.float().square().sum(), given)]
            float(made[-1].flatten()[0])  # waits for the device
            best = min(best, time.perf_counter() - began)
    except ModuleNotFoundError:
        return {"runs": False, "why": "not installed"}
    except Exception as error:
        return {"runs": False, "why": in_a_line(error)}
    apart = max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(made, wanted, strict=True))
    if not apart <= bound:
        return {"runs": False, "why": f"wrong by {apart:.1e}"}
    return {"runs": True, "ms": round(1e3 * best, 3)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
