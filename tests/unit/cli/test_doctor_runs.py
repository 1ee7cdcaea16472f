"""`ldm doctor` as a command: without any package, with packages that refuse, hang or die, and as it stands here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pytest

from ldm.cli.doctor import main
from ldm.cli.doctor.children import Question, ask, ours
from ldm.cli.doctor.screen import WIDTH

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "torchvision", "deepspeed", "xformers", "open_clip", "transformers", "numpy", "omegaconf", "psutil")
REFUSES = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
"""


def run(*argv: str, python: str = sys.executable, path: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    found = os.pathsep.join(filter(None, [path, str(ROOT)]))
    return subprocess.run(
        [python, "-m", "ldm.cli", "doctor", *argv],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": found, **env},
    )


def test_without_any_package(tmp_path: Path) -> None:
    """In an environment that has nothing but Python: one finding, the line that installs, and exit code 1."""
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, env={}).returncode == 1
    began = time.monotonic()
    done = run("--json", python=python)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert not found["fit"]
    assert [f["key"] for f in found["findings"] if f["level"] == "stops"] == ["packages-missing"]
    assert found["torch"]["state"] == "missing"
    assert found["measured"]["disk"]["write_gb_per_s"] > 0
    assert time.monotonic() - began < 100
    shown = run("--quick", python=python).stdout
    assert "pip install ." in shown
    assert "torch      missing" in shown


def test_with_packages_that_refuse(tmp_path: Path) -> None:
    """Installed and not importable is told from missing, with what the import said."""
    (tmp_path / "sitecustomize.py").write_text(REFUSES)
    done = run("--json", "--quick", path=str(tmp_path))
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["torch"]["state"] == "broken"
    assert found["torch"]["error"] == "ImportError: refused: torch"
    assert "refused: deepspeed" in found["imports"]["deepspeed"]["error"]
    assert [f["key"] for f in found["findings"] if f["level"] == "stops"] == ["torch-broken"]
    assert "measured" not in found


@pytest.mark.parametrize(
    ("code", "state", "said"),
    [
        ("import time; time.sleep(600)", "stuck", "no end within 3 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "broken", "died of SIGSEGV"),
    ],
)
def test_a_torch_that_hangs_or_dies(code: str, state: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(code)
    began = time.monotonic()
    found = json.loads(run("--json", "--quick", "--limit", "3", path=str(tmp_path)).stdout)
    assert (found["torch"]["state"], found["torch"]["error"]) == (state, said)
    assert time.monotonic() - began < 60


def test_children_end_with_what_they_started() -> None:
    """The limit ends grandchildren too, and what was said before it stays."""
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); p.wait()"
    began = time.monotonic()
    hangs, well, gone = ask(
        [
            Question((sys.executable, "-c", script), 2.0),
            Question((sys.executable, "-c", "print('x')"), 60.0),
            Question(("/no/such/program",), 1.0),
        ]
    )
    assert time.monotonic() - began < 30
    assert hangs.ended == "no end within 2 s"
    assert _gone(int(hangs.log))
    assert (well.ended, well.log) == ("", "x\n")
    assert gone.ended == "/no/such/program: No such file or directory"


def _gone(number: int) -> bool:
    """Whether the process has ended; one that nobody waits for stays a zombie."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_files_are_looked_at(tmp_path: Path) -> None:
    found = ask([ours("files", str(tmp_path / "not" / "there"), str(tmp_path), limit=60.0, HF_HOME=str(tmp_path))])[0]
    assert found.ended == ""
    usage = os.statvfs(tmp_path)
    runs, temporary = found.values["disks"]
    assert runs["total_gb"] == pytest.approx(usage.f_blocks * usage.f_frsize / 1e9, abs=0.01)
    assert (runs["exists"], runs["writable"], temporary["exists"]) == (False, True, True)
    assert found.values["hub"]["source"] == "HF_HOME"
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, said in (
        (["--limit", "0"], "--limit must be in"),
        (["--folder", str(tmp_path / "no")], "is not a folder"),
    ):
        with pytest.raises(ValueError, match=said):
            main(argv)
    with pytest.raises(SystemExit):
        main(["--quik"])
    assert "did you mean --quick?" in capsys.readouterr().err


@pytest.mark.slow
def test_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, in this environment, which trains: the figures are there, and nothing is left behind."""
    assert main(["--folder", str(tmp_path), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    import torch

    assert found["torch"]["version"] == torch.__version__
    assert found["imports"]["deepspeed"]["ok"]
    assert found["attention"]["cpu"]["math"]["runs"]
    assert found["attention"]["cpu"]["ldm"] == "sdpa"
    measured = found["measured"]
    assert measured["matrix_product_gflop_per_s"]["cpu"]["fp32"] > 0.1
    assert measured["memory_gb_per_s"]["cpu"] > 0.1
    assert measured["all_reduce_gloo"]["bus_gb_per_s"] > 0.001
    assert list(tmp_path.iterdir()) == []
    main(["--folder", str(tmp_path), "--quick"])
    assert all(len(line) <= 2 * WIDTH for line in capsys.readouterr().out.splitlines())
