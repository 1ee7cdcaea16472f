"""How `ldm train` ends when it may or can no longer save: one line, and a code that scripts can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from ldm.checkpoint.lock import LockLost
from ldm.cli.__main__ import main
from ldm.recipes import run as recipe
from ldm.train import guards
from ldm.train.writer import SaveFailed
from tests import miniature


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LockLost("run: taken over by process 7 on n2"), guards.LOST),
        (SaveFailed("checkpoint of step 4 could not be written: No space left on device"), guards.UNSAVED),
        (FloatingPointError("not finite 20 times in a row"), 2),
    ],
)
def test_one_line_and_a_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(recipe, "run", fail)
    path = miniature.write(miniature.text_to_image(tmp_path), tmp_path / "config.yaml")
    assert main(["train", str(path)]) == code
    assert capsys.readouterr().err == f"ldm train: {error}\n"
    assert (guards.HUNG, guards.LOST, guards.UNSAVED) == (70, 73, 74)
