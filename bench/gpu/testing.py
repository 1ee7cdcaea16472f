"""The tests marked `gpu`, in a process of their own under a limit of time; what is missing for one leaves it out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu.reports import PLACE
from bench.gpu.runner import ROOT, child, end

_MISSING = re.compile(r"No module named '([\w.]+)'")
_MARK = re.compile(r"mark\.gpu\b")
_SLOW = re.compile(r"\balone\(|multiprocessing")
"""Tests in processes of their own, which begin by importing everything."""


def files() -> list[str]:
    """Test files that have such tests, slow ones last."""
    texts = {p: p.read_text(encoding="utf-8") for p in sorted((ROOT / "tests").rglob("test_*.py"))}
    devices = "import DEVICES"  # whose cases are marked
    found = [p for p, text in texts.items() if _MARK.search(text) or devices in text]
    return [str(p.relative_to(ROOT)) for p in sorted(found, key=lambda p: bool(_SLOW.search(texts[p])))]


def outcome(line: dict[str, Any]) -> tuple[str, str]:
    """(passed, failed or skipped, and why) of a report; what fails for want of a package is skipped."""
    gone = _MISSING.search(line["why"])
    if line["outcome"] in ("failed", "error") and gone:
        return "skipped", f"{gone[1].split('.')[0]} is not installed"
    return ("failed" if line["outcome"] == "error" else line["outcome"]), line["why"]


def run(folder: Path, limit: float, tell: Callable[[str], object]) -> dict[str, Any]:
    """Counts, the names of those that failed and of those that were left out, and how it ended ("" is well)."""
    reports, log = folder / "reports", folder / "tests.log"
    reports.touch()
    words = [
        "-m", "pytest", "-m", "gpu", "-p", "bench.gpu.reports", "-p", "no:cacheprovider", "-q", "--tb=short",
        "--import-mode=importlib", "--continue-on-collection-errors", "-o", "addopts=", *files(),
    ]  # fmt: skip
    os.environ[PLACE] = str(reports)
    began, seen, ended = time.monotonic(), 0, ""
    process = child(words, log)
    try:
        while process.poll() is None and not ended:
            time.sleep(0.2)
            lines = _lines(reports)
            for line in lines[seen:]:
                kind, why = outcome(line)
                tell(f"{kind:<8} {line['seconds']:6.1f} s  {line['name']}{f': {why}' if why else ''}")
            seen = len(lines)
            if time.monotonic() - began > limit:
                ended = f"stopped after {limit:.0f} s"
    finally:
        end(process)
    return _counted(_lines(reports), ended or _how(process, log)) | {"seconds": round(time.monotonic() - began, 1)}


def _how(process: subprocess.Popen[bytes], log: Path) -> str:
    if process.returncode in (0, 1, 5):  # 1: some failed, 5: none was selected
        return ""
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    missing = [m[1] for line in said if (m := _MISSING.search(line))]
    if "pytest" in missing:
        return "pytest is not installed"
    return (said[-1] if said else f"exit {process.returncode}")[:300]


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _counted(lines: list[dict[str, Any]], ended: str) -> dict[str, Any]:
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failing": [], "left_out": {}, "ended": ended}
    for line in lines:
        kind, why = outcome(line)
        found[kind] += 1
        if kind == "failed":
            found["failing"].append({"name": line["name"], "why": why})
        elif kind == "skipped":
            found["left_out"][why] = found["left_out"].get(why, 0) + 1
    return found
