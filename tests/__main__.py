"""`python -m tests [pytest options]`: every part of the suite, whatever fails, and one sum at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
BESIDE = ("unit", "parity", "integration")
"""Folders whose tests keep one core busy: they run on two workers."""
ARITHMETIC = (
    "autoencoder", "autoencoder_16", "controlnet", "flow", "half_precision", "ip_adapter", "lora_files",
    "own_schedulers", "pipelines", "samplers_diffusers", "samplers_toy", "text", "transformers", "unet", "zimage",
)  # fmt: skip
"""The parity files that are run twice: one of each network, sampler and precision. Others have the same arithmetic."""
LONGEST = 12
"""Files of each part whose seconds are told."""
NO_TESTS = 5
"""pytest's exit code when its options leave no test."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of pytest: its name, where, with which options and environment."""

    name: str
    folders: list[str]
    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a part came to; `broken` says that pytest itself ended badly. `files`: seconds of each file's tests."""

    name: str
    passed: int
    skipped: int
    failed: list[str]
    seconds: float
    broken: str = ""
    files: dict[str, float] = field(default_factory=dict)


def other_arithmetic() -> dict[str, str]:
    """The environment in which PyTorch and oneDNN compute as on a plainer processor than this one."""
    import torch

    plain = torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    return {"ATEN_CPU_CAPABILITY": "avx2" if plain else "default", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def parts(in_ci: bool) -> list[Part]:
    """The suite; continuous integration also runs what computes as on another processor."""
    rest = sorted(str(p.relative_to(HERE.parent)) for p in HERE.iterdir() if p.is_dir() and p.name not in BESIDE)
    beside = [f"{HERE.name}/{name}" for name in BESIDE]
    workers = ["-n", "2", "--dist", "loadfile"]
    made = [
        Part(name="units, parity, whole runs", folders=beside, options=workers),
        Part(name="several processes, clusters", folders=[p for p in rest if "__" not in p]),
    ]
    if in_ci:
        rooms = (
            "diffusion",
            "evaluate",
            "metrics",
            "models",
            "objectives",
            "sampling",
            "data/test_jpeg.py",
            "test_pipeline.py",
        )
        numeric = [f"tests/unit/{room}" for room in rooms]
        other = other_arithmetic()
        name = "as on another processor: " + " ".join(f"{k}={v}" for k, v in other.items())
        parity = [f"tests/parity/test_{one}.py" for one in ARITHMETIC]
        made.append(Part(name=name, folders=[*numeric, *parity], options=workers, environment=other))
    return made


def read(report: Path) -> tuple[int, int, list[str]]:
    """Passed, skipped and the names of what failed, from pytest's JUnit report."""
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}")
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, failed


def seconds_by_file(report: Path) -> dict[str, float]:
    """The longest files of pytest's JUnit report, with their set-up."""
    found: dict[str, float] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = str(case.get("classname", "")).replace(".", "/")
        found[name] = found.get(name, 0.0) + float(case.get("time", 0))
    return dict(sorted(found.items(), key=lambda item: -item[1])[:LONGEST])


def run(part: Part, options: list[str]) -> Outcome:
    """One part in a process of its own."""
    print(f"\n=== {part.name}: {' '.join(part.folders)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "not slow", f"--junitxml={report}", *part.options, *options]
        began = time.monotonic()
        code = subprocess.run([*command, *part.folders], cwd=HERE.parent, env=os.environ | part.environment).returncode
        seconds = time.monotonic() - began
        passed, skipped, failed = read(report) if report.is_file() else (0, 0, [])
        files = seconds_by_file(report) if report.is_file() else {}
    broken = "" if code in (0, NO_TESTS) or failed else f"pytest ended with code {code}"
    return Outcome(
        name=part.name, passed=passed, skipped=skipped, failed=failed, seconds=seconds, broken=broken, files=files
    )


def main(options: list[str]) -> int:
    """Run every part; 0 if nothing failed and something ran."""
    outcomes = [run(part, options) for part in parts(in_ci=bool(os.environ.get("CI")))]
    print("\n=== all parts")
    for o in outcomes:
        print(f"{o.name}: {o.passed} passed, {len(o.failed)} failed, {o.skipped} skipped in {o.seconds:.0f} s")
        print("  longest: " + ", ".join(f"{Path(name).name} {seconds:.0f} s" for name, seconds in o.files.items()))
        for line in [*o.failed, *([o.broken] if o.broken else [])]:
            print(f"  FAILED {line}")
    failed = sum(len(o.failed) + bool(o.broken) for o in outcomes)
    passed = sum(o.passed for o in outcomes)
    print(f"{passed} passed, {failed} failed, {sum(o.skipped for o in outcomes)} skipped")
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
