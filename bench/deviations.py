"""`python -m bench.deviations [TEST ...]`: the worst deviation from each oracle, as the tests print it.

Runs the samplers' parity tests (or those given) and makes a table of the lines `deviation X` that they print: a row for
each test function and sampler, with how many cases there are and which is the worst. A failing test fails the command.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

TESTS = ("tests/parity/test_samplers_diffusers.py", "tests/parity/test_samplers_toy.py")
_TEST = re.compile(r"^_+ (?P<name>\w+)(?:\[(?P<case>.*)\])? _+$")  # a long name leaves room for one
_LINE = re.compile(r"^deviation (?P<value>[-+.\deE]+|nan|inf)$")


@dataclass
class Worst:
    """Of one test function and sampler."""

    cases: int = 0
    value: float = 0.0
    case: str = ""

    def see(self, value: float, case: str) -> None:
        """Count one deviation; one that is no number is the worst there can be."""
        self.cases += 1
        if self.cases == 1 or (not math.isnan(self.value) and not value <= self.value):
            self.value, self.case = value, case


def collect(lines: Iterable[str], samplers: Iterable[str]) -> dict[tuple[str, str], Worst]:
    """(test function, sampler or "") -> its worst deviation, from pytest's report of passed tests' output."""
    names = set(samplers)
    found: dict[tuple[str, str], Worst] = {}
    test, case = "", ""
    for line in lines:
        if header := _TEST.match(line):
            test, case = header["name"], header["case"] or ""
        elif test and (said := _LINE.match(line.strip())):
            # a case lists its parameters in any order; a test of one sampler has its name
            sampler = next((part for part in case.split("-") if part in names), "")
            sampler = sampler or next((n for n in sorted(names, key=len, reverse=True) if n in test), "")
            found.setdefault((test, sampler), Worst()).see(float(said["value"]), case)
    return found


def table(found: dict[tuple[str, str], Worst]) -> str:
    """Markdown, a row for each test and sampler."""
    rows = ["| test | sampler | cases | worst relative deviation | of |", "|---|---|---|---|---|"]
    for (test, sampler), worst in found.items():
        rows.append(f"| {test} | {sampler} | {worst.cases} | {worst.value:.1e} | {worst.case} |")
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    """Run, print the table; pytest's exit code."""
    from ldm.sampling import SAMPLERS

    command = [sys.executable, "-m", "pytest", "-q", "-rP", "--color=no", "--durations=0", *(argv or TESTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(table(collect(done.stdout.splitlines(), SAMPLERS)))
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-30:]), done.stderr[-2000:], file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
