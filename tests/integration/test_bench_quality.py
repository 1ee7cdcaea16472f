"""`python -m bench quality`: its arithmetic by closed forms, its resume, its recipes, and the whole at its smallest."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.quality import curve, judge, rows, runs, table, worker
from bench.quality.__main__ import waited
from bench.quality.course import Clock, Course, Watch, planned, seconds_a_step
from bench.quality.curve import MEASURES, Reached, reach
from bench.quality.judge import calls
from bench.quality.runs import Spec
from ldm.checkpoint import files
from ldm.config.load import encode
from ldm.config.schema import load_run
from ldm.pipeline import Settings, TextToImage

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TQDM_DISABLE": "1"}
RISES, FALLS = MEASURES[0], MEASURES[3]


def test_seconds_until_a_quality_are_those_of_a_line_in_their_logarithm() -> None:
    seconds = [38.0, 75.0, 150.0, 300.0]
    rising = [(s, 0.1 + 0.2 * math.log(s)) for s in seconds]
    falling = [(s, 5.0 - 0.7 * math.log(s)) for s in seconds]
    for at in (40.0, 75.0, 111.0, 299.0):
        assert reach(rising, 0.1 + 0.2 * math.log(at), higher=True).seconds == pytest.approx(at)
        assert reach(falling, 5.0 - 0.7 * math.log(at), higher=False).seconds == pytest.approx(at)
    assert reach([(10.0, 0.0), (1000.0, 1.0)], 0.5, higher=True).seconds == pytest.approx(100.0)
    assert curve.ratio(300.0, Reached(75.0)) == (4.0, "")


def test_what_the_curve_does_not_hold_is_a_bound() -> None:
    points = [(10.0, 0.2), (20.0, 0.4)]
    assert reach(points, 0.1, higher=True) == Reached(10.0, "at most")
    assert reach(points, 0.5, higher=True) == Reached(20.0, "at least")
    assert reach(points, 0.2, higher=True) == Reached(10.0, "")
    assert curve.ratio(30.0, Reached(10.0, "at most")) == (3.0, "at least")
    assert curve.ratio(30.0, Reached(20.0, "at least")) == (1.5, "at most")
    dips = [(1.0, 0.0), (2.0, 0.4), (4.0, 0.2), (8.0, 0.6)]
    assert reach(dips, 0.2, higher=True).seconds == pytest.approx(math.sqrt(2.0))  # the first time, not the last
    for wrong in ([], [(0.0, 1.0)], [(2.0, 1.0), (1.0, 2.0)]):
        with pytest.raises(ValueError, match="rising seconds above 0"):
            reach(wrong, 0.5, higher=True)


def point(mark: float, rate: float, end: bool = True, error: float = 1.0, seconds: float = 0.0) -> dict[str, Any]:
    quality = {"retrieval": {"rate": rate}, "kernel_distance": {"mean": rate / 100}}
    told = {"train": quality, "unseen": quality, "velocity_error": {"mean": error}}
    return {"mark": mark, "seconds": seconds or mark, "step": int(10 * mark), "end": end, **told}


def record(name: str, seed: int, points: list[dict[str, Any]], prefix: bool = False) -> dict[str, Any]:
    identity = {"threads": 1, "protocol": {"pictures": 128}}
    told = {"machine": {"cpu": "a CPU", "torch": "2"}, "made": "today", "identity": identity, "name": name}
    return {"recipe": name, "seed": seed, "budget": points[-1]["mark"], "prefix": prefix, "points": points, **told}


def test_only_ends_are_results_unless_nothing_decays() -> None:
    on_the_way, end = point(10, 0.1, end=False), point(20, 0.5)
    assert list(curve.curve([record("a", 0, [on_the_way, end])], RISES)) == [20]
    assert list(curve.curve([record("a", 0, [on_the_way, end], prefix=True)], RISES)) == [10, 20]
    both = [record("a", s, [point(20, v)]) for s, v in ((0, 0.2), (1, 0.4), (2, 0.9))]
    cell = curve.curve(both, RISES)[20]
    assert (cell.mean, cell.spread, cell.seeds) == (pytest.approx(0.5), pytest.approx(math.sqrt(0.13)), (0, 1, 2))
    assert curve.curve(both[:1], RISES)[20].spread is None


def fixture() -> dict[str, list[dict[str, Any]]]:
    """The common recipe has 0.2 after 300 s at its better rate; `fast` has it after sqrt(75 * 150) s."""
    slow = [record("diffusers@1e-4", 0, [point(150, 0.0, end=False), point(300, 0.1)], prefix=True)]
    common = [record("diffusers@1e-3", 0, [point(150, 0.1, end=False), point(300, 0.2)], prefix=True)]
    fast = [record("fast", 0, [point(s, v)]) for s, v in ((75, 0.1), (150, 0.3))]
    return {"fast": fast, "diffusers@1e-4": slow, "diffusers@1e-3": common}


def test_the_table_tells_the_ratio_against_the_best_rate_and_leaves_a_taught_judge_out() -> None:
    text = table.markdown(fixture(), {"fast": "the fast one"}, {}, (300.0, 1800.0))
    assert "R@1, training captions: 0.200 (diffusers@1e-3)" in text
    lines = [line for line in text.splitlines() if line.startswith("| `fast` the fast one")]
    assert lines[0].split(" | ")[1] == f"106 s, **{300 / math.sqrt(75 * 150):.2f}**"
    assert "after 1800" not in text
    assert sum("taught by the judge" in line for line in text.splitlines()) == 0
    taught = table.markdown(fixture(), {}, {"fast": ("clip_emoji",)}, (300.0,))
    assert sum("taught by the judge" in line for line in taught.splitlines()) == 2  # both retrievals
    cells = next(line for line in taught.splitlines() if line.startswith("| `fast`")).split(" | ")
    assert cells[1:3] == ["", ""]
    assert "**" in cells[3]
    assert table.picture(fixture(), {"fast": ("clip_emoji",)}).count("fast") > 0


def test_seeds_are_matched_by_their_number() -> None:
    fast = [record("f", s, [point(75, v)]) for s, v in ((1, 0.1), (0, 0.2))]
    fast += [record("f", s, [point(150, v)]) for s, v in ((0, 0.3), (1, 0.4))]
    found = curve.sooner(curve.curve(fast, RISES), 300.0, 0.25, RISES)
    assert [s.seconds for s in found.seeds] == pytest.approx([math.sqrt(75 * 150)] * 2)


class Ticks:
    """A clock that goes a second at each look of training."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def test_only_training_is_counted_and_marks_are_met_once(tmp_path: Path) -> None:
    ticks = Ticks()
    clock, course = Clock(now=ticks), Course(tmp_path / "course.json", steps=10, rate=1.0)
    saved: list[int] = []

    def measure() -> dict[str, Any]:
        ticks.at += 100.0  # is not counted
        return {"value": ticks.at}

    watch = Watch(course, clock, 10.0, (2.5, 7.0, 10.0), measure=measure, save=lambda: saved.append(step), every=4.0)
    clock.start()
    for step in range(1, 11):
        ticks.at += 1.0
        watch.after(step)
    assert [(p["mark"], p["seconds"], p["step"], p["end"]) for p in course.points] == [
        (2.5, 3.0, 3, False), (7.0, 7.0, 7, False), (10.0, 10.0, 10, True),
    ]  # fmt: skip
    assert saved == [3, 7]  # at marks; the loop keeps the last step itself
    again = Course.read(course.path)
    assert again is not None
    assert (again.kept, again.points, again.steps) == (course.kept, course.points, 10)
    assert again.begin(7) == 7.0
    assert [p["mark"] for p in again.points] == [2.5, 7.0]  # what came after step 7 comes again
    assert again.begin(5) == 3.0 + 2 * 1.0  # not kept: since step 3 by the rate
    assert planned(10.0, 0.3) == 33
    assert seconds_a_step(lambda: setattr(ticks, "at", ticks.at + 3.0), 1, 5, ticks) == 3.0


