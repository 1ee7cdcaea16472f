"""Sample pictures that are asked for where there is nothing to draw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ldm.recipes.samples import SampleHook, Samples


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_without_prompts_says_so_when_it_is_asked(asked: bool, capsys: pytest.CaptureFixture[str]) -> None:
    nothing: Any = None
    trainer: Any = SimpleNamespace(asked=asked)
    SampleHook(Samples(prompts=()), nothing)(trainer, 3)
    assert ("task.samples.prompts is empty" in capsys.readouterr().err) == asked
