"""Job descriptions, the batch script, and what a rank reads of its step; the cluster tests run all of it for real."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import hostlist, logs, preflight, slurm, task
from launch.__main__ import main
from launch.job import SlurmJob, read_site, seconds


def job(**changes: Any) -> SlurmJob:
    return SlurmJob(**{"command": ("ldm", "train", "a b.yaml"), "workdir": Path("/w"), "python": "py"} | changes)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("gpu[007-009,20],x", ["gpu007", "gpu008", "gpu009", "gpu20", "x"]),
        ("r[1-2]n[1,3]", ["r1n1", "r1n3", "r2n1", "r2n3"]),
        ("a,b-2,c[1]-ib", ["a", "b-2", "c1-ib"]),
    ],
)
def test_host_lists(text: str, hosts: list[str]) -> None:
    assert hostlist.expand(text) == hosts


def test_odd_host_lists_and_counts() -> None:
    assert hostlist.counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="unbalanced"):
        hostlist.expand("n[1-3")
    with pytest.raises(ValueError, match="cannot read 'x'"):
        hostlist.counts("x")


@pytest.mark.parametrize(
    ("time", "wanted"),
    [("30", 1800), ("10:30", 630), ("24:00:00", 86400), ("2-12", 216000), ("1-0:30", 88200), ("1-01:02:03", 90123)],
)
def test_time_limits(time: str, wanted: int) -> None:
    assert seconds(time) == wanted


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"command": ()}, "nothing to start"),
        ({"nodes": 0}, "nodes: must be at least 1, got 0"),
        ({"nodes": 2, "min_nodes": 3}, r"min_nodes: must be at most nodes \(2\), got 3"),
        ({"signal": "KILL"}, "signal: 'KILL' is not one of"),
        ({"time": "2"}, "time: 2 is not longer than the 120 s of lead"),
        ({"time": "soon"}, "time: 'soon' is none of"),
        ({"name": "a b"}, "name: only letters"),
        ({"partition": "x\n#SBATCH --uid=0"}, "no line break"),
        ({"container_runtime": "docker"}, "container_runtime: 'docker'"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        job(**changes)


def test_site_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "site.toml"
    path.write_text('partition = "gpu"\ngpus_per_node = 8\nsetup = ["module load x"]\n[env]\nA = "1 2"\n')
    assert read_site(path)["setup"] == ("module load x",)
    assert main(["slurm", "--site", str(path), "--gpus-per-node", "4", "--dry-run", "--", "true"]) == 0
    script = capsys.readouterr().out
    for line in ("#SBATCH --partition=gpu", "#SBATCH --gpus-per-node=4", "export A='1 2'", "module load x"):
        assert line in script.splitlines()
    path.write_text("gpu_per_node = 8\n")
    assert main(["slurm", "--site", str(path), "--dry-run", "--", "true"]) == 2
    assert "unknown key 'gpu_per_node'; did you mean 'gpus_per_node'?" in capsys.readouterr().err
    path.write_text('nodes = "2"\n')
    with pytest.raises(ValueError, match="nodes: expected int, got '2'"):
        read_site(path)


def test_script(tmp_path: Path) -> None:
    everything = job(
        nodes=4, min_nodes=2, spares=1, gpus_per_node=8, cpus_per_task=6, time="1-00", array="0-3",
        dependency="afterok:7", container="/c.sqsh", mounts=("/a:/b",), check="ldm train 'x y'",
        disks=("/scratch dir",), sbatch=("--exclusive",),
    )  # fmt: skip
    for one in (job(), everything, job(container="/c.sif", container_runtime="apptainer"), job(preflight=False)):
        script = slurm.render(one)
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "-"], input=script, text=True, check=True)
        assert "-- ldm train 'a b.yaml'" in script
        assert script.count("#SBATCH --signal=B:USR2@120\n") == 1
    script = slurm.render(everything)
    assert "#SBATCH --nodes=2-5\n" in script
    assert "#SBATCH --dependency=afterok:7\n#SBATCH --kill-on-invalid-dep=yes\n" in script
    assert "--container-mounts=/w:/w,slurm-logs:slurm-logs,/a:/b" in script
    assert "#SBATCH --no-requeue\n" in slurm.render(job(requeue=False))
    assert '"$restart" -lt 0 ' in slurm.render(job(requeue=False))


@pytest.mark.parametrize("name", sorted(slurm.TEMPLATES))
def test_templates_are_what_a_dry_run_prints(name: str) -> None:
    path = next(p for p in (Path(slurm.__file__).parent).glob("*.sbatch") if p.stem == name)
    assert path.read_text() == slurm.template(name), f"write launch.slurm.template({name!r}) to {path}"
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    made = [line for line in slurm.render(slurm.TEMPLATES[name]).splitlines() if line and not line.startswith("# ")]
    assert [line for line in path.read_text().splitlines() if line and not line.startswith("# ")] == made


STEP = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "n[2-3]",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
    "SLURM_CPUS_PER_TASK": "5",
}  # fmt: skip


def test_variables_of_a_rank() -> None:
    own = task.variables(STEP)
    assert 10000 <= int(own.pop("MASTER_PORT")) < 30000
    assert own == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "1",
        "MASTER_ADDR": "n2", "OMP_NUM_THREADS": "5",
    }  # fmt: skip
    ports = {task.variables(STEP | {"SLURM_RESTART_COUNT": str(n)})["MASTER_PORT"] for n in range(5)}
    assert len(ports) == 5  # a port that is taken is not tried again
    with pytest.raises(ValueError, match=r"SLURM_PROCID, SLURM_LOCALID, .*: not set; `launch task` runs under srun"):
        task.variables({})
    assert task.fill(["{job}-{array}.txt"], {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}) == ["7-2.txt"]


@pytest.mark.parametrize(
    ("first", "second"),
    [  # it is held up by what it left behind; by its own clearing away; it said nothing; it was killed
        ('sleep 30 & echo "something is wrong here"; touch gone; exit 7', "sleep 0.3; echo a peer is gone; exit 1"),
        ('echo "something is wrong here"; touch gone; sleep 0.3; exit 7', "echo a peer is gone; exit 1"),
        ("touch gone; exit 7", "sleep 0.1; echo a peer is gone; exit 1"),
        ('echo "something is wrong here"; touch gone; kill -9 $$', "sleep 0.1; echo a peer is gone; exit 1"),
    ],
)
def test_the_rank_that_failed_first_is_blamed_whichever_ends_first(first: str, second: str, tmp_path: Path) -> None:
    others = {"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
    waits = "until [ -e gone ]; do sleep 0.02; done; "
    ranks = []
    for script, env in ((first, STEP), (waits + second, STEP | others)):
        command = [sys.executable, "-m", "launch", "task", "--log-dir", "logs", "--", "bash", "-c", script]
        ranks.append(subprocess.Popen(
            command, env={**os.environ, **env, "PYTHONPATH": str(Path(__file__).parents[3])}, cwd=tmp_path,
            stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
    told = "".join(rank.communicate(timeout=60)[1] for rank in ranks)
    code = 137 if "kill" in first else 7
    assert [rank.returncode for rank in ranks] == [code, 1]
    logs = tmp_path / "logs"
    assert (logs / "failed-0").read_text().split()[:2] == [str(code), "3"]
    assert sorted(path.name for path in logs.iterdir()) == ["failed-0", "rank-00002.log", "rank-00003.log"]
    assert told.count("its last lines:") == 1
    said = "\n  something is wrong here" if "echo" in first else ""
    assert f"ended with exit code {code}; its last lines:{said}" in told


def test_a_failure_that_cannot_be_noted_keeps_its_exit_code(tmp_path: Path) -> None:
    """A folder lies where the note would be written."""
    (tmp_path / "logs" / "failed-0.00003").mkdir(parents=True)
    command = [sys.executable, "-m", "launch", "task", "--log-dir", "logs", "--", "bash", "-c", "exit 7"]
    env = {**os.environ, **STEP, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7
    assert "ended with exit code 7, which could not be noted: " in done.stderr


def test_preflight_blames_the_right_host() -> None:
    def facts(host: str, torch: str = "2", clock: float = 100.0, gpus: int = 8, *problems: str) -> preflight.Facts:
        versions = {"torch": torch}
        return preflight.Facts(host=host, versions=versions, clock=clock, gpus=gpus, problems=list(problems))

    hosts = ["a", "b", "c", "d", "e", "f"]
    said = {
        0: facts("a"),
        1: facts("b", "1"),
        2: facts("c", "2", 190.0),
        3: facts("d", "2", 100.0, 7),
        5: facts("f", "2", 100.0, 8, "/x: Read-only file system"),
    }
    assert preflight.judge(hosts, said, dict.fromkeys(said, 101.0), 8) == {
        "b": ["torch is 1, elsewhere 2"],
        "c": ["its clock is off by +89 s"],
        "d": ["7 GPUs are visible, 8 were asked for"],
        "e": ["no answer"],
        "f": ["/x: Read-only file system"],
    }


def test_logs_of_all_ranks_in_the_order_of_time(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.log").write_text("2026-01-01T00:00:01 n1/0 one\n2026-01-01T00:00:03 n1/1 three  x\n")
    (tmp_path / "rank-00001.log").write_text("2026-01-01T00:00:02 n2/0 two\n2026-01-01T00:00:03 n2/1 also\n")
    assert [line.split("T00:00:0")[1] for line in logs.merge(logs.find(tmp_path))] == [
        "1 0@n1/0 one", "2 1@n2/0 two", "3 0@n1/1 three  x", "3 1@n2/1 also",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"no rank-\*\.log"):
        logs.find(tmp_path / "none")


def test_templates_name_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """The options of every template are those of the verb; train's config loads."""
    from ldm.cli import data, evaluate, sample
    from ldm.config.schema import load_run

    parsers = {"data": data._parser(), "evaluate": evaluate._parser(), "sample": sample.parser()}
    for name, made in slurm.TEMPLATES.items():
        program, verb, *rest = made.command
        assert program == "ldm"
        if verb == "train":
            assert load_run(rest[0], rest[1:]).out == Path("runs/emoji")
            continue
        assert vars(parsers[verb].parse_args(rest)), name


