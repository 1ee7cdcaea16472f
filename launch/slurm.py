"""A SLURM job as text: `render` is pure, `submit` hands its text to sbatch."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.job import BAD_NODE, RUN_AGAIN, SlurmJob


def render(job: SlurmJob) -> str:
    """The batch script: options, environment, preflight, one srun task a rank, requeue or exit code."""
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(job)), ""]
    lines += [_MADE]
    lines += [_PRELUDE.format(logs=shlex.quote(str(job.log_dir)), workdir=shlex.quote(str(job.workdir)))]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in job.env.items()]
    lines += list(job.setup)
    lines += [_TRAPS.format(signal=job.signal, ranks=job.ranks, layout=_layout(job))]
    if job.preflight:
        lines += [_preflight(job)]
    if job.spares:
        lines += [f'[ "$nodes" -gt {job.nodes} ] && nodes={job.nodes}']
    task = f'{_python(job)} -m launch task --log-dir "$logs" -- {shlex.join(job.command)}'
    lines += ["rc=75", f'[ "$stopping$cancelled" = 00 ] && run {_inside(job, task)}', ""]
    lines += [_END.format(max_restarts=job.max_restarts if job.requeue else 0, again=RUN_AGAIN)]
    return "\n".join(lines)


def submit(job: SlurmJob) -> str:
    """Give the job to sbatch; its job number. Raises ValueError with sbatch's own words if it refuses."""
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch: not found on PATH; --dry-run shows the script without a cluster")
    job.log_dir.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["sbatch", "--parsable"], input=render(job), capture_output=True, encoding="utf-8", errors="surrogateescape",
        cwd=job.workdir,
    )  # fmt: skip
    if done.returncode != 0:
        raise ValueError(done.stderr.strip().replace("\n", "; ") or f"sbatch ended with {done.returncode}")
    number = done.stdout.strip().split(";")[0]
    (job.log_dir / f"{number}.sbatch").write_text(render(job), encoding="utf-8", errors="surrogateescape")
    return number


def _options(job: SlurmJob) -> Iterator[str]:
    least = job.min_nodes or job.nodes
    most = job.nodes + job.spares
    yield f"--job-name={job.name}"
    yield f"--nodes={most}" if least == most or not job.min_nodes else f"--nodes={least}-{most}"
    if least < job.nodes:  # SLURM keeps the number of tasks of the first start, and then fewer nodes never suffice
        yield f"--mincpus={job.ranks * max(1, job.cpus_per_task)}"
    else:
        yield f"--ntasks-per-node={job.ranks}"
        if job.cpus_per_task:
            yield f"--cpus-per-task={job.cpus_per_task}"
    if job.gpus_per_node:
        yield f"--gpus-per-node={job.gpus_per_node}"
    for name in ("mem", "time", "partition", "account", "qos", "constraint", "reservation", "exclude", "array"):
        value = str({**vars(job)}[name])
        if value:
            yield f"--{name}={shlex.quote(value)}"
    if job.dependency:
        yield f"--dependency={shlex.quote(job.dependency)}"
        yield "--kill-on-invalid-dep=yes"
    yield f"--signal=B:{job.signal}@{job.lead}"
    yield "--requeue" if job.requeue else "--no-requeue"
    yield "--open-mode=append"
    folder = str(job.log_dir).replace("%", "%%")  # a % of its own begins SLURM's patterns
    yield f"--output={shlex.quote(f'{folder}/%j.out')}"
    yield from job.sbatch


def _layout(job: SlurmJob) -> str:
    words = ['--nodes="$nodes"', f"--ntasks=$((nodes * {job.ranks}))", f"--ntasks-per-node={job.ranks}"]
    if job.cpus_per_task:
        words.append(f"--cpus-per-task={job.cpus_per_task}")  # srun does not take it over from sbatch
    if job.container and job.container_runtime == "pyxis":
        words.append(f"--container-image={shlex.quote(job.container)}")
        words.append(f"--container-workdir={shlex.quote(str(job.workdir))}")
        mounts = [f"{job.workdir}:{job.workdir}", f"{job.log_dir}:{job.log_dir}", *job.mounts]
        words.append(f"--container-mounts={shlex.quote(','.join(mounts))}")
    if job.container and job.container_runtime == "oci":
        words.append(f"--container={shlex.quote(job.container)}")
    return " ".join(words)


def _inside(job: SlurmJob, command: str) -> str:
    if not job.container or job.container_runtime != "apptainer":
        return command
    binds = "".join(f" --bind {shlex.quote(m)}" for m in (str(job.workdir), str(job.log_dir), *job.mounts))
    return f"apptainer exec --nv{binds} {shlex.quote(job.container)} {command}"


def _python(job: SlurmJob) -> str:
    return shlex.quote(job.python or ("python3" if job.container else sys.executable))


def _preflight(job: SlurmJob) -> str:
    check = f'{_python(job)} -m launch preflight --report "$logs/preflight-$restart" --disk "$logs"'
    check += "".join(f" --disk {shlex.quote(disk)}" for disk in job.disks)
    check += f" --min-free {job.min_free} --gpus {job.gpus_per_node}"
    check += f" --check {shlex.quote(job.check)}" if job.check else ""
    check += f" -- {shlex.quote(job.command[0])}"
    least = job.min_nodes or job.nodes
    return _PREFLIGHT.format(check=_inside(job, check), least=least, bad=BAD_NODE)


