"""Is every node fit to train? Runs one process a rank under srun, before the training, and names the bad node.

Each rank sends its facts to rank 0 over a plain socket, so that a rank which cannot even import torch, or never
answers, is named too; then all take part in an all-reduce.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch import hostlist, local, task
from launch.job import BAD_NODE

_PACKAGES = ("ldm", "torch", "deepspeed", "numpy", "open_clip_torch")
_SKEW = 30.0  # seconds of clock difference that spoil logs and leases


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one rank found out about its node."""

    host: str
    versions: dict[str, str]
    clock: float  # seconds since the epoch, when sent
    gpus: int
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a node."""

    gpus: int = 0
    min_free: float = 1.0  # GB on each disk
    disks: tuple[Path, ...] = ()
    command: tuple[str, ...] = ()
    check: str = ""  # run by rank 0 alone, such as "ldm train CONFIG --dry-run"
    timeout: float = 120.0  # seconds for each of the two phases
    collective: bool = True


def judge(
    hosts: Sequence[str], facts: Mapping[int, Facts], clocks: Mapping[int, float], gpus: int
) -> dict[str, list[str]]:
    """What is wrong with which host; `hosts[r]` is where rank r was started, `clocks[r]` when its facts came.

    Of unequal versions the most common is right; of two equally common, that of the lowest rank.
    """
    bad: dict[str, list[str]] = {}

    def blame(host: str, what: str) -> None:
        if what not in bad.setdefault(host, []):
            bad[host].append(what)

    for rank, host in enumerate(hosts):
        if rank not in facts:
            blame(host, "no answer")
    for name in sorted({name for f in facts.values() for name in f.versions}):
        found = {rank: facts[rank].versions.get(name, "missing") for rank in sorted(facts)}
        usual = Counter(found.values()).most_common(1)[0][0]
        for rank, version in found.items():
            if version != usual:
                blame(facts[rank].host, f"{name} is {version}, elsewhere {usual}")
    for rank, fact in sorted(facts.items()):
        for problem in fact.problems:
            blame(fact.host, problem)
        if fact.gpus < gpus:
            blame(fact.host, f"{fact.gpus} GPUs are visible, {gpus} were asked for")
        skew = fact.clock - clocks[rank]
        if abs(skew) > _SKEW:
            blame(fact.host, f"its clock is off by {skew:+.0f} s")
    return bad


def look(wanted: Wanted, first_of_node: bool) -> Facts:
    """The facts of this node."""
    problems = [p for disk in wanted.disks if (p := _disk_problem(disk, wanted.min_free))] if first_of_node else []
    if wanted.command:
        try:
            local.resolve(wanted.command)
        except ValueError as error:
            problems.append(str(error))
    return Facts(
        host=socket.gethostname(),
        versions=_versions(),
        clock=time.time(),
        gpus=_visible_gpus() if wanted.gpus else 0,
        problems=problems,
    )


def run(wanted: Wanted, report: Path) -> int:
    """Check the nodes of this srun step; rank 0 writes `report`.json, and `report`.bad with the names of bad nodes.

    The exit code is 0 or BAD_NODE.
    """
    own = task.variables(os.environ)
    rank, port = int(own["RANK"]), int(own["MASTER_PORT"])
    per_node = hostlist.counts(os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ["SLURM_TASKS_PER_NODE"])
    names = hostlist.expand(os.environ["SLURM_STEP_NODELIST"])
    hosts = [name for name, count in zip(names, per_node, strict=True) for _ in range(count)]
    report.parent.mkdir(parents=True, exist_ok=True)
    desk = _Desk(port, len(hosts)) if rank == 0 else None
    facts = look(wanted, own["LOCAL_RANK"] == "0")
    try:
        line = _Line(own["MASTER_ADDR"], port, rank, wanted.timeout)
    except OSError:
        local.say(f"preflight: {facts.host} got no answer from {hosts[0]}")
        if not report.with_suffix(".bad").exists():
            report.with_suffix(".bad").write_text(hosts[0])
        return BAD_NODE
    line.send(asdict(facts))
    verdict = _first_phase(desk, hosts, wanted, report) if desk else line.receive(2 * wanted.timeout)
    if not verdict.get("go"):
        return BAD_NODE if rank == 0 else 0
    if not wanted.collective:
        return 0
    line.send(_collective(own, wanted.timeout))
    return _second_phase(desk, hosts, wanted, report) if desk else 0


def _first_phase(desk: _Desk, hosts: list[str], wanted: Wanted, report: Path) -> dict[str, Any]:
    raw = desk.collect(wanted.timeout)
    facts = {rank: Facts(**data) for rank, (data, _) in raw.items()}
    bad = judge(hosts, facts, {rank: at for rank, (_, at) in raw.items()}, wanted.gpus)
    general = _check(wanted.check) if wanted.check and not bad else ""
    _write(report, bad, general, {})
    verdict = {"go": not bad and not general}
    desk.tell(verdict)
    return verdict


def _second_phase(desk: _Desk, hosts: list[str], wanted: Wanted, report: Path) -> int:
    raw = desk.collect(wanted.timeout + 10)
    answers: dict[int, dict[str, Any]] = {rank: data for rank, (data, _) in raw.items()}
    bad = {host: ["no answer after the all-reduce"] for rank, host in enumerate(hosts) if rank not in answers}
    wrong = {hosts[r]: [str(a["error"])] for r, a in answers.items() if a["error"] and a["where"] == "node"}
    bad.update(wrong)
    elsewhere = sorted({str(a["error"]) for a in answers.values() if a["error"]})
    general = f"all-reduce failed: {elsewhere[0]}" if elsewhere and not bad else ""
    figures = {}
    if not bad and not general:
        speeds = [float(a["gigabytes"]) for a in answers.values()]
        multiply = {
            host: min(float(answers[r]["multiply"]) for r, h in enumerate(hosts) if h == host) for host in hosts
        }
        usual = statistics.median(multiply.values())
        figures = {"all_reduce_GB_per_s": round(min(speeds), 3), "ranks": len(hosts), "nodes": len(multiply)}
        for host, speed in multiply.items():
            if speed < usual / 2:
                local.say(f"preflight: {host} computes at {speed / usual:.0%} of the usual speed")
    _write(report, bad, general, figures)
    desk.tell({"go": not bad and not general})
    return BAD_NODE if bad or general else 0


def _write(report: Path, bad: dict[str, list[str]], general: str, figures: dict[str, Any]) -> None:
    for host, problems in bad.items():
        for problem in problems:
            local.say(f"preflight: {host}: {problem}")
    if general:
        local.say(f"preflight: {general}")
    if figures:
        local.say("preflight: all nodes are fit: " + ", ".join(f"{k} {v}" for k, v in figures.items()))
    report.with_suffix(".json").write_text(json.dumps({"bad": bad, "general": general, **figures}, indent=1) + "\n")
    report.with_suffix(".bad").write_text(" ".join(bad))


def _collective(own: Mapping[str, str], timeout: float) -> dict[str, Any]:
    """An all-reduce inside the node, then over all; where it failed, and GB/s."""
    where = "node"
    try:
        import torch
        import torch.distributed as dist

        os.environ.update(own)
        os.environ["MASTER_PORT"] = str(int(own["MASTER_PORT"]) + 1)
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(own["LOCAL_RANK"])) if cuda else torch.device("cpu")
        multiply = _multiply(torch, device)
        where = "network"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
        world, rank = dist.get_world_size(), dist.get_rank()
        value = torch.full((1024,), float(rank + 1), device=device)
        dist.all_reduce(value)
        if not bool((value == world * (world + 1) / 2).all()):
            raise RuntimeError(f"the sum over {world} ranks is wrong")
        size = (64 if cuda else 4) * 2**20
        block = torch.ones(size // 4, device=device)
        dist.all_reduce(block)
        begun = time.perf_counter()
        dist.all_reduce(block)
        float(block[0])  # waits for the device
        gigabytes = 2 * (world - 1) / world * size / (time.perf_counter() - begun) / 1e9
        dist.destroy_process_group()
    except Exception as error:  # whatever it is, it is the answer
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", "where": where}
    return {"error": "", "where": "", "gigabytes": gigabytes, "multiply": multiply}


def _multiply(torch: Any, device: Any) -> float:
    """GFLOP/s of a matrix product whose result is known exactly. Raises RuntimeError if it is wrong."""
    n = 2048 if device.type == "cuda" else 256
    left = (torch.arange(n * n, device=device).reshape(n, n) % 7 - 3).float()
    product = left @ left.T
    exact = (left[0].double() * left[1].double()).sum().item()
    if product[0, 1].item() != exact or not bool(torch.isfinite(product).all()):
        raise RuntimeError("a matrix product is wrong")
    begun = time.perf_counter()
    float((left @ left.T)[0, 0])
    return 2 * n**3 / (time.perf_counter() - begun) / 1e9


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _visible_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def _disk_problem(folder: Path, min_free: float) -> str:
    """Why nothing could be saved there, or "". Writes and reads back a small file."""
    probe = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = os.urandom(65536)
        with probe.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if probe.read_bytes() != content:
            return f"{folder}: what was written reads back differently"
        probe.unlink()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    free = shutil.disk_usage(folder).free / 1e9
    return "" if free >= min_free else f"{folder}: {free:.3g} GB are free, {min_free:g} are needed"


def _check(command: str) -> str:
    """Run a command once; its last line if it fails."""
    done = subprocess.run(local.resolve(shlex.split(command)), capture_output=True, text=True, timeout=600)
    last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
    return f"{command!r} failed: {' '.join(last)}" if done.returncode else ""


class _Desk:
    """Rank 0's end: one connection a rank, a line of JSON each way at a time."""

    def __init__(self, port: int, ranks: int) -> None:
        self._server = socket.create_server(("", port), backlog=ranks)
        self._ranks = ranks
        self._files: dict[int, Any] = {}
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        file = connection.makefile("rw")
        try:
            rank = int(file.readline())
            self._files[rank] = file
            for text in file:
                with self._changed:
                    self._heard[rank] = (json.loads(text), time.time())
                    self._changed.notify_all()
        except (OSError, ValueError):
            return

    def collect(self, timeout: float) -> dict[int, tuple[dict[str, Any], float]]:
        """One message of each rank and when it came; ranks that stay silent for `timeout` seconds are left out."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._heard) == self._ranks, timeout)
            heard, self._heard = self._heard, {}
        return heard

    def tell(self, message: dict[str, Any]) -> None:
        for file in self._files.values():
            try:
                file.write(json.dumps(message) + "\n")
                file.flush()
            except OSError:
                continue


class _Line:
    """A rank's connection to rank 0."""

    def __init__(self, host: str, port: int, rank: int, timeout: float) -> None:
        end = time.monotonic() + timeout
        while True:
            try:
                self._socket = socket.create_connection((host, port), timeout=5)
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        self._file = self._socket.makefile("rw")
        self._file.write(f"{rank}\n")

    def send(self, message: dict[str, Any]) -> None:
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next message, or {} when none comes."""
        self._socket.settimeout(timeout)
        try:
            return dict(json.loads(self._file.readline() or "{}"))
        except OSError:
            return {}
