"""`python -m launch local|slurm|task|preflight|logs`: the command line, and nothing else."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from launch.options import Parser, ended, expanded


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code. A user's mistake is one line on standard error and code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    return ended("launch", partial(_main, args))


def _main(args: list[str]) -> int:
    own, command = _split(args)
    parser = _parser()
    options, rest = parser.parse_known_args(own)
    if rest:
        parser.error(f"{rest[0]!r}: the command stands behind --, such as: python -m launch local -- ldm train CONFIG")
    options.command = tuple(command)
    try:
        return int(options.run(options))
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        sys.stderr.write(f"launch {options.verb}: {' '.join(str(error).split())}\n")
        return 2


def _split(args: list[str]) -> tuple[list[str], list[str]]:
    """What is for us, and the command after the first `--`."""
    if "--" not in args:
        return args, []
    at = args.index("--")
    return args[:at], args[at + 1 :]


class _Parser(Parser):
    """With the names that torchrun, accelerate, mpirun and sbatch have."""

    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "gpus": ("gpus-per-node", "procs"),
        "job-name": ("name",),
        "main-process-port": ("port",),
        "master-port": ("port",),
        "n": ("procs",),
        "nnodes": ("nodes",),
        "np": ("procs",),
        "nproc": ("procs",),
        "nproc-per-node": ("procs", "ranks-per-node"),
        "ntasks-per-node": ("ranks-per-node", "procs"),
        "num-machines": ("nodes",),
        "num-nodes": ("nodes",),
        "num-processes": ("procs", "ranks-per-node"),
        "output": ("log-dir",),
    }


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m launch", description="Start a command as many processes.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _local(verbs)
    _slurm(verbs)
    _task(verbs)
    _preflight(verbs)
    _logs(verbs)
    return parser


def _local(verbs: argparse._SubParsersAction[_Parser]) -> None:
    parser = verbs.add_parser("local", help="processes on this machine", usage="%(prog)s [options] -- COMMAND ...")
    parser.add_argument("--procs", type=int, default=1, help="processes to start")
    parser.add_argument("--port", type=int, default=0, help="of the rendezvous; 0 takes a free one")
    parser.add_argument("--threads", type=int, default=0, help="OMP_NUM_THREADS of each; 0 is cores / procs")
    parser.add_argument("--log-dir", type=Path, help="also write DIR/rank-N.log")
    parser.set_defaults(run=_run_local)


def _run_local(options: argparse.Namespace) -> int:
    from launch import local
    from launch.job import LocalJob

    job = LocalJob(
        command=options.command,
        procs=options.procs,
        port=options.port,
        threads=options.threads,
        log_dir=options.log_dir,
    )
    return local.run(job)


def _slurm(verbs: argparse._SubParsersAction[_Parser]) -> None:
    parser = verbs.add_parser(
        "slurm",
        help="a job for a SLURM cluster",
        usage="%(prog)s [options] -- COMMAND ...",
        description="Submit COMMAND as one process a GPU. {job} and {array} in it become SLURM's numbers. "
        "Defaults come from --site FILE, $LAUNCH_SITE, ./launch.toml or ~/.config/launch.toml: the same names with _.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--dry-run", action="store_true", default=False, help="print the batch script and end")
    parser.add_argument("--site", type=Path, default=None, help="defaults of this cluster (TOML)")
    numbers = {
        "nodes": "(default 1)",
        "min-nodes": "go on with this few nodes when some are lost (default: all)",
        "spares": "nodes allocated beside, used when preflight finds a bad one (default 0)",
        "gpus-per-node": "one rank is started on each (default 0)",
        "ranks-per-node": "for clusters without GPUs (default 1)",
        "cpus-per-task": "cores of a rank (default: the cluster's own)",
        "lead": "seconds before the time limit to save in (default 120)",
        "min-free": "GB that must be free on each disk that preflight checks (default 1)",
        "max-restarts": "requeue at most this often (default 1000)",
    }
    for name, text in numbers.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    for name in ("time", "partition", "account", "qos", "constraint", "reservation", "exclude", "mem", "array"):
        parser.add_argument(f"--{name}", help="as sbatch has it")
    parser.add_argument("--dependency", help="as sbatch has it; a dependency that cannot be met cancels the job")
    parser.add_argument("--name", help="of the job (default ldm)")
    parser.add_argument("--signal", help="sent before the time limit (default USR2)")
    parser.add_argument("--container", help="image to run in")
    parser.add_argument("--container-runtime", help="pyxis (default), apptainer or oci")
    parser.add_argument("--mount", dest="mounts", action="append", metavar="SOURCE:TARGET", help="into the container")
    parser.add_argument("--python", help="interpreter on the nodes (default: this one, or the container's)")
    parser.add_argument("--log-dir", type=Path, help="(default slurm-logs)")
    parser.add_argument("--setup", action="append", metavar="LINE", help="shell line run first; may be repeated")
    parser.add_argument("--sbatch", action="append", metavar="OPTION", help="further option of sbatch, as --sbatch=-X")
    parser.add_argument(
        "--disk", dest="disks", action="append", metavar="DIR", help="preflight also checks this folder"
    )
    parser.add_argument("--check", help="command that preflight runs once, such as 'ldm train CONFIG --dry-run'")
    parser.add_argument("--no-requeue", dest="requeue", action="store_false", help="never start again by itself")
    parser.add_argument("--no-preflight", dest="preflight", action="store_false", help="start without checking nodes")
    parser.set_defaults(run=_run_slurm)


def _run_slurm(options: argparse.Namespace) -> int:
    from launch import slurm
    from launch.job import SlurmJob, read_site

    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(options).items()}
    dry_run, site = given.pop("dry_run"), given.pop("site")
    for name in ("run", "verb"):
        given.pop(name)
    path = site or _default_site()
    values = {"workdir": Path.cwd(), **(read_site(path) if path else {}), **given}
    values["disks"] = tuple(map(expanded, values.get("disks", ())))
    values["mounts"] = tuple(map(_mount, values.get("mounts", ())))
    values["log_dir"] = values["workdir"] / values.get("log_dir", "slurm-logs")
    job = SlurmJob(**values)
    if dry_run:
        sys.stdout.write(slurm.render(job))
        return 0
    number = slurm.submit(job)
    sys.stdout.write(f"{number}\n")
    sys.stderr.write(f"logs: {job.log_dir}/{number}.out; all ranks: python -m launch logs {job.log_dir}/{number}\n")
    return 0


def _mount(text: str) -> str:
    """SOURCE:TARGET with ~ in the source."""
    source, colon, target = text.partition(":")
    return expanded(source) + colon + target


def _default_site() -> Path | None:
    if named := os.environ.get("LAUNCH_SITE"):
        return Path(expanded(named))
    places = [Path("launch.toml")]
    with contextlib.suppress(RuntimeError):  # no home folder
        places.append(Path.home() / ".config" / "launch.toml")
    return next((place for place in places if place.is_file()), None)


def _task(verbs: argparse._SubParsersAction[_Parser]) -> None:
    parser = verbs.add_parser("task", help="one rank under srun", usage="%(prog)s [options] -- COMMAND ...")
    parser.add_argument("--log-dir", type=Path, default=Path("slurm-logs"), help="for rank-N.log")
    parser.set_defaults(run=_run_task)


def _run_task(options: argparse.Namespace) -> int:
    from launch import task

    return task.run(options.command, options.log_dir)


def _preflight(verbs: argparse._SubParsersAction[_Parser]) -> None:
    parser = verbs.add_parser(
        "preflight", help="are the nodes fit? (under srun)", usage="%(prog)s [options] [-- COMMAND]"
    )
    parser.add_argument("--report", type=Path, default=Path("preflight"), help="writes REPORT.json and REPORT.bad")
    parser.add_argument(
        "--disk", dest="disks", type=Path, action="append", default=[], help="must be writable and free"
    )
    parser.add_argument("--min-free", type=float, default=1.0, help="GB on each disk")
    parser.add_argument("--gpus", type=int, default=0, help="that a node must have")
    parser.add_argument("--check", default="", help="command that rank 0 runs once")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each phase")
    parser.add_argument("--no-collective", dest="collective", action="store_false", help="without the all-reduce")
    parser.set_defaults(run=_run_preflight)


def _run_preflight(options: argparse.Namespace) -> int:
    from launch import preflight

    wanted = preflight.Wanted(
        gpus=options.gpus,
        min_free=options.min_free,
        disks=tuple(options.disks),
        command=options.command,
        check=options.check,
        timeout=options.timeout,
        collective=options.collective,
    )
    return preflight.run(wanted, options.report)


def _logs(verbs: argparse._SubParsersAction[_Parser]) -> None:
    parser = verbs.add_parser("logs", help="the logs of all ranks as one")
    parser.add_argument("folder", type=Path, help="LOG_DIR/JOB")
    parser.add_argument("--rank", type=int, help="only this one")
    parser.add_argument("--follow", "-f", action="store_true", help="go on as lines come")
    parser.set_defaults(run=_run_logs)


def _run_logs(options: argparse.Namespace) -> int:
    from launch import logs

    return logs.show(options.folder, options.rank, options.follow)


if __name__ == "__main__":
    sys.exit(main())
