"""What a run keeps beside its weights: processor seconds of training alone, its length, what was measured so far."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.checkpoint.files import write_text


class Clock:
    """Processor seconds of this process, all threads, while it is on."""

    def __init__(self, seconds: float = 0.0, now: Callable[[], float] = time.process_time) -> None:
        self.seconds, self._now = seconds, now
        self._began: float | None = None

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> float:
        """Seconds so far; stopping twice counts once."""
        if self._began is not None:
            self.seconds += self._now() - self._began
            self._began = None
        return self.seconds


@dataclass
class Course:
    """Of one run, in a file. `steps` are planned from `rate`, seconds a step, which was measured before it began.

    `kept`: the seconds that each checkpoint's step had cost. `points`: what was measured, with the marks.
    """

    path: Path
    steps: int
    rate: float
    kept: dict[int, float] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 0

    @staticmethod
    def read(path: Path) -> Course | None:
        """None where none began."""
        if not path.is_file():
            return None
        told = json.loads(path.read_text(encoding="utf-8"))
        kept = {int(step): seconds for step, seconds in told["kept"].items()}
        return Course(path, told["steps"], told["rate"], kept, told["points"], told["starts"])

    def write(self) -> None:
        """The whole or nothing."""
        told = {"steps": self.steps, "rate": self.rate, "kept": self.kept, "points": self.points, "starts": self.starts}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(told))

    def begin(self, step: int) -> float:
        """Seconds that `step` steps had cost; what was measured after them is forgotten, as it comes again.

        A step whose seconds were not kept (killed between the weights and them) costs the rate since the last kept one.
        """
        self.points = [p for p in self.points if p["step"] <= step]
        self.kept = {s: seconds for s, seconds in self.kept.items() if s <= step}
        self.starts += 1
        last = max(self.kept, default=0)
        return self.kept.get(last, 0.0) + (step - last) * self.rate


class Watch:
    """Looks up after each step, with the clock stopped: measures at marks, keeps what a resume needs now and then.

    `measure(step)` gives the figures of the averaged weights, `save()` writes the weights of this step.
    """

    def __init__(
        self,
        course: Course,
        clock: Clock,
        budget: float,
        marks: Sequence[float],
        *,
        measure: Callable[[], dict[str, Any]],
        save: Callable[[], None],
        every: float = 60.0,
        batch: int = 1,
    ) -> None:
        self.course, self.clock, self.budget = course, clock, budget
        self.marks = sorted(m for m in marks if m < budget)
        self._measure, self._save, self._every, self._batch = measure, save, every, batch
        self._saved = clock.seconds

    def after(self, step: int) -> None:
        """After optimizer step `step`; the clock runs again afterwards, unless it was the last."""
        seconds, last = self.clock.stop(), step >= self.course.steps
        taken = {p["mark"] for p in self.course.points}
        due = [m for m in self.marks if m <= seconds and m not in taken] if not last else [self.budget]
        if last:
            self.course.points = [p for p in self.course.points if not p["end"]]
        if due:
            self.course.points.append({
                "mark": due[-1], "seconds": seconds, "step": step, "samples": step * self._batch, "end": last,
                **self._measure(),
            })  # fmt: skip
        if due or seconds - self._saved >= self._every:
            self.keep(step)
            if not last:  # the end's weights are kept by the loop
                self._save()
            self._saved = seconds
        if not last:
            self.clock.start()

    def keep(self, step: int) -> None:
        """Write down what this step's weights have cost."""
        self.course.kept[step] = self.clock.stop()
        self.course.write()


def planned(budget: float, rate: float) -> int:
    """Steps that end nearest to the budget."""
    return max(1, round(budget / rate))


def seconds_a_step(
    step: Callable[[], object], warm: int, count: int, now: Callable[[], float] = time.process_time
) -> float:
    """Mean over `count` steps after `warm` others."""
    for _ in range(warm):
        step()
    began = now()
    for _ in range(count):
        step()
    return (now() - began) / count
