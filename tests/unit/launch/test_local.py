"""`launch local`: real processes, no torch; the oracle is what the operating system says of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.job import LocalJob

ROOT = Path(__file__).parents[3]
LAUNCH = [sys.executable, "-m", "launch", "local"]


def start(code: str, *options: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LAUNCH, *options, "--", sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_for(paths: list[Path]) -> None:
    end = time.monotonic() + 20
    while not all(p.exists() and p.stat().st_size for p in paths):
        assert time.monotonic() < end, f"never appeared: {paths}"
        time.sleep(0.02)


SHOW = "import os; print(*[os.environ[k] for k in ('RANK','LOCAL_RANK','WORLD_SIZE','MASTER_ADDR','MASTER_PORT')])"


def test_each_rank_has_its_variables_and_the_same_rendezvous() -> None:
    code, out, err = finish(start(SHOW, "--procs", "3"))
    lines = sorted([*out.splitlines(), *[line.split("] ", 1)[1] for line in err.splitlines()]])
    port = lines[0].split()[-1]
    assert code == 0
    assert lines == [f"{r} {r} 3 127.0.0.1 {port}" for r in range(3)]
    assert {line[:3] for line in err.splitlines()} == {"[1]", "[2]"}


def test_threads_share_the_cores_and_a_choice_of_the_user_stays() -> None:
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    show = [*LAUNCH, "--procs", "2", "--", sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    shared = subprocess.run(show, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30).stdout
    assert shared.strip() == str(max(1, len(os.sched_getaffinity(0)) // 2))
    chosen = subprocess.run(
        show, cwd=ROOT, env={**env, "OMP_NUM_THREADS": "7"}, capture_output=True, text=True, timeout=30
    )
    assert chosen.stdout.strip() == "7"


def test_first_failure_ends_the_others_and_gives_its_exit_code(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, subprocess, sys, time
rank = os.environ["RANK"]
child = subprocess.Popen(["sleep", "60"])           # such as a loader worker
pathlib.Path(r"{tmp_path}", rank).write_text(f"{{os.getpid()}} {{child.pid}}")
while len(list(pathlib.Path(r"{tmp_path}").iterdir())) < 3: time.sleep(0.01)
if rank == "1": sys.exit(7)
time.sleep(60)
"""
    begun = time.monotonic()
    returned, _, err = finish(start(code, "--procs", "3"))
    assert returned == 7
    assert time.monotonic() - begun < 10
    assert "rank 1 (pid " in err
    assert "exit code 7; stopping the other 2" in err
    assert "Traceback" not in err
    pids = [int(pid) for path in tmp_path.iterdir() for pid in path.read_text().split()]
    assert len(pids) == 6
    assert not [pid for pid in pids if alive(pid)]


STUBBORN = """
import os, pathlib, signal, time
got = []
for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2): signal.signal(s, lambda n, f: got.append(n))
pathlib.Path(r"{0}", os.environ["RANK"]).write_text(str(os.getpid()))
while not got: time.sleep(0.01)
pathlib.Path(r"{0}", "got-" + os.environ["RANK"]).write_text(signal.Signals(got[0]).name)
raise SystemExit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_reach_every_rank_which_may_save_and_ask_to_be_run_again(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(STUBBORN.format(tmp_path), "--procs", "2")
    wait_for([tmp_path / "0", tmp_path / "1"])
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 75
    assert (tmp_path / "got-0").read_text() == (tmp_path / "got-1").read_text() == number.name
    assert "ended with" not in err


def test_second_interrupt_kills(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
pathlib.Path(r"{tmp_path}", os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(60)
"""
    process = start(code, "--procs", "2")
    wait_for([tmp_path / "0", tmp_path / "1"])
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 128 + signal.SIGINT
    assert not alive(int((tmp_path / "0").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_killed_launcher_leaves_no_ranks(tmp_path: Path) -> None:
    process = start(STUBBORN.format(tmp_path), "--procs", "2")
    wait_for([tmp_path / "0", tmp_path / "1"])
    process.kill()
    finish(process)
    end = time.monotonic() + 10
    while any(alive(int((tmp_path / r).read_text())) for r in "01"):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_logs_of_each_rank(tmp_path: Path) -> None:
    code = "import os, sys; print('rank', os.environ['RANK']); print('error', file=sys.stderr)"
    returned, _, err = finish(start(code, "--procs", "2", "--log-dir", str(tmp_path / "log")))
    assert returned == 0
    for rank in "01":
        assert sorted((tmp_path / f"log/rank-{rank}.log").read_text().splitlines()) == ["error", f"rank {rank}"]
    assert "\n[1] rank 1\n" in "\n" + err
    assert "\nrank 0\n" in "\n" + err


def test_death_by_signal_is_128_plus_its_number() -> None:
    assert finish(start("import os; os.kill(os.getpid(), 9)"))[0] == 137


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--procs", "0", "--", "true"], "procs: must be at least 1, got 0"),
        (["--port", "70000", "--", "true"], "port: must be in 0..65535, got 70000"),
        (["--", "no-such-program"], "command: 'no-such-program' is neither on PATH nor"),
        ([], "command: nothing to start"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    run = subprocess.run([*LAUNCH, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert run.returncode == 2
    assert run.stderr.startswith(f"launch local: {message}")
    assert run.stderr.count("\n") == 1


def test_job_refuses_impossible_values() -> None:
    with pytest.raises(ValueError, match="threads: must be at least 0, got -1"):
        LocalJob(command=("true",), threads=-1)


def test_a_reader_that_goes_away_ends_all(tmp_path: Path) -> None:
    """Rank 1's lines come through the launcher's pump, which must not leave the ranks on a full pipe."""
    code = f"""
import os, pathlib, time
folder = pathlib.Path(r"{tmp_path}")
beside = folder / ("beside-" + os.environ["RANK"])
beside.write_text(str(os.getpid()))
beside.rename(folder / os.environ["RANK"])
while not all((folder / rank).exists() for rank in "01"):  # a rank that ends earlier ends the other at its start
    time.sleep(0.01)
while True:
    print("x" * 1000)
"""
    shell = '"$@" 2>&1 | head -1 >/dev/null; exit ${PIPESTATUS[0]}'
    for options in (("--procs", "2"), ("--procs", "2", "--log-dir", str(tmp_path / "logs"))):
        command = [*LAUNCH, *options, "--", sys.executable, "-c", code]
        done = subprocess.run(
            ["bash", "-c", shell, "-", *command], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.stderr == ""
        assert done.returncode != 0
        assert not any(alive(int((tmp_path / rank).read_text())) for rank in "01")
        for rank in "01":
            (tmp_path / rank).unlink()


def test_a_taken_port_is_named_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        returned, out, err = finish(start("print('started')", "--port", str(port)))
    assert (returned, out) == (2, "")
    assert err.startswith(f"launch local: --port: {port} is taken by another program")


def test_a_command_without_its_mark_and_options_of_other_launchers() -> None:
    for arguments, said in (
        (["ldm", "train"], "'ldm': the command stands behind --"),
        (["--nproc_per_node", "2", "--", "true"], "did you mean --procs?"),
        (["--procs", "two", "--", "true"], "argument --procs: expected a whole number, got 'two'"),
    ):
        run = subprocess.run([*LAUNCH, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert run.returncode == 2
        assert said in run.stderr
        assert run.stderr.count("\n") == 1
