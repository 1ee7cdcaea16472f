"""Guards: spikes found and gone back behind, hangs told with stacks and a code, stragglers named, bad samples kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.train import guards
from ldm.train.guards import GuardConfig, Spikes, Watchdog, straggler
from tests.unit.train.test_trainer import make as make  # the fixture
from tests.unit.train.test_trainer import rows

ROOT = Path(__file__).parents[3]


def test_a_spike_is_so_many_times_the_median_and_does_not_enter_it() -> None:
    spikes = Spikes(GuardConfig(spike=3.0, window=8, patience=2))
    assert not any(spikes.see(v) for v in (1.0, 50.0, 1.0, 1.2, 0.9, 1.1))  # too early, then calm
    assert not spikes.see(3.5)
    assert not spikes.see(1.0)  # a single one is none
    assert not spikes.see(4.0)
    assert spikes.see(4.0)
    again = Spikes(spikes.config)
    again.load(json.loads(json.dumps(spikes.state())))
    assert again.state() == spikes.state()
    assert again.see(3.6) == spikes.see(3.6)
    assert not any(Spikes(GuardConfig()).see(v) for v in (1.0,) * 50 + (1e9,))  # off by default


class Spiky:
    """Rows whose error is a thousand times larger at some positions."""

    def __init__(self, rows: Any, at: tuple[int, ...]) -> None:
        self._rows, self._at = rows, at
        self.accumulate = 1

    def batches(self, start: int) -> Any:
        for batch in self._rows.batches(start):
            if int(batch["position"]) in self._at:
                batch = batch | {"x": batch["x"] * 1000}
            yield batch


def test_after_a_spike_the_run_goes_on_from_the_checkpoint_without_its_data(make: Any) -> None:
    """Steps 8 and 9 of the data are skipped: the survivor equals a run on data that never had them."""
    guard = GuardConfig(spike=50.0, window=8)
    spiky = make(steps=12, guard=guard)
    spiky.loader = Spiky(spiky.loader, (8,))
    assert spiky.run([]) == 0
    assert (spiky.rollbacks, spiky.ahead) == (1, 3)  # at step 9, back to 6: positions 6, 7, 8 are not seen again

    class Without:
        def batches(self, start: int) -> Any:
            rows = make(out="other").loader.batches(0)
            seen = [next(rows) for _ in range(20)]
            yield from [b for b in seen if int(b["position"]) not in (6, 7, 8)][start:]

    calm = make(steps=12, out="calm")
    calm.loader = Without()
    assert calm.run([]) == 0
    assert [r["loss"] for r in rows(spiky)] == [r["loss"] for r in rows(calm)]
    assert [r["step"] for r in rows(spiky)] == list(range(1, 13))
    for averaged in (True, False):
        for name, value in calm.weights(averaged).items():
            assert torch.equal(spiky.weights(averaged)[name], value)
    events = [json.loads(line) for line in (spiky.out / "log" / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"], e["from"]) for e in events] == [("rollback", 6, 9)]


def test_the_data_stay_skipped_after_a_resume(make: Any) -> None:
    guard = GuardConfig(spike=50.0, window=8)
    whole = make(steps=14, guard=guard, out="whole")
    whole.loader = Spiky(whole.loader, (8,))
    whole.run([])
    for steps in (10, 14):
        part = make(steps=steps, guard=guard, out="parts")
        part.loader = Spiky(part.loader, (8,))
        part.run([])
    assert (part.rollbacks, part.ahead) == (1, 3)
    torch.testing.assert_close(part.weights(False), whole.weights(False), rtol=0, atol=0)


def test_spikes_without_end_stop_the_run(make: Any) -> None:
    trainer = make(steps=40, guard=GuardConfig(spike=50.0, window=8, rollbacks=2))
    trainer.loader = Spiky(trainer.loader, tuple(range(8, 99)))
    with pytest.raises(FloatingPointError, match="spikes again after 2 rollbacks"):
        trainer.run([])


def test_samples_of_a_stop_are_in_a_file(make: Any) -> None:
    trainer = make(tuple(range(3, 99)), max_skipped=3)
    with pytest.raises(FloatingPointError, match=r"nonfinite-0\.json"):
        trainer.run([])
    kept = json.loads((trainer.out / "log" / "nonfinite-0.json").read_text())
    assert [(r["step"], r["keys"], r["positions"]) for r in kept] == [(i + 1, [f"k{i}"], [i]) for i in (3, 4, 5)]


HANG = """
import sys, time
from pathlib import Path
from ldm.train.guards import Watchdog

def stuck_in_a_collective():
    time.sleep(3600)

with Watchdog(0.5, Path(sys.argv[1])) as dog:
    dog.beat(41)
    stuck_in_a_collective()
"""


def test_a_hang_writes_every_stack_and_ends_with_its_code(tmp_path: Path) -> None:
    env = os.environ | {"RANK": "3", "WORLD_SIZE": "8"}
    done = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert done.returncode == guards.HUNG == 70
    for text in (done.stderr, (tmp_path / "stacks-3.txt").read_text()):
        assert "rank 3 on " in text
        assert "no step for 0.5 s after step 41" in text
        assert "stuck_in_a_collective" in text


def test_a_slow_step_that_ends_in_time_goes_on(tmp_path: Path) -> None:
    codes: list[int] = []
    with Watchdog(0.4, tmp_path, exit=codes.append) as dog:
        time.sleep(0.5)  # told, but alive again before the exit
        for _ in range(8):
            dog.beat(1)
            time.sleep(0.05)
    with Watchdog(0.0, tmp_path, exit=codes.append):
        time.sleep(0.1)
    assert codes == []


def test_the_straggler_is_named_with_its_host() -> None:
    names = ["a", "a", "b", "b"]
    found = straggler([0.10, 0.11, 0.32, 0.10], [0.0, 0.0, 0.25, 0.0], names, 1.5)
    assert found is not None
    assert (found.rank, found.host) == (2, "b")
    assert str(found).startswith("straggler: rank 2 on b takes 320 ms of its own per step, 3.2 x the median, 250 ms")
    assert straggler([0.10, 0.11, 0.12, 0.10], [0.0] * 4, names, 1.5) is None
    assert straggler([0.10, 0.9], [0.0] * 2, names[:2], 0) is None
    assert straggler([0.9], [0.0], ["a"], 1.5) is None


@pytest.mark.parametrize(
    "bad", [{"spike": 0.5}, {"patience": 0}, {"window": 2}, {"rollbacks": -1}, {"hang": -1.0}, {"straggler": 1.0}]
)
def test_bad_values_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        GuardConfig(**bad)
