"""Memory, disks, threads, ranks, caches, and what a SLURM allocation gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ldm.cli.doctor.findings import Finding, at

SHM = 1.0
"""GB of /dev/shm below which NCCL's ranks on one node, or other programs' loader workers, run out of it."""
FULL, LOW = 1.0, 20.0
"""GB: a checkpoint of a small model; a few of SD 1.5 with its optimizer."""
FILES = 4096


def cores(facts: dict[str, Any]) -> float:
    """That this process may use: its affinity, within its quota."""
    usable, quota = at(facts, "cpu", "usable") or 1, at(facts, "cpu", "quota")
    return min(usable, quota) if quota else usable


def threads(facts: dict[str, Any]) -> Iterator[Finding]:
    """More threads than cores, for one process or for all tasks of this node together; or one thread of many cores."""
    have, given = cores(facts), at(facts, "environment", "OMP_NUM_THREADS") or ""
    whole = max(1, int(have))
    count = int(given) if given.isdigit() else at(facts, "torch", "threads")
    tasks = at(facts, "slurm", "tasks_here") or 1
    if given and not given.isdigit():
        yield Finding("slows", "omp", f"OMP_NUM_THREADS={given!r} is no number", f"export OMP_NUM_THREADS={whole}")
    elif count and count > max(have, 1) * 1.01:
        where = "OMP_NUM_THREADS asks for" if given else "torch takes"
        quota = ", as the container's quota says" if at(facts, "cpu", "quota") == have else ""
        what = f"{where} {count} threads and {have:g} cores may be used{quota}: threads wait for each other"
        yield Finding("slows", "omp", what, f"export OMP_NUM_THREADS={whole}")
    elif given and tasks > 1 and int(given) * tasks > have:
        what = f"{tasks} tasks of {given} threads are more than the {have:g} cores of this allocation"
        yield Finding("slows", "omp", what, f"export OMP_NUM_THREADS={max(1, int(have / tasks))}")
    elif given == "1" and whole >= 4 and not at(facts, "torch", "gpus") and tasks == 1:
        what = f"OMP_NUM_THREADS=1 (some launchers set it): one process uses 1 of {whole} cores"
        yield Finding("note", "omp-one", what, f"export OMP_NUM_THREADS={whole}   # for a single process")


def memory(facts: dict[str, Any]) -> Iterator[Finding]:
    """Memory that is nearly taken."""
    free, limit = at(facts, "cpu", "available_gb"), at(facts, "cpu", "limit_gb")
    if free is not None and at(facts, "cpu", "memory_gb") and free < 2:
        yield Finding("slows", "memory", f"{free:g} GB of memory are free", "ps aux --sort=-rss | head")
    if limit is not None and limit < 4:
        what = f"the control group allows {limit:g} GB of memory; more is killed without a word"
        yield Finding("slows", "memory-limit", what, "docker run --memory=16g ...   # SLURM: --mem=16G")


def shm(facts: dict[str, Any]) -> Iterator[Finding]:
    """/dev/shm, which NCCL takes 10 MB of for each pair of ranks and channel; ldm's own loader takes none."""
    found = facts.get("shm")
    if not found or found.get("total_gb") is None:
        return
    gpus, size = len(at(facts, "torch", "gpus") or []), found["total_gb"]
    where = facts.get("container")
    bigger = {
        "docker": "docker run --shm-size=8g ...   # or --ipc=host",
        "podman": "podman run --shm-size=8g ...",
        "kubernetes": "mount an emptyDir with medium: Memory at /dev/shm   # docs/slurm.md has one",
    }.get(where or "", "sudo mount -o remount,size=8g /dev/shm")
    use = "NCCL between GPUs, and the loader workers of other programs (Bus error)"
    if size < SHM:
        what = f"/dev/shm has {size:g} GB: too little for {use}"
        yield Finding("stops" if gpus > 1 else "note", "shm", what, bigger)
    elif found.get("free_gb", size) < SHM / 4:
        what = f"/dev/shm is full ({found['free_gb']:g} of {size:g} GB are free), which {use} need"
        yield Finding(
            "stops" if gpus > 1 else "slows", "shm-full", what, "ls -lh /dev/shm   # remove what ended runs left"
        )


def disks(facts: dict[str, Any]) -> Iterator[Finding]:
    """Folders that are written to: permission and free space."""
    for disk in facts.get("disks") or []:
        path, free, of = disk.get("path"), disk.get("free_gb"), disk.get("of")
        elsewhere = "out=/path/of/another/disk" if of == "runs" else "export TMPDIR=/path/of/another/disk"
        if not disk.get("writable", True):
            what = f"{path} ({of}) cannot be written to: {disk.get('error')}"
            yield Finding("stops", "disk-permission", what, elsewhere)
        elif free is not None and free < LOW:
            what = f"{path} ({of}): {free:g} of {disk.get('total_gb', 0):g} GB are free"
            level = "stops" if free < FULL else "slows" if of == "runs" else "note"
            yield Finding(level, "disk-full", what, f"du -xsh {path}/* | sort -h | tail   # or {elsewhere}")
    if not facts.get("disks"):
        why = at(facts, "hub", "error") or "no answer"
        what = f"looking at the disks has {why}: is a network disk gone?"
        yield Finding("stops", "disk-stuck", what, "df -h   # hangs at the disk that is gone")


