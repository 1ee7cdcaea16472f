"""One way to show progress: a bar on a terminal, a line now and then in a pipe, nothing glued to either."""

from __future__ import annotations

import ast
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from ldm import progress

ROOT = Path(__file__).parents[2]


def seconds_of_lines(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("drawing: ")]


def test_a_pipe_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """A day of a step a second: hundreds of lines and not 86,400, the first soon; each is whole."""
    now = 0.0
    with progress.Bar("drawing", "steps", 86_400, clock=lambda: now) as bar:
        for i in range(86_400):
            now = float(i + 1)
            bar.update()
            if i == 59:
                early = capsys.readouterr().err
    err = capsys.readouterr().err
    assert 2 <= len(seconds_of_lines(early)) <= 4
    assert 100 < len(seconds_of_lines(err)) < 500
    assert "\r" not in early + err
    last = seconds_of_lines(err)[-1]
    assert "86400 of 86400 steps" in last
    assert "1.00 steps a second" in last


def test_short_work_in_a_pipe_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar("drawing", "steps", 400) as bar:
        for i in range(400):
            bar.to(i + 1, 400)
    assert capsys.readouterr().err == ""


def test_the_note_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    bar = progress.Bar("training", "steps", 100, start=40, clock=lambda: now)
    bar.note("loss 0.5")
    now = 20.0
    bar.update(10)
    bar.close()
    bar.close()
    assert capsys.readouterr().err == (
        "training: 50 of 100 steps, 00:20 gone, 01:40 left, 0.50 steps a second, loss 0.5\n"
    )


def test_other_ranks_and_tqdm_disable_are_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for env in ({"RANK": "1", "WORLD_SIZE": "2"}, {"TQDM_DISABLE": "1"}):
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            times = iter((0.0, 100.0, 200.0, 300.0))
            with progress.Bar("drawing", "steps", 4, clock=times.__next__) as bar:
                bar.update(4)
    assert capsys.readouterr().err == ""


def on_terminal(code: str) -> str:
    """What a program writes to a terminal as its standard error."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    seen = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:
            break
        if not block:
            break
        seen += block
    child.wait()
    os.close(ours)
    return seen.decode()


def screen(written: str) -> list[str]:
    """The lines that stand on a terminal in the end: a carriage return goes back to a line's begin."""
    lines, at, column = [""], 0, 0
    for char in written.replace("\x1b[A", "\x0b"):
        if char == "\n":
            at += 1
            column = 0
            if at == len(lines):
                lines.append("")
        elif char == "\r":
            column = 0
        elif char == "\x0b":
            at -= 1
        else:
            old = lines[at].ljust(column)
            lines[at] = old[:column] + char + old[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_errors_and_warnings_stand_on_lines_of_their_own() -> None:
    code = """
import sys, warnings
from ldm import dist, progress
with progress.Bar("drawing", "steps", 10) as bar:
    bar.update(3)
    dist.say("said in the middle")
    warnings.warn("a warning")
    progress.line("out.png")
    bar.update(1)
print("an error", file=sys.stderr)
"""
    lines = screen(on_terminal(code))
    assert "said in the middle" in lines
    assert "an error" in lines
    assert "out.png" in lines
    assert any(line.endswith("UserWarning: a warning") and "drawing" not in line for line in lines)
    assert sum("drawing" in line for line in lines) == 1


def test_nothing_else_draws_bars() -> None:
    """tqdm is used in one place, so that every bar is quiet in a pipe."""
    found = []
    for path in sorted((ROOT / "ldm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [str(path.relative_to(ROOT)) for n in names if n.split(".")[0] == "tqdm"]
    assert set(found) == {"ldm/progress.py"}
