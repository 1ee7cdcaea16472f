"""The manners of a command line: one line for a mistake, finite numbers, ~, and how a command ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import options

ROOT = Path(__file__).parents[3]


def parser() -> options.Parser:
    p = options.Parser(prog="it")
    p.add_argument("--steps", type=int, default=25, help="of the sampler (25)")
    p.add_argument("--guidance", type=float, default=3.0)
    p.add_argument("--share", type=float, default=0.5, help="100 %% is all")
    p.add_argument("--out", type=Path, default=Path("samples"), help="folder")
    p.add_argument("--model", default="emoji", help="name or folder")
    p.add_argument("--kind", choices=("one", "three"), help="of two")
    p.add_argument("--fast", action="store_true", help="skip")
    return p


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--steps", "12:00:00"], "argument --steps: expected a whole number, got '12:00:00'"),
        (["--steps", "1.5"], "argument --steps: expected a whole number, got '1.5'"),
        (["--steps", "yes"], "argument --steps: expected a whole number, got 'yes'"),
        (["--guidance", "nan"], "argument --guidance: expected a finite number, got 'nan'"),
        (["--guidance", "inf"], "argument --guidance: expected a finite number, got 'inf'"),
        (["--guidance", "1e999"], "argument --guidance: expected a finite number, got '1e999'"),
        (["--guidence", "3"], "there is no option --guidence; did you mean --guidance?"),
        (["--kind", "tree"], "argument --kind: 'tree' is not one of one, three; did you mean 'three'?"),
        (["--out", ""], "argument --out: expected a path, got an empty word"),
        (["more"], "'more' is one word too many"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(argv)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"it: {said}; `it --help` tells more\n")


def test_numbers_as_people_write_them() -> None:
    found = parser().parse_args(["--steps", "1e4", "--guidance", "1_000"])
    assert (found.steps, found.guidance) == (10_000, 1000.0)
    assert parser().parse_args(["--steps", str(2**70)]).steps == 2**70


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = parser().parse_args(["--out", "~/x y", "--model", "~/m"])
    assert (found.out, found.model) == (tmp_path / "x y", f"{tmp_path}/m")
    assert parser().parse_args(["--out", "~"]).out == tmp_path
    assert parser().parse_args(["--out", "~no such user/x"]).out == Path("~no such user/x")
    monkeypatch.setattr(os.path, "expanduser", lambda text: text)  # as where there is neither HOME nor a user
    with pytest.raises(SystemExit):
        parser().parse_args(["--out", "~/x"])
    assert "HOME is not set" in capsys.readouterr().err


def test_every_default_is_in_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = parser().format_help().splitlines()
    for name, default in (("--steps", "25"), ("--guidance", "3.0"), ("--out", "samples"), ("--model", "emoji")):
        assert any(name in line and f"(default: {default})" in line for line in lines), name


def run(code: str, shell: str = '"$0" -c "$1"', **env: str) -> subprocess.CompletedProcess[str]:
    whole = "import sys\nfrom launch.options import ended\n" + code
    return subprocess.run(
        ["bash", "-c", shell, sys.executable, whole], capture_output=True, text=True, cwd=ROOT, timeout=60,
        env={**os.environ, **env},
    )  # fmt: skip


PRINTS = """
def say():
    for i in range(50_000):
        print("a line", i)
    return 0
sys.exit(ended("it", say))
"""


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    done = run(PRINTS, '"$0" -c "$1" | head -1; exit ${PIPESTATUS[0]}')
    assert (done.returncode, done.stdout, done.stderr) == (141, "a line 0\n", "")
    short = run("sys.exit(ended('it', lambda: print('x') or 0))", '"$0" -c "$1" | true; exit ${PIPESTATUS[0]}')
    assert short.returncode in (0, 141)
    assert short.stderr == ""


def test_a_full_disk_behind_standard_output() -> None:
    for code in ("sys.exit(ended('it', lambda: print('x') or 0))", PRINTS):
        done = run(code, '"$0" -c "$1" >/dev/full')
        assert (done.returncode, done.stderr) == (74, "it: standard output: No space left on device\n")


def test_a_broken_pipe_of_something_else_is_not_hidden() -> None:
    done = run("""
def fails():
    raise BrokenPipeError("a worker's")
ended("it", fails)
""")
    assert "a worker's" in done.stderr


def test_help_into_head() -> None:
    code = "from launch.__main__ import main; sys.exit(main(['slurm', '--help']))"
    done = run(code, '"$0" -c "$1" | head -1; exit ${PIPESTATUS[0]}')
    assert done.returncode in (0, 141)
    assert done.stderr == ""


def test_closed_streams_and_other_alphabets() -> None:
    for closed in (">&-", "2>&-", "<&-", "<&- >&- 2>&-"):
        code = "sys.exit(ended('it', lambda: print('x') or print('y', file=sys.stderr) or 0))"
        assert run(code, f'"$0" -c "$1" {closed}').returncode == 0, closed
    code = "sys.exit(ended('it', lambda: print('caf\\u00e9 \\udce4 \\u732b') or 0))"
    for env in (
        {"LC_ALL": "C"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ):
        done = run(code, **env)
        assert (done.returncode, done.stderr) == (0, ""), env
        assert "caf" in done.stdout


def test_ctrl_c_is_one_line_and_130() -> None:
    code = """
import os, signal, time
def work():
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
sys.exit(ended("it", work))
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (130, "it: interrupted\n")


def test_the_second_ctrl_c_ends_at_once() -> None:
    code = """
import os, signal, time
def work():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
sys.exit(ended("it", work))
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (130, "it: interrupted\n")


def test_ctrl_c_while_modules_are_loaded(tmp_path: Path) -> None:
    """Modules swallow exceptions of what they import; Ctrl-C in there still ends it."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(20)\n"
        "except BaseException:\n    pass\n"
    )
    code = f"""
sys.path.insert(0, {str(tmp_path)!r})
def work():
    import slow
    return 0
sys.exit(ended("it", work))
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (130, "it: interrupted\n")


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        seen: list[Any] = []
        assert options.ended("it", lambda: seen.append(signal.getsignal(signal.SIGINT)) or 0) == 0
        assert seen == [signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGINT, before)
