"""Jobs that nothing happens to: ranks, logs, exit codes, arrays, dependencies, preflight; on a real cluster."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

import pytest
from cluster import until
from conftest import Run, undisturbed

pytestmark = pytest.mark.timeout(600)


def test_four_ranks_on_two_nodes_run_to_the_end(run: Run) -> None:
    job = run.train(20)
    assert run.cluster.wait(job, "COMPLETED", "FAILED", timeout=180) == "COMPLETED", run.output(job)
    assert run.losses() == undisturbed(20)
    merged = run.merged(job)
    assert [line.split(" ")[0] for line in merged] == sorted(line.split(" ")[0] for line in merged)
    began = {
        re.search(r" (\d@n\d/0) start at step 0, rank (\d) of 4", line).groups()
        for line in merged
        if "start at" in line
    }
    assert began == {("0@n1/0", "0"), ("1@n1/0", "1"), ("2@n2/0", "2"), ("3@n2/0", "3")}
    assert "rank 1 of 4" not in run.output(job)  # the job's own output is rank 0's


def test_exit_code_and_last_words_are_those_of_the_rank_that_failed(run: Run) -> None:
    job = run.train(1000, "--fail", "3:10:7")
    assert run.cluster.wait(job, "COMPLETED", "FAILED", timeout=180) == "FAILED"
    assert run.cluster.details(job)["ExitCode"] == "7:0"
    assert "rank 3 on n2 ended with exit code 7; its last lines" in run.output(job)
    assert "something is wrong here" in run.output(job)
    assert run.cluster.details(job)["Restarts"] == "0"


def test_a_run_folder_takes_one_job_at_a_time(run: Run) -> None:
    first = run.train(1000, ranks=1, nodes=1)
    run.cluster.wait(first, "RUNNING")
    _until_step(run, 5)
    second = run.train(1000, ranks=1, nodes=1)
    assert run.cluster.wait(second, "COMPLETED", "FAILED", timeout=180) == "FAILED"
    assert "in use by process" in run.output(second)
    assert f"SLURM job {first}" in run.output(second)
    assert run.cluster.state(first) == "RUNNING"


def test_arrays_fill_their_number_in_and_dependencies_wait(run: Run) -> None:
    code = "import sys, time; time.sleep(0.5); open(sys.argv[1], 'w').write(str(time.time()))"
    array = run.submit(
        "--no-preflight", "--array", "0-2", command=(sys.executable, "-c", code, f"{run.folder}/a{{array}}")
    )
    after = run.submit(
        "--no-preflight", "--dependency", f"afterok:{array}", command=(sys.executable, "-c", code, f"{run.folder}/b")
    )
    bad = run.submit("--no-preflight", command=("false",))
    never = run.submit("--no-preflight", "--dependency", f"afterok:{bad}", command=("true",))
    run.cluster.wait(after, "COMPLETED", timeout=180)
    times = [float((run.folder / name).read_text()) for name in ("a0", "a1", "a2")]
    assert max(times) + 0.5 <= float((run.folder / "b").read_text())
    assert run.cluster.wait(never, "CANCELLED", timeout=180) == "CANCELLED"


def test_preflight_passes_good_nodes_and_reports_the_all_reduce(run: Run) -> None:
    job = run.submit("--nodes", "2", "--ranks-per-node", "1", command=("true",))
    assert run.cluster.wait(job, "COMPLETED", "FAILED", timeout=200) == "COMPLETED", run.output(job)
    report = json.loads((run.logs / job / "preflight-0.json").read_text())
    assert (report["bad"], report["ranks"], report["nodes"]) == ({}, 2, 2)
    assert report["all_reduce_GB_per_s"] > 0


@pytest.fixture
def full_disk(run: Run) -> Iterator[str]:
    """n2's local disk has 1 MB."""
    run.cluster.on("n2", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(run.cluster.local))
    yield "n2"
    run.cluster.on("n2", "umount", str(run.cluster.local))


def test_preflight_names_the_bad_node_and_the_job_ends(run: Run, full_disk: str) -> None:
    job = run.submit(
        "--disk", str(run.cluster.local), "--nodes", "3", "--ranks-per-node", "1",
        command=("true",),
    )  # fmt: skip
    assert run.cluster.wait(job, "COMPLETED", "FAILED", timeout=200) == "FAILED", run.output(job)
    assert run.cluster.details(job)["ExitCode"] == "69:0"
    assert f"preflight: n2: {run.cluster.local}: 0.00105 GB are free, 1 are needed" in run.output(job)
    assert "preflight: n1:" not in run.output(job)
    assert "bad nodes: n2\n" in run.output(job)


def test_a_spare_node_takes_the_place_of_a_bad_one(run: Run, full_disk: str) -> None:
    code = (
        "import os, pathlib, socket; pathlib.Path(os.sys.argv[1], os.environ['RANK']).write_text(socket.gethostname())"
    )
    job = run.submit(
        "--disk", str(run.cluster.local), "--nodes", "2", "--spares", "1", "--ranks-per-node", "1",
        command=(sys.executable, "-c", code, str(run.folder)),
    )  # fmt: skip
    assert run.cluster.wait(job, "COMPLETED", "FAILED", timeout=200) == "COMPLETED", run.output(job)
    assert [(run.folder / rank).read_text() for rank in "01"] == ["n1", "n3"]


def _until_step(run: Run, step: int) -> None:
    until(lambda: run.step() >= step, 180, lambda: f"never reached step {step}")
