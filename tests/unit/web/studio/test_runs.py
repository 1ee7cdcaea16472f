"""A run's state is read from its files, whoever started it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.checkpoint.lock import RunLock
from ldm.web.studio import exports, runs
from ldm.web.studio.commands import Commands
from ldm.web.studio.places import Places
from ldm.web.studio.queue import Queue
from ldm.web.studio.studio import Studio

CONFIG = """
task: {kind: finetune, base: emoji, adapter: {kind: lora}, samples: {prompts: [a cat]}}
train: {steps: 40}
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    made = Queue(tmp_path / "runs")
    made.runs.mkdir()
    monkeypatch.setattr(made, "work", lambda: None)
    return made


def make(queue, name="cats", steps=(1, 10)):
    folder = queue.runs / name
    (folder / "log").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    lines = [json.dumps({"step": s, "loss": 1 / s, "lr": 0.1}) + "\n" for s in steps]
    (folder / "log" / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_states_follow_the_files(queue):
    folder = make(queue)
    (run,) = runs.runs(queue)
    assert (run.state, run.step, run.steps, run.method, run.base) == ("idle", 10, 40, "LoRA", "emoji")
    with RunLock(folder):
        assert runs.look(folder, queue).state == "trains"
    (folder / "checkpoints" / "step-10").mkdir(parents=True)
    assert runs.look(folder, queue).state == "stopped"
    (folder / "done.json").write_text('{"step": 40}')
    assert runs.look(folder, queue).state == "finished"


def test_a_dead_owner_is_not_training(queue):
    folder = make(queue)
    script = "import os, sys; from ldm.checkpoint.lock import RunLock; RunLock(sys.argv[1]).acquire(); os._exit(1)"
    subprocess.run([sys.executable, "-c", script, str(folder)], check=False)
    assert (folder / "lock.json").is_file()
    assert runs.look(folder, queue).state == "idle"


def test_a_run_that_was_started_elsewhere_is_stopped_by_its_lock(queue):
    folder = make(queue)
    script = (
        "import sys, signal, time; from ldm.checkpoint.lock import RunLock\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "RunLock(sys.argv[1]).acquire(); print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout.read(2) == b"in"
    run = runs.look(folder, queue)
    assert run.active
    assert queue.stop(folder, run.owner) == f"kill -TERM {process.pid}"
    assert process.wait(30) == 75
    process.stdout.close()
    assert not runs.look(folder, queue).active


def test_sample_now_writes_the_file_that_the_trainer_looks_for(queue):
    folder = make(queue)
    with pytest.raises(ValueError, match="does not train now"):
        runs.sample_now(runs.look(folder, queue))
    with RunLock(folder):
        assert runs.sample_now(runs.look(folder, queue)).endswith(os.fspath(folder / "sample-now"))
        assert (folder / "sample-now").is_file()
        (folder / "config.yaml").write_text("task: {samples: {prompts: []}}\n")
        with pytest.raises(ValueError, match="without sample prompts"):
            runs.sample_now(runs.look(folder, queue))


def test_going_on_is_the_same_command(queue):
    folder = make(queue)
    assert runs.again(runs.look(folder, queue), queue).argv == ("train", str(folder / "config.yaml"))
    queue.remove(1)
    other = queue.runs / "dogs"
    queue.add(["finetune", "lora"], other)
    assert runs.look(other, queue).state == "waiting"
    with pytest.raises(ValueError, match="waiting"):
        runs.again(runs.look(other, queue), queue)
    path = queue.folder / "jobs" / "0002.waiting.json"
    path.write_text(path.read_text().replace('"code": null', '"code": 75'))
    path.rename(path.with_name("0002.ended.json"))
    assert runs.look(other, queue).state == "stopped"
    assert runs.again(runs.look(other, queue), queue).argv == ("finetune", "lora")
    (folder / "done.json").write_text('{"step": 40}')
    with pytest.raises(ValueError, match="has finished"):
        runs.again(runs.look(folder, queue), queue)


def test_exports_are_commands(queue):
    folder = make(queue)
    with pytest.raises(ValueError, match="no checkpoint yet"):
        exports.command(runs.look(folder, queue), "single", None, "x", "runs/cats")
    (folder / "checkpoints" / "step-10").mkdir(parents=True)
    (folder / "checkpoints" / "step-10" / "state.json").write_text("{}")
    run = runs.look(folder, queue)
    assert exports.command(run, "kohya", None, "x", "runs/cats") == ["convert", "runs/cats", "x", "--to", "kohya"]
    assert exports.command(run, "single", 10, "x", "runs/cats")[1] == "runs/cats@10"
    assert exports.command(run, "plain", 10, "x", "runs/cats") == ["export", "runs/cats", "x", "--step", "10"]
    first = exports.target(run, "kohya", None)
    first.write_text("")
    assert exports.target(run, "kohya", None).name == "for_kohya_2.safetensors"
    (folder / "config.yaml").write_text("task: {kind: dreambooth, base: emoji, adapter: {kind: full}}\n")
    whole = runs.look(folder, queue)
    assert exports.command(whole, "lora", None, "x", "r")[-2:] == ["--base", "emoji"]  # its difference from the base


def test_what_draws_beside_a_model_is_none(queue, tmp_path):
    for name, kind in (("cats", "finetune"), ("edges", "controlnet"), ("eyes", "ip_adapter")):
        folder = make(queue, name)
        (folder / "config.yaml").write_text(f"task: {{kind: {kind}, base: emoji}}\n")
        (folder / "checkpoints" / "step-10").mkdir(parents=True)
    places = Places.of([tmp_path], queue.runs, tmp_path / "drawn")
    models = Studio(places, Commands(lambda argv: 0), queue).models()
    assert [Path(name).name for name in models if "runs" in name] == ["cats"]