def test_the_demo_trains_a_measured_recipe() -> None:
    demo, best = load_run(ROOT / "ldm/assets/demo.yaml"), rows.load("soonest_plain").run
    for part in ("network", "process", "options", "vae", "text"):
        assert encode(getattr(best.task, part)) == encode(getattr(demo.task, part))
    assert (best.train.optim, best.train.batch, best.train.ema, best.data) == (
        demo.train.optim, demo.train.batch, demo.train.ema, demo.data,
    )  # fmt: skip


@pytest.mark.parametrize("name", rows.names())
def test_every_recipe_loads_and_differs_from_the_base(name: str) -> None:
    recipe, base = rows.load(name), rows.load("base")
    assert recipe.about.title
    assert (recipe.written == base.written) == (name == "base")
    assert rows.load(name, tiny=True).run.train.batch == 4


def test_rates_are_rows_of_their_own_and_mistakes_are_named(tmp_path: Path) -> None:
    assert rows.find(["diffusers"]) == [f"diffusers@{r}" for r in ("1e-4", "3e-4", "5e-4", "1e-3", "2e-3")]
    assert rows.load("diffusers@3e-4").run.train.optim.lr == 3e-4
    with pytest.raises(ValueError, match=r"recipe 'bas' is not one of base, .*"):
        rows.find(["bas"])
    path = tmp_path / "taught.yaml"
    path.write_text(f"base: {rows.FOLDER / 'base.yaml'}\ntask: {{start: runs/clip_emoji}}\n")
    with pytest.raises(ValueError, match=r"task\.start names clip_emoji, .* in quality\.teachers"):
        rows.read(path)
    path.write_text(f"base: {rows.FOLDER / 'base.yaml'}\nquality: {{teacher: [clip_emoji]}}\n")
    with pytest.raises(ValueError, match="teacher"):
        rows.read(path)