def test_fewer_nodes_are_not_tied_to_the_first_number_of_tasks() -> None:
    """SLURM keeps NumTasks over a requeue; a job that may shrink asks for cores, and srun lays out the ranks."""
    script = slurm.render(job(nodes=4, min_nodes=2, gpus_per_node=8, cpus_per_task=6))
    options = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --mincpus=48" in options
    assert "#SBATCH --gpus-per-node=8" in options
    assert not [line for line in options if "ntasks" in line or "cpus-per-task" in line]
    assert "--ntasks=$((nodes * 8)) --ntasks-per-node=8 --cpus-per-task=6" in script


ODD = [
    "a #1",
    "it's",
    'say "x"',
    "ü = [1] 猫",
    "$HOME",
    "back\\slash",
    "100%",
    "a;b&c|d",
    "`x`",
    "~/y",
    "*",
    "-n",
    "!x",
    "{y}",
]


@pytest.mark.parametrize("odd", ODD)
def test_words_and_paths_come_through_the_script_as_they_are(odd: str, tmp_path: Path) -> None:
    """The script runs in bash with an srun that writes down what it was given."""
    folder = tmp_path / odd.replace("/", "_")
    folder.mkdir()
    tools = tmp_path / "tools"
    tools.mkdir()
    seen = tmp_path / "seen"
    (tools / "srun").write_text(f'#!/bin/bash\nprintf "%s\\0" "$PWD" "$VALUE" "$@" >>{shlex.quote(str(seen))}\n')
    (tools / "srun").chmod(0o755)
    command = ("ldm", "train", f"{odd}.yaml", f"out=runs/{odd}", "name=a\nb")
    script = slurm.render(
        job(command=command, workdir=folder, log_dir=folder / "logs", disks=(odd,), check=f"ldm x {shlex.quote(odd)}",
            env={"VALUE": odd}, python="python3")
    )  # fmt: skip
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
    env |= {"SLURM_JOB_NODELIST": "n1", "HOME": str(tmp_path)}
    done = subprocess.run(["bash"], input=script, encoding="utf-8", capture_output=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    preflight, task = [words.split("\0") for words in seen.read_text(encoding="utf-8").split("\0python3\0")][1:]
    assert seen.read_text(encoding="utf-8").startswith(f"{folder}\0{odd}\0")
    assert preflight[preflight.index("--check") + 1] == f"ldm x {shlex.quote(odd)}"
    assert preflight[preflight.index("--disk") + 3] == odd
    assert task[task.index("--") + 1 :] == [*command, ""]
    assert task[task.index("--log-dir") + 1] == f"{folder}/logs/7"
    (output,) = [line for line in script.splitlines() if line.startswith("#SBATCH --output")]
    assert shlex.split(output)[-2:][-1] == f"--output={folder}/logs/%j.out".replace("100%", "100%%").replace(
        "%%j", "%j"
    )


def test_a_site_file_and_options_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "site.toml").write_text('python = "~/v/bin/python"\nlog_dir = "~/logs"\ndisks = ["~/d"]\nnodes = 2\n')
    argv = ["slurm", "--site", "~/site.toml", "--mount", "~/m:/m", "--container", "~/c.sqsh", "--dry-run", "--", "x"]
    assert main(argv) == 0
    script = capsys.readouterr().out
    for text in (f"{tmp_path}/v/bin/python", f"logs={tmp_path}/logs/", f"--disk {tmp_path}/d", f"{tmp_path}/m:/m"):
        assert text in script
    assert f"--container-image={tmp_path}/c.sqsh" in script
    assert "~" not in script
    monkeypatch.delenv("HOME")
    assert main(["slurm", "--dry-run", "--", "x"]) == 0


def test_slurms_variables_are_checked_together() -> None:
    for changes, said in (
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID: 4 is not below SLURM_STEP_NUM_TASKS, 4"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID: 'x' is not a whole number"),
        ({"SLURM_LOCALID": "2"}, "SLURM_NODEID 1, SLURM_LOCALID 2: do not fit SLURM_STEP_TASKS_PER_NODE"),
        ({"SLURM_NODEID": ""}, "SLURM_NODEID: not set"),
    ):
        with pytest.raises(ValueError, match=said):
            task.variables(STEP | changes)
