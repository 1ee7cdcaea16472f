"""examples/distill_2d.py: each distillation, short, against the exact guided teacher's own samples."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.sampling.guidance import classifier_free

EXAMPLES = Path(__file__).parents[3] / "examples"
SHORT = {"consistency": 200, "progressive": 120, "trajectory": 200, "matching": 250, "matching, adversarial": 250}
"""Training steps; a few seconds each on a quiet core."""
LONG = {"matching": 16, "matching, adversarial": 16}
"""How many times as many the long form takes: matching learns in every second step, and begins slower."""


@pytest.fixture(scope="module")
def example() -> Any:
    loaded: Any = None
    for name in ("mixture_2d", "distill_2d"):  # the second imports the first
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
        spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def start(example: Any) -> Any:
    return example.matched(300)


@pytest.fixture(scope="module")
def truth(example: Any) -> Any:
    """The guided teacher's samples, and how far its own four DDIM steps are from them."""
    guided = classifier_free(example.exact, example.EMPTY, 1 + example.W)
    points = example.draw(guided, "heun", 40, 1000)
    return points, example.energy(example.draw(guided, "ddim", 4, 1000, seed=4), points)


@pytest.mark.parametrize(
    ("name", "times", "share"),
    [("consistency", 1, 0.25), ("progressive", 1, 0.2), ("trajectory", 1, 0.4), ("matching", 1, 0.7)]
    + [("matching, adversarial", 1, 0.7)]
    + [pytest.param(name, LONG.get(name, 4), 0.2, marks=pytest.mark.slow) for name in SHORT],
)
def test_four_steps_of_the_student_are_nearer_to_the_teacher_than_four_of_its_own(
    example: Any, start: Any, truth: Any, name: str, times: int, share: float
) -> None:
    distil, sampler = example.STUDENTS[name]
    student = example.STUDENT.denoiser(distil(start, SHORT[name] * times))
    points, own = truth
    found = example.energy(example.draw(student, sampler, 4, 1000, seed=4), points)
    print(f"{name}: energy distance {found:.4f}, the teacher's own four steps {own:.4f}")
    assert found < share * own
