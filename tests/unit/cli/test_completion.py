"""`ldm --completion`: scripts that a shell reads, with the verbs and options that there are."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from ldm.cli.__main__ import main


def test_bash_completes_verbs_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    if (bash := shutil.which("bash")) is None:
        pytest.skip("no bash")

    def completed(*words: str) -> set[str]:
        line = (
            f"{script}\nCOMP_WORDS=({' '.join(words)})\nCOMP_CWORD={len(words) - 1}\n"
            f'COMP_LINE={" ".join(words)!r}\nCOMP_POINT=${{#COMP_LINE}}\n_shtab_ldm\necho "${{COMPREPLY[@]}}"\n'
        )
        done = subprocess.run([bash, "--norc", "-c", line], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert completed("ldm", "sam") == {"sample"}
    assert completed("ldm", "sample", "--guid") == {"--guidance", "--guide"}
    assert completed("ldm", "finetune", "tex") == {"textual-inversion"}
    assert "--num-vectors" in completed("ldm", "finetune", "textual-inversion", "--num")


def test_other_shells_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    for shell, sign in (("zsh", "#compdef ldm"), ("tcsh", "complete ldm")):
        assert main(["--completion", shell]) == 0
        assert sign in capsys.readouterr().out
    assert main(["--completion", "cmd"]) == 2
    assert "--completion: expected one of bash" in capsys.readouterr().err
