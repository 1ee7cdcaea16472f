"""The run folder's lock. The oracle is the promise itself: never two writers, never a folder locked for good."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ldm.checkpoint.lock import LockLost, Owner, RunLock, RunLocked

ROOT = Path(__file__).parents[3]

LEASE = 0.4


def hold(folder: Path, **changes: object) -> Owner:
    """Write a lock by hand, as another process would have left it."""
    owner = replace(Owner.me(), **changes)  # type: ignore[arg-type]
    (folder / "lock.json").write_text(json.dumps(asdict(owner)))
    (folder / f"lock-{owner.token}.beat").write_text("0\n")
    return owner


def test_a_free_folder_is_taken_at_once_and_left_empty(tmp_path: Path) -> None:
    begun = time.monotonic()
    with RunLock(tmp_path / "run", lease=60) as lock:
        lock.check()
        assert lock.token
    assert time.monotonic() - begun < 5
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lock.guard"]


def test_a_second_start_is_refused_and_told_who_runs(tmp_path: Path) -> None:
    with RunLock(tmp_path, lease=LEASE) as lock:
        with pytest.raises(RunLocked, match=r"in use by process \d+ on "):
            RunLock(tmp_path, lease=LEASE).acquire()
        lock.check()


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"born": "1"}], ids=["no such process", "number came again"])
def test_a_dead_owner_of_this_machine_is_followed_at_once(tmp_path: Path, change: dict[str, object]) -> None:
    hold(tmp_path, **change)
    begun = time.monotonic()
    with RunLock(tmp_path, lease=60) as lock:
        lock.check()
    assert time.monotonic() - begun < 5


def test_an_owner_killed_with_9_is_followed_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from ldm.checkpoint.lock import RunLock; RunLock(sys.argv[1], lease=2).acquire(); print(1)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-u", "-c", code + "; time.sleep(60)", str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert owner.stdout is not None
    owner.stdout.readline()
    with pytest.raises(RunLocked):
        RunLock(tmp_path, lease=2).acquire()
    owner.kill()
    owner.communicate()
    with RunLock(tmp_path, lease=60):
        pass


def test_a_silent_owner_elsewhere_is_followed_after_its_lease_and_a_second_one(tmp_path: Path) -> None:
    hold(tmp_path, host="elsewhere", machine="elsewhere")
    begun = time.monotonic()
    with RunLock(tmp_path, lease=LEASE) as lock:
        lock.check()
        assert 2 * LEASE <= time.monotonic() - begun < 20


def test_a_later_start_of_the_same_job_takes_over_from_a_living_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    old = RunLock(tmp_path, lease=LEASE).acquire()
    old._owner = replace(old._owner, machine="elsewhere") if old._owner else None  # a node that was cut off
    hold_again = json.loads((tmp_path / "lock.json").read_text()) | {"machine": "elsewhere"}
    (tmp_path / "lock.json").write_text(json.dumps(hold_again))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begun = time.monotonic()
    new = RunLock(tmp_path, lease=LEASE).acquire()
    assert time.monotonic() - begun >= LEASE  # the old one may have been publishing
    with pytest.raises(LockLost, match="may not write"):
        old.check()
    new.check()
    old.release()  # gives up nothing that is not its own
    new.check()
    new.release()


def test_an_earlier_start_does_not_take_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with RunLock(tmp_path, lease=LEASE) as lock:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        with pytest.raises(RunLocked, match="SLURM job 7"):
            RunLock(tmp_path, lease=LEASE).acquire()
        lock.check()


def test_what_passed_the_check_is_published_before_the_next_owner_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner that is stopped between lives (no beats) may publish within a lease of its check, never later."""
    events: list[tuple[float, str]] = []
    first = RunLock(tmp_path, lease=LEASE).acquire()
    first._stop.set()
    monkeypatch.setattr(first, "_beat", lambda: None)  # its disk is slow: no beat arrives
    lock = json.loads((tmp_path / "lock.json").read_text()) | {"machine": "elsewhere"}
    (tmp_path / "lock.json").write_text(json.dumps(lock))

    def follow() -> None:
        with RunLock(tmp_path, lease=LEASE) as second:
            events.append((time.monotonic(), "second"))
            second.check()
            time.sleep(LEASE)

    thread = threading.Thread(target=follow)
    thread.start()
    last = 0.0
    end = time.monotonic() + 20
    while time.monotonic() < end:
        before = time.monotonic()
        try:
            first.check()
        except LockLost:
            break
        last = before
        time.sleep(0.01)
    thread.join()
    assert events
    assert events[0][0] - last >= LEASE


def test_of_many_claimants_one_wins(tmp_path: Path) -> None:
    hold(tmp_path, pid=2**22 + 1)
    won: list[RunLock] = []
    refused: list[str] = []

    def claim() -> None:
        try:
            won.append(RunLock(tmp_path, lease=LEASE).acquire())
        except RunLocked as error:
            refused.append(str(error))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7)
    won[0].check()
    won[0].release()


def test_a_removed_lock_stops_its_owner(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, lease=LEASE).acquire()
    (tmp_path / "lock.json").unlink()
    with pytest.raises(LockLost):
        lock.check()
    lock.release()


def test_nothing_is_promised_without_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(LockLost, match="not held"):
        lock.check()
    with pytest.raises(ValueError, match="lease: must be above 0"):
        RunLock(tmp_path, lease=0)


def test_the_lock_needs_the_standard_library_alone() -> None:
    """Programs that only watch a run folder, on login nodes without PyTorch, take it too."""
    code = "import sys; sys.modules['torch'] = None; from ldm.checkpoint.lock import RunLock"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