def template(name: str) -> str:
    """The plain batch script that lies beside this file as NAME.sbatch: what `render` makes, with a note on top."""
    text, what = render(TEMPLATES[name]), _NOTES[name]
    last = text.rindex("#SBATCH")
    at = text.index("\n", last) + 1
    note = f"# {what}\n# Edit options and command, then: mkdir -p slurm-logs && sbatch {name}.sbatch\n"
    return text[:at] + note + text[at:].replace(f"\n{_MADE}\n", "\n", 1)


_EMOJI = "configs/train/text_to_image_emoji.yaml"
_PLAIN: dict[str, Any] = {"workdir": Path("."), "python": "python3", "gpus_per_node": 8, "time": "24:00:00"}
_SHORT: dict[str, Any] = {**_PLAIN, "time": "1:00:00"}
_ONE: dict[str, Any] = {**_SHORT, "gpus_per_node": 1}
TEMPLATES = {
    "train": SlurmJob(
        command=("ldm", "train", _EMOJI, "out=runs/emoji"),
        nodes=2,
        check=f"ldm train {_EMOJI} --print-config",
        disks=("runs",),
        **_PLAIN,
    ),
    "encode": SlurmJob(
        command=(
            *("ldm", "data", "encode", "emoji", "cache/emoji_64"),
            *("--vae", "emoji", "--text", "emoji", "--size", "64"),
        ),
        **_PLAIN,
    ),
    "sample": SlurmJob(
        command=("ldm", "sample", "--from-file", "prompts/{array}.txt", "--out", "samples/{array}"),
        array="0-7",
        preflight=False,
        **_ONE,
    ),
    "evaluate": SlurmJob(
        command=(
            *("ldm", "evaluate", "features", "--model", "runs/emoji", "--count", "1000"),
            *("--keep", "runs/emoji/features", "--out", "runs/emoji/features.json"),
        ),
        preflight=False,
        **_SHORT,
    ),
}
_NOTES = {
    "train": "Train on 2 nodes of 8 GPUs; the run goes on by itself after the time limit and after lost nodes.",
    "encode": "Encode pictures and captions into a cache, once, on 8 GPUs; training with that task.cache reads it.",
    "sample": "Pictures of many prompts: array task N draws the lines of prompts/N.txt on one GPU.",
    "evaluate": "Measure a trained model: 8 GPUs divide the pictures, and a requeued job goes on where it was.",
}

_MADE = "# Made by `python -m launch slurm`: plain bash, to be read, edited and given to sbatch."
_PRELUDE = """\
set -u
cd {workdir} || exit 1
logs={logs}/$SLURM_JOB_ID
restart=${{SLURM_RESTART_COUNT:-0}}
mkdir -p "$logs" || exit 1
export PYTHONUNBUFFERED=1"""

_TRAPS = """\

say() {{ echo "$(date +%FT%T) batch: $*"; }}
step= stopping=0 cancelled=0 nodes=$SLURM_JOB_NUM_NODES skip=()
# The time limit is near, or someone sent the signal: the ranks save and end. srun passes it on to all of them.
trap 'stopping=1; say "{signal}: asking the ranks to save"; [ -n "$step" ] && kill -{signal} "$step"' {signal}
trap 'cancelled=1; say "cancelled"' TERM
run() {{ # one srun step, waited for through signals; its exit code in rc
  srun {layout} ${{skip[@]+"${{skip[@]}}"}} --kill-on-bad-exit=1 --wait=300 "$@" &
  step=$!
  while wait "$step"; rc=$?; [ "$rc" -gt 128 ] && kill -0 "$step" 2>/dev/null; do :; done # a trap ends `wait` early
  wait "$step"; rc=$?
  step=
}}

say "start $restart of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST\""""

_PREFLIGHT = """\
run {check}
if [ "$rc" -ne 0 ] && [ "$stopping$cancelled" = 00 ]; then
  bad=$(cat "$logs/preflight-$restart.bad" 2>/dev/null)
  say "preflight failed; bad nodes: ${{bad:-unknown}}"
  [ -n "$bad" ] || exit "$rc"
  nodes=$((nodes - $(echo "$bad" | wc -w)))
  [ "$nodes" -ge {least} ] || exit {bad}
  skip=(--exclude="${{bad// /,}}")
fi
"""

_END = """\
if [ "$rc" -ne 0 ] && [ -s "$logs/failed-$restart" ]; then # srun only tells the highest exit code
  read -r rc rank host _ <"$logs/failed-$restart"
  say "rank $rank on $host ended with exit code $rc"
fi
if [ -e "$logs/again-$restart" ] || {{ [ "$stopping" = 1 ] && [ "$rc" -ne 0 ]; }}; then
  rc={again}
  if [ "$cancelled" = 0 ] && [ "$restart" -lt {max_restarts} ]; then
    say "saved; requeueing"
    scontrol requeue "$SLURM_JOB_ID" && sleep 600 # SLURM ends this script
  fi
fi
say "end of start $restart with exit code $rc"
exit "$rc"
"""
