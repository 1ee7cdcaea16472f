"""A few-step student's own times against diffusers' schedulers, and what is chosen where nothing is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.checkpoint.students import FewSteps, beside, choose, few_steps
from ldm.diffusion import Discrete, Flow, V

SCHEDULE = Discrete(betas="scaled_linear", zero_terminal_snr=True)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("original", [8, 20, 50])
def test_times_are_those_of_diffusers_scheduler(name: str, original: int) -> None:
    import diffusers

    config = scheduler_to_diffusers(SCHEDULE, V(), name) | {"original_inference_steps": original}
    student = few_steps(config, guided=True)
    assert student is not None
    theirs: Any = getattr(diffusers, name).from_config(config)
    for steps in (n for n in (1, 2, 4, 5, 8) if name == "LCMScheduler" or original % n == 0):  # TCD's are others then
        theirs.set_timesteps(steps, original_inference_steps=original)
        assert student.times(SCHEDULE, steps) == theirs.timesteps.tolist()
    assert student.times(SCHEDULE, original + 1) is None
    assert student.times(Flow(), 4) is None


def test_what_a_student_is_drawn_with_where_nothing_is_asked(tmp_path: Path) -> None:
    inside, told = FewSteps("lcm", 8, True), FewSteps("lcm", 50, False)
    assert choose(None, None, None, None) == ("dpmpp_2m", 25, 3.0)
    assert choose(inside, None, None, None) == ("lcm", 4, 1.0)
    assert choose(told, None, None, None) == ("lcm", 4, 3.0)
    assert choose(inside, "tcd", 2, 1.5) == ("tcd", 2, 1.5)
    assert few_steps({"_class_name": "DDIMScheduler"}, guided=True) is None
    assert beside(tmp_path) is None
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "LCMScheduler"}))
    assert beside(tmp_path) == FewSteps("lcm", 50, True)
