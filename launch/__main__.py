"""`python -m launch local|slurm|task|preflight|logs`: the command line, and nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code. A user's mistake is one line on standard error and code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    own, command = _split(args)
    parser = _parser()
    options = parser.parse_args(own)
    options.command = tuple(command)
    try:
        return int(options.run(options))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"launch {options.verb}: {error}\n")
        return 2


def _split(args: list[str]) -> tuple[list[str], list[str]]:
    """What is for us, and the command after the first `--`."""
    if "--" not in args:
        return args, []
    at = args.index("--")
    return args[:at], args[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch", description="Start a command as many processes.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _local(verbs)
    return parser


def _local(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("local", help="processes on this machine", usage="%(prog)s [options] -- COMMAND ...")
    parser.add_argument("--procs", type=int, default=1, help="processes to start (default 1)")
    parser.add_argument("--port", type=int, default=0, help="of the rendezvous (default: a free one)")
    parser.add_argument("--threads", type=int, default=0, help="OMP_NUM_THREADS of each (default: cores / procs)")
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


if __name__ == "__main__":
    sys.exit(main())
