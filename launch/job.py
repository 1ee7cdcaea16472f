"""What is to be started: frozen descriptions of jobs, validated, and the exit codes that they end with."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from launch.options import expanded

RUN_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: the command saved its state and wants to be started again."""
BAD_NODE = 69
"""EX_UNAVAILABLE: preflight found a node that cannot be used."""

Runtime = Literal["pyxis", "apptainer", "oci"]
SIGNALS = ("USR1", "USR2", "TERM", "INT", "HUP")

_TIME = re.compile(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(\d+)(?::(\d+))?(?::(\d+))?)")


@dataclass(frozen=True, kw_only=True)
class LocalJob:
    """N processes of one command on this machine."""

    command: tuple[str, ...]
    procs: int = 1
    port: int = 0  # of the rendezvous; 0 takes a free one
    threads: int = 0  # OMP_NUM_THREADS of a process; 0 shares the cores out
    log_dir: Path | None = None

    def __post_init__(self) -> None:
        _require_command(self.command)
        _at_least("procs", self.procs, 1)
        _at_least("threads", self.threads, 0)
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: must be in 0..65535, got {self.port}")


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """One command on every GPU of some nodes of a SLURM cluster; the fields are also the keys of a site file."""

    command: tuple[str, ...]
    workdir: Path
    name: str = "ldm"
    nodes: int = 1
    min_nodes: int = 0  # go on with this few when nodes are lost; 0 means all of `nodes`
    spares: int = 0  # nodes allocated beside, used when preflight finds a bad one
    gpus_per_node: int = 0
    ranks_per_node: int = 0  # 0 means one a GPU, or one a node without GPUs
    cpus_per_task: int = 0  # 0 leaves it to the cluster
    mem: str = ""  # a node's, such as "0" (all) or "400G"
    time: str = ""  # of SLURM: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    exclude: str = ""
    array: str = ""
    dependency: str = ""
    signal: str = "USR2"  # sent before the time limit; NCCL has a use of its own for USR1
    lead: int = 120  # seconds before the time limit
    requeue: bool = True
    max_restarts: int = 1000
    preflight: bool = True
    check: str = ""  # a command that preflight runs once, such as "ldm train CONFIG --dry-run"
    disks: tuple[str, ...] = ()  # folders that must be writable on every node, beside the logs
    min_free: int = 1  # GB that must be free on each
    container: str = ""
    container_runtime: Runtime = "pyxis"
    mounts: tuple[str, ...] = ()  # SOURCE:TARGET
    python: str = ""  # the interpreter on the nodes; this one, or python3 of the container
    log_dir: Path = Path("slurm-logs")
    setup: tuple[str, ...] = ()  # shell lines run before anything, such as module load cuda
    env: dict[str, str] = field(default_factory=dict)
    sbatch: tuple[str, ...] = ()  # further options of sbatch, such as --exclusive

    def __post_init__(self) -> None:
        _require_command(self.command)
        for name, low in (("nodes", 1), ("min_nodes", 0), ("spares", 0), ("gpus_per_node", 0), ("ranks_per_node", 0)):
            _at_least(name, getattr(self, name), low)
        for name, low in (("cpus_per_task", 0), ("lead", 1), ("max_restarts", 0), ("min_free", 0)):
            _at_least(name, getattr(self, name), low)
        if self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes: must be at most nodes ({self.nodes}), got {self.min_nodes}")
        if self.signal not in SIGNALS:
            raise ValueError(f"signal: {self.signal!r} is not one of {list(SIGNALS)}")
        if self.container_runtime not in get_args(Runtime):
            raise ValueError(f"container_runtime: {self.container_runtime!r} is not one of {list(get_args(Runtime))}")
        if not re.fullmatch(r"[\w.+-]+", self.name):
            raise ValueError(f"name: only letters, digits and . _ + - are allowed, got {self.name!r}")
        if self.time and seconds(self.time) <= self.lead:
            raise ValueError(f"time: {self.time} is not longer than the {self.lead} s of lead needed for saving")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ValueError(f"env: {name!r} is no name of a variable")
        if self.container and self.container_runtime == "pyxis":
            for folder in (self.workdir, self.log_dir):
                if set(str(folder)) & set(",:"):
                    raise ValueError(f"container: {str(folder)!r} cannot be mounted, pyxis divides names at , and :")
        for line in (*self._words(), *self.sbatch):
            if "\n" in line:
                raise ValueError(f"no line break is allowed in {line!r}")

    @property
    def ranks(self) -> int:
        """Processes a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def _words(self) -> list[str]:
        return [value for f in dataclasses.fields(self) if isinstance(value := getattr(self, f.name), str)]


def seconds(time: str) -> int:
    """A time limit of SLURM in seconds. Raises ValueError for another form."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"time: {time!r} is none of minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS")
    days, hours, day_minutes, day_seconds, first, second, third = (int(g or 0) for g in match.groups())
    if match.group(1) is not None:
        return ((days * 24 + hours) * 60 + day_minutes) * 60 + day_seconds
    if match.group(7) is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def read_site(path: Path) -> dict[str, Any]:
    """The defaults of a site file (TOML), ready for SlurmJob.

    Raises ValueError naming the key for what SlurmJob does not have or a wrong type.
    """
    tree = _toml(path)
    fields = {f.name: f for f in dataclasses.fields(SlurmJob) if f.name not in ("command", "workdir")}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; allowed are {sorted(fields)}"
            raise ValueError(f"{path}: unknown key {key!r}{hint}")
        values[key] = _typed(f"{path}: {key}", fields[key], value)
    return values


def _typed(where: str, spec: dataclasses.Field[Any], value: Any) -> Any:
    kind = str(spec.type)
    wanted: type = {"int": int, "bool": bool, "tuple[str, ...]": list, "dict[str, str]": dict}.get(kind, str)
    if type(value) is not wanted:
        raise ValueError(f"{where}: expected {kind}, got {value!r}")
    if wanted is list:
        return tuple(expanded(v) if (v := str(word)).startswith("~/") else v for word in value)
    if wanted is dict:
        return {str(k): str(v) for k, v in value.items()}
    if kind == "Path":
        return Path(expanded(value))
    return expanded(value) if isinstance(value, str) and value.startswith("~/") else value


def _toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"{path}: reading a site file needs Python 3.11, or pip install tomli") from error
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not readable as TOML: {error}") from error


def _require_command(command: tuple[str, ...]) -> None:
    if not command:
        raise ValueError("command: nothing to start; write it after --, such as -- ldm train CONFIG")


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{name}: must be at least {low}, got {value}")