def hub(facts: dict[str, Any]) -> Iterator[Finding]:
    """The cache into which models of the hub are loaded."""
    found = facts.get("hub") or {}
    if not found.get("path"):
        return
    if not found.get("writable", True):
        told = f", from {found['source']}" if found.get("source") else ""
        why = found.get("error")
        what = f"the hub's cache, {found['path']}{told}, cannot be written to ({why}): no model can be loaded into it"
        yield Finding(
            "slows", "hub-permission", what, "export HF_HOME=/path/that/you/may/write   # or: sudo chown -R $USER it"
        )
    elif found.get("free_gb") is not None and found["free_gb"] < LOW:
        what = f"the hub's cache, {found['path']}, has {found['free_gb']:g} GB of disk left; SDXL alone takes 7"
        yield Finding("note", "hub-full", what, "hf cache rm   # or export HF_HOME=/path/of/another/disk")
    if found.get("offline"):
        yield Finding(
            "note",
            "hub-offline",
            "HF_HUB_OFFLINE is set: only models that are in the cache are found",
            "unset HF_HUB_OFFLINE",
        )


def ranks(facts: dict[str, Any]) -> Iterator[Finding]:
    """All-reduces that fail; a process group that torch cannot make."""
    measured = facts.get("measured") or {}
    if at(facts, "torch", "state") == "ok" and at(facts, "torch", "gloo") is False:
        yield Finding(
            "stops",
            "no-gloo",
            "this torch has no gloo: training on CPUs cannot start",
            "pip install --force-reinstall torch",
        )
    if len(at(facts, "torch", "gpus") or []) > 1 and at(facts, "torch", "nccl") is False:
        yield Finding(
            "stops",
            "no-nccl",
            "this torch has no NCCL: several GPUs cannot train together",
            "pip install --force-reinstall torch",
        )
    for backend in ("gloo", "nccl"):
        error = at(measured, f"all_reduce_{backend}", "error")
        if error and backend == "gloo":
            what = f"an all-reduce of two processes on this machine fails: {error}"
            mend = "export GLOO_SOCKET_IFNAME=lo   # over a network: its interface; `ip -br addr` lists them"
            yield Finding("stops", "gloo", what, mend)
        elif error:
            what = f"an all-reduce over {at(measured, 'all_reduce_nccl', 'ranks')} GPUs fails: {error}"
            yield Finding(
                "stops",
                "nccl",
                what,
                "NCCL_DEBUG=INFO ldm doctor --limit 120   # docs/slurm.md; try NCCL_P2P_DISABLE=1",
            )


def measured(facts: dict[str, Any]) -> Iterator[Finding]:
    """Half precision that is slower than float32 on this CPU, disks as slow as a network, a machine that is busy."""
    load = at(facts, "cpu", "load") or 0.0
    if facts.get("measured") and load > 1.5 * cores(facts):
        what = f"others work here (load {load:g} on {cores(facts):g} cores): the machine gives more than was measured"
        yield Finding("note", "busy", what, "top")
        return
    rates = at(facts, "measured", "matrix_product_gflop_per_s", "cpu") or {}
    full, half = rates.get("fp32"), rates.get("bf16")
    if isinstance(full, float) and isinstance(half, float) and half < full / 2 and not at(facts, "torch", "gpus"):
        what = f"this CPU emulates bfloat16: {half:g} GFLOP/s, {full:g} in float32"
        yield Finding("note", "cpu-bf16", what, "train.engine.precision=auto   # which measures, and takes fp32 here")
    write = at(facts, "measured", "disk", "write_gb_per_s")
    if write is not None and write < 0.05:
        what = f"the disk of runs writes {1e3 * write:.0f} MB/s: checkpoints of large models take minutes"
        yield Finding("slows", "disk-slow", what, "out=/path/of/a/faster/disk")


def limits(facts: dict[str, Any]) -> Iterator[Finding]:
    """Open files."""
    count = facts.get("open_files")
    if count is not None and count < FILES:
        what = f"{count} files may be open at once; many shards or ranks need more (Too many open files)"
        yield Finding("note", "open-files", what, "ulimit -n 65536   # docker run --ulimit nofile=65536")


def slurm(facts: dict[str, Any]) -> Iterator[Finding]:
    """A login node; GPUs that were not asked for; one core for all."""
    found = facts.get("slurm")
    if not found:
        return
    if not found.get("job"):
        what = "SLURM is here and this is no allocation: a login node is not what trains"
        yield Finding("note", "slurm-login", what, "srun --gpus-per-node=1 --cpus-per-task=8 --pty ldm doctor")
        return
    gpus, given = at(facts, "driver", "gpus") or [], found.get("gpus_here") or 0
    here = found.get("cores_here")
    if gpus and not given and not at(facts, "torch", "gpus"):
        what = f"the node has GPUs ({gpus[0]['name']}) and job {found['job']} was given none"
        yield Finding("stops", "slurm-no-gpu", what, "sbatch --gpus-per-node=1 ...   # or --gres=gpu:1")
    if given and here and here < 2 * given:
        what = f"the allocation gives {here} cores for {given} GPUs; data loading wants 4 or more for each"
        yield Finding("slows", "slurm-cores", what, "sbatch --cpus-per-task=8 ...")


CHECKS = (threads, memory, shm, disks, hub, ranks, measured, limits, slurm)
