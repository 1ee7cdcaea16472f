"""Two programs in turns, each in a process of its own with its own allocator; a worker runs what it is told by name."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.timing import Seconds, Spread, ratio


def serve(cases: Mapping[str, Callable[[], object]]) -> None:
    """The worker: for each name on standard input run its case, and tell what it took on standard output."""
    print(json.dumps(sorted(cases)), flush=True)
    for line in sys.stdin:
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        cases[line.strip()]()
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        told = {
            "seconds": seconds,
            "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "faults": after.ru_minflt - before.ru_minflt,
            "peak_mb": after.ru_maxrss / 1024,
        }
        print(json.dumps(told), flush=True)


class Worker:
    """A process that serves cases; leaving the `with` block ends it."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.names: list[str] = self._answer()

    def run(self, name: str) -> dict[str, float]:
        """Run a case there."""
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker of the measurement ended with code {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(title: str, ours: Worker, theirs: Worker, case: str, rounds: int, warmup: int = 1) -> dict[str, Any]:
    """A case of both in turns: time, processor time, page faults and the processes' peaks so far; ours over theirs."""
    workers = {"ldm": ours, "diffusers": theirs}
    for _ in range(warmup):
        for worker in workers.values():
            worker.run(case)
    told: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for i in range(rounds):
        for name in workers if i % 2 == 0 else reversed(workers):
            told[name].append(workers[name].run(case))
    result: dict[str, Any] = {"rounds": rounds, "ratios": {}, "faults": {}, "peak_mb": {}}
    print(f"{title}, as they come, {case}  ({rounds} rounds, a process each, in turns; median, quartiles)")
    for what in ("seconds", "processor"):
        values: Seconds = {name: [t[what] for t in each] for name, each in told.items()}
        s = result["ratios"][f"{what}, ldm / diffusers"] = ratio(values, "ldm", "diffusers").record()
        result[what] = {name: Spread.of(v).record() for name, v in values.items()}
        middle = {name: f"{1e3 * v['median']:.2f}" for name, v in result[what].items()}
        print(
            f"  {what:<10} {middle['ldm']:>10} ms  {middle['diffusers']:>10} ms   ldm / diffusers "
            f"{s['median']:.3f}  {s['quartile_1']:.3f} .. {s['quartile_3']:.3f}"
        )
    for name, each in told.items():
        result["faults"][name] = Spread.of([t["faults"] for t in each]).median
        result["peak_mb"][name] = each[-1]["peak_mb"]
        print(f"  {name:<10} {result['faults'][name]:.0f} page faults a round, peak {each[-1]['peak_mb']:.0f} MB")
    return result