def test_a_run_without_decay_stands_for_all_shorter_ones(tmp_path: Path) -> None:
    base, constant = rows.load("base"), rows.load("constant")
    specs = runs.chosen([base, constant], 2, (75, 38), out=str(tmp_path))
    told = [(s.recipe, s.seed, s.budget) for s in specs]
    assert told == [
        (n, s, b) for b in (38, 75) for s in (0, 1) for n in ("base", "constant") if (n, b) != ("constant", 38)
    ]
    for one in (specs[2], specs[0]):
        runs.write(one, {"identity": one.identity(base), "seed": one.seed, "budget": one.budget})
    assert runs.finished(specs[0], base) is not None
    assert [r["budget"] for r in runs.every(specs[1], base)] == [38, 75]
    other = rows.load("base", precision="fp32")  # another recipe of this name
    assert runs.finished(specs[0], other) is None
    assert runs.every(specs[0], other) == []


def test_told_to_stop_no_further_run_begins() -> None:
    """Whatever the run answers that is told so: one that waits for a lock says that another process has it."""
    busy = f"import signal, sys, time; signal.signal(15, lambda *_: sys.exit({worker.BUSY})); print(1, flush=True)"
    child = subprocess.Popen([sys.executable, "-c", busy + "; time.sleep(60)"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert waited(child) == 75
    child.stdout.close()
    ours = f"import sys, time; time.sleep(1); sys.exit({worker.BUSY})"
    threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,)).start()
    assert waited(subprocess.Popen([sys.executable, "-c", ours])) == 75
    assert waited(subprocess.Popen([sys.executable, "-c", f"raise SystemExit({worker.BUSY})"])) == worker.BUSY


def test_samplers_of_more_network_calls_are_refused() -> None:
    assert calls(Settings(sampler="dpmpp_2m", guidance=3.0), runs.Protocol()) == 40
    with pytest.raises(ValueError, match="sampler: 'heun' is not one of"):
        calls(Settings(sampler="heun"), runs.Protocol())


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this file share one cache."""
    return tmp_path_factory.mktemp("quality")


class Weights:
    """In the judges' place, which the whole run below has: a hash of the averaged weights, so that every bit counts."""

    def __init__(self, *given: Any) -> None:
        pass

    def of(self, pipeline: TextToImage, settings: Settings) -> dict[str, Any]:
        total = hashlib.sha256()
        for value in pipeline.network.state_dict().values():
            total.update(value.detach().cpu().contiguous().numpy().tobytes())
        return {"weights": total.hexdigest()}


WORKER = """
import sys
from bench.quality import judge, worker
from tests.integration.test_bench_quality import Weights
judge.Quality = Weights
sys.exit(worker.main(sys.argv[1:]))
"""


def spec(out: Path, recipe: str, budget: float = 0.5) -> Spec:
    return Spec(recipe=recipe, seed=0, budget=budget, marks=(1e-6,), out=str(out), quick=True)


def given(of: Spec, steps: int) -> None:
    """Plan so many steps, so that two runs are the same."""
    Course(of.work / "course.json", steps=steps, rate=0.01).write()


