"""The queue: one after the other, in processes that outlive the page, and what became of each from files alone."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from ldm.web.studio import queue as module
from ldm.web.studio.queue import Queue

SAVES = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(sys.argv[1], "a").write(f"{os.getpid()} {os.getcwd()}\\n")
time.sleep(float(sys.argv[2]))
"""


def wait(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A queue whose commands are `SAVES`; it works only when told."""
    monkeypatch.setattr(module, "program", lambda argv: [sys.executable, "-c", SAVES, *argv])
    made = Queue(tmp_path / "runs")
    made.runs.mkdir()
    monkeypatch.setattr(made, "work", lambda: None)
    return made


def test_one_after_the_other_as_they_were_added(queue, tmp_path):
    trace = tmp_path / "trace"
    for name in ("a", "b"):
        queue.add([str(trace), "0"], queue.runs / name)
    assert [(j.number, j.told) for j in queue.jobs()] == [(1, "waiting"), (2, "waiting")]
    queue.drain()
    assert [j.told for j in Queue(queue.runs).jobs()] == ["finished", "finished"]
    pids, folders = zip(*(line.split() for line in trace.read_text().splitlines()), strict=True)
    assert len(set(pids)) == 2
    assert set(folders) == {os.getcwd()}
    assert queue.log(queue.jobs()[0]).read_text().startswith(f"$ ldm {trace} 0\n")


def test_stop_saves_and_the_next_goes_on(queue, tmp_path):
    trace = tmp_path / "trace"
    queue.add([str(trace), "60"], queue.runs / "a")
    queue.add([str(trace), "0"], queue.runs / "b")
    worker = threading.Thread(target=queue.drain)
    worker.start()
    wait(lambda: trace.exists() and trace.read_text())
    first = queue.of(queue.runs / "a")
    assert first.alive
    assert first.told == "running"
    with pytest.raises(ValueError, match="a: is running already"):
        queue.add(["x"], queue.runs / "a")
    queue.stop(queue.runs / "a", None)
    worker.join(60)
    assert [(j.told, j.code) for j in queue.jobs()] == [("stopped", 75), ("finished", 0)]
    with pytest.raises(ValueError, match="does not train now"):
        queue.stop(queue.runs / "a", None)
    assert queue.add(first.argv, queue.runs / "a").number == 3  # it may go on


def test_a_failure_tells_its_last_line(queue, monkeypatch):
    script = "import sys; sys.stderr.write('ldm train: no such folder\\n'); sys.exit(2)"
    monkeypatch.setattr(module, "program", lambda argv: [sys.executable, "-c", script])
    job = queue.add(["train", "x"], queue.runs / "a")
    queue.drain()
    (job,) = queue.jobs()
    assert (job.told, job.code) == ("failed", 2)
    assert "no such folder" in queue.log(job).read_text()
    assert queue.problem(job)


def test_taking_out(queue):
    queue.add(["x"], queue.runs / "a")
    queue.add(["y"], queue.runs / "b")
    queue.remove(1)
    assert [j.number for j in queue.jobs()] == [2]
    with pytest.raises(ValueError, match="does not wait"):
        queue.remove(1)
    assert queue.add(["z"], queue.runs / "c").number == 3  # a number is not given twice


def test_a_process_that_is_gone_is_not_taken_for_another(queue):
    job = queue.add(["x"], queue.runs / "a")
    path = queue.folder / "jobs" / "0001.running.json"
    (queue.folder / "jobs" / "0001.waiting.json").rename(path)
    text = path.read_text()
    mine = module._born(os.getpid())
    path.write_text(text.replace('"pid": 0', f'"pid": {os.getpid()}').replace('"born": ""', f'"born": "{mine}"'))
    assert queue.of(Path(job.run)).alive
    path.write_text(text.replace('"pid": 0', f'"pid": {os.getpid()}').replace('"born": ""', '"born": "1.5"'))
    assert not queue.of(Path(job.run)).alive
    assert queue.of(Path(job.run)).told == "ended"


def test_the_worker_is_a_process_of_its_own(tmp_path):
    """A real command through `launch`, by a worker that the queue starts; a second one is not started."""
    queue = Queue(tmp_path / "runs")
    queue.runs.mkdir()
    queue.add(["data", "check", str(tmp_path / "no")], queue.runs / "a")
    (worker,) = queue._workers
    assert os.getsid(worker.pid) == worker.pid != os.getsid(0)  # a terminal that closes does not end it
    wait(lambda: queue.jobs()[0].state == "ended")
    assert worker.wait(30) == 0
    (job,) = queue.jobs()
    assert (job.told, job.code) == ("failed", 2)
    assert "no such folder" in queue.problem(job)
