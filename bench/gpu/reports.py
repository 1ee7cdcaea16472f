"""A pytest plugin that writes every outcome to a file as it is known, so that a run that is ended has told it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PLACE = "LDM_GPU_REPORTS"


def _say(**line: Any) -> None:
    with Path(os.environ[PLACE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _message(report: Any) -> str:
    text = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr or "")
    errors = [line for line in text.splitlines() if line.startswith("E ")]
    return " ".join((errors[0][1:] if errors else (text.splitlines() or [""])[-1]).split())[:300]


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be imported, or that skips itself."""
    if report.outcome != "passed":
        _say(name=report.nodeid, outcome="skipped" if report.skipped else "error", why=_message(report), seconds=0.0)


def pytest_runtest_logreport(report: Any) -> None:
    """A test's call, or what kept it from being called."""
    if report.when == "call" or report.outcome != "passed":
        outcome = report.outcome if report.when == "call" or report.skipped else "error"
        why = "" if report.outcome == "passed" else _message(report)
        _say(name=report.nodeid, outcome=outcome, why=why, seconds=round(report.duration, 2))