def outcome(of: Spec) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Points without their seconds, and the record."""
    told = json.loads(of.record.read_text())
    return [{k: v for k, v in p.items() if k != "seconds"} for p in told["points"]], told


def test_a_killed_run_goes_on_as_if_it_had_not_been(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its mark, while it trains; then the same weights as in one go, and seconds that add up."""
    monkeypatch.setattr(judge, "Quality", Weights)
    killed, whole = spec(out, "base", 0.5), spec(out, "base", 0.6)
    whole = replace(whole, marks=killed.marks)
    given(killed, 40)
    process = subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(killed.told())], cwd=ROOT, env=ENV)
    deadline = time.monotonic() + 900
    while not files.steps(killed.work / "checkpoints") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = json.loads((killed.work / "course.json").read_text())
    assert [p["step"] for p in before["points"]] == [1]
    assert worker.work(killed) == 0
    given(whole, 40)
    assert worker.work(whole) == 0
    points, told = outcome(killed)
    straight, once = outcome(whole)
    assert [p | {"mark": 0} for p in points] == [p | {"mark": 0} for p in straight]
    assert told["points"][0] == before["points"][0]
    assert told["points"][1]["seconds"] > before["kept"]["1"]
    assert (told["starts"], once["starts"]) == (2, 1)
    assert not killed.work.exists()
    assert worker.work(killed) == 0  # done: nothing is made again
    assert outcome(killed)[1] == told


def test_the_peer_goes_on_as_if_it_had_not_been_stopped(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from bench.quality import peer

    stopped, whole = spec(out, "diffusers@1e-3", 0.5), spec(out, "diffusers@1e-3", 0.6)
    monkeypatch.setattr(judge, "Quality", Weights)
    for one in (stopped, whole):
        given(one, 6)
    train = peer.Peer.train

    def dies(self: Any, batch: dict[str, Any]) -> float:
        if self.step == 3:
            raise KeyboardInterrupt
        return train(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(peer.Peer, "train", dies)
        with pytest.raises(KeyboardInterrupt):
            worker.work(stopped)
    assert (stopped.work / peer.STATE).is_file()
    assert worker.work(stopped) == 0
    assert worker.work(whole) == 0
    points, told = outcome(stopped)
    assert [p | {"mark": 0} for p in points] == [p | {"mark": 0} for p in outcome(whole)[0]]
    assert told["starts"] == 2
    assert [p["step"] for p in points] == [1, 6]


def test_the_peer_is_judged_through_a_network_that_answers_as_its_own() -> None:
    pytest.importorskip("diffusers")
    from bench.quality import peer

    recipe, pipeline = rows.load("diffusers@1e-3", tiny=True), TextToImage.load("emoji")
    theirs = peer.Peer(recipe, 0, pipeline)
    for average in theirs.ema.shadow_params:
        average.mul_(1.1)
    network = peer.judged(theirs, recipe, pipeline).network
    theirs.ema.copy_to(theirs.unet.parameters())
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 32, 192, generator=g)
    t = torch.tensor([3, 700])
    with torch.no_grad():
        expected = theirs.unet.eval()(x, t, encoder_hidden_states=text, return_dict=False)[0]
        found = network(x, t, {"text": text})
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()) + 1e-6)
    other = replace(recipe, run=rows.load("base").run)
    with pytest.raises(ValueError, match="trains the common recipe alone"):
        peer.check(other)


def test_it_runs_to_its_table_and_then_does_nothing_again(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    page = tmp_path / "quality.md"
    page.write_text((ROOT / "docs" / "quality.md").read_text())
    argv = [sys.executable, "-m", "bench", "quality", "--quick", "--out", str(tmp_path), "--write", str(page)]
    done = subprocess.run(argv, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written["machine"]["threads"] == 1
    assert {name: len(of) for name, of in written["result"]["rows"].items()} == {
        "base": 2, "flow": 2, "diffusers@1e-3": 1,
    }  # fmt: skip
    assert "Nothing yet." not in page.read_text()
    assert written["result"]["table"] in page.read_text()
    assert (tmp_path / table.PICTURE).read_text().startswith("<svg")
    assert "figures mean nothing" in done.stdout
    argv[-2:] = ["--list"]
    again = subprocess.run(argv, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=540)
    assert "5 runs, 5 done" in again.stdout
