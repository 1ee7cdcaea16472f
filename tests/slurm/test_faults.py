"""Jobs that things happen to: each ends with the losses of the undisturbed run; on a real cluster."""

from __future__ import annotations

import time
from datetime import datetime

import pytest
from cluster import until
from conftest import Run, undisturbed

pytestmark = pytest.mark.timeout(600)
STEPS = 120


def begin(run: Run, *worker: str, options: tuple[str, ...] = (), steps: int = STEPS, nodes: int = 2) -> str:
    job = run.train(steps, "--pause", "0.05", *worker, options=options, nodes=nodes)
    until(lambda: run.step() >= 10, 180, lambda: f"no progress: {run.output(job)}")
    return job


def finish(run: Run, job: str, timeout: float = 240) -> list[int]:
    """Wait for the end, compare the losses; the steps that the job's starts began at."""
    end = run.cluster.wait(job, "COMPLETED", "FAILED", "NODE_FAIL", "CANCELLED", timeout=timeout)
    assert end == "COMPLETED", run.output(job)
    assert run.losses() == undisturbed(STEPS)
    return run.starts(job)


@pytest.mark.parametrize("signal", ["batch", pytest.param("step", marks=pytest.mark.slow)])
def test_signal_saves_the_same_step_on_all_ranks_and_requeues(run: Run, signal: str) -> None:
    """As SLURM sends it before the time limit (batch), and as one sends it by hand to the steps."""
    job = begin(run, "--child")
    run.cluster.run("scancel", *(["--batch"] if signal == "batch" else []), "--signal=USR2", job)
    first, second = finish(run, job)
    assert first == 0
    assert second >= 10
    saved = [line for line in run.merged(job) if "saved step" in line]
    assert len(saved) == 4
    assert {line.split("saved step ")[1].split()[0] for line in saved} == {str(second)}
    if signal == "batch":
        assert "asking the ranks to save" in run.output(job)


def test_preemption_by_a_higher_priority_job(run: Run) -> None:
    """The ranks get SIGTERM and save; the urgent job runs; the first one comes back."""
    job = begin(run, nodes=3)
    urgent = run.submit(
        "--no-preflight", "--partition", "urgent", "--nodes", "3", "--sbatch=--exclusive", command=("sleep", "1")
    )
    run.cluster.wait(urgent, "RUNNING", "COMPLETED", timeout=180)
    assert run.cluster.state(job) == "PENDING"
    assert run.cluster.wait(urgent, "COMPLETED", timeout=180)
    end = run.cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", timeout=240)
    assert end == "COMPLETED", run.output(job)
    assert run.losses() == undisturbed(STEPS, ranks=6)
    assert run.starts(job)[1] >= 10
    assert len([line for line in run.merged(job) if "saved step" in line]) == 6


def test_scontrol_requeue_resumes(run: Run) -> None:
    job = begin(run)
    run.cluster.run("scontrol", "requeue", job)
    assert finish(run, job)[1] >= 10


def test_scancel_saves_and_stays_cancelled(run: Run) -> None:
    job = begin(run)
    run.cluster.run("scancel", job)
    assert run.cluster.wait(job, "CANCELLED", timeout=120) == "CANCELLED"
    until(lambda: run.cluster.run("squeue", "-h", "-o", "%T") == "", 120, "the job lingers")
    time.sleep(8)  # a requeue would take 6 s
    assert run.cluster.state(job) == "CANCELLED"
    assert run.cluster.details(job)["Restarts"] == "0"
    assert "saved step" in run.output(job)


@pytest.mark.parametrize("node", [pytest.param("n1", id="batch node", marks=pytest.mark.slow), "n2"])
def test_crash_and_boot_of_a_node(run: Run, node: str) -> None:
    job = begin(run)
    run.cluster.crash(node)
    run.cluster.boot(node)
    starts = finish(run, job)
    assert len(starts) == 2
    assert starts[1] >= 10


def test_power_off_moves_the_job_to_the_spare_node(run: Run) -> None:
    job = begin(run)
    run.cluster.power_off("n2")
    assert finish(run, job)[1] >= 10
    assert "n[1,3]" in run.output(job)


@pytest.mark.slow
def test_fewer_nodes_go_on_where_allowed(run: Run) -> None:
    job = begin(run, options=("--min-nodes", "1", "--exclude", "n3"))
    run.cluster.power_off("n2")
    end = run.cluster.wait(job, "COMPLETED", "FAILED", timeout=240)
    assert end == "COMPLETED", run.output(job)
    first, second = run.starts(job)
    assert first == 0
    assert second >= 10
    assert "rank 0 of 4" in run.output(job)
    assert "rank 0 of 2" in run.output(job)
    assert run.losses()[:second] == undisturbed(second)


def test_cable_cut_and_healed_leaves_one_writer(run: Run) -> None:
    """The cut-off rank 0 lives on and writes as fast as it can, until the next start takes the lock from it."""
    job = begin(run, "--stubborn")
    run.cluster.cut("n1")  # rank 0 and the batch script
    until(lambda: len(run.starts(job)) == 2 or run.cluster.state(job) == "COMPLETED", 180, "no second start")
    run.cluster.heal("n1")
    finish(run, job)
    writers = run.writers()  # three if the old start's srun, back on the network, ended the new start's step
    assert len(writers) == len(set(writers)) >= 2  # the old one never wrote again


def test_three_seconds_without_a_cable_go_unnoticed(run: Run) -> None:
    job = begin(run)
    run.cluster.cut("n2")
    time.sleep(3)
    run.cluster.heal("n2")
    assert finish(run, job) == [0]


def test_controller_restart_goes_unnoticed(run: Run) -> None:
    job = begin(run, "--pause", "0.2")
    # SLURM writes its state some seconds after it changes, and a controller that dies earlier forgets the job.
    started = datetime.fromisoformat(run.cluster.details(job)["StartTime"]).timestamp()
    state = run.cluster.root / "state" / "job_state"
    until(lambda: state.exists() and state.stat().st_mtime > started + 1, 60, "the controller did not save the job")
    run.cluster.stop_controller()
    before = run.step()
    until(lambda: run.step() >= before + 10, 120, "the job stopped with its controller")
    run.cluster.start_controller()
    assert finish(run, job) == [0]


def test_at_most_so_many_restarts(run: Run) -> None:
    job = begin(run, options=("--max-restarts", "0"))
    run.cluster.run("scancel", "--batch", "--signal=USR2", job)
    assert run.cluster.wait(job, "FAILED", "COMPLETED", timeout=120) == "FAILED"
    assert run.cluster.details(job)["ExitCode"] == "75:0"
