"""Times: published lists, every spacing at every length, ranges of noise."""

from __future__ import annotations

import itertools
import math

import pytest

from ldm.diffusion import Discrete, Flow
from ldm.sampling import SPACINGS, times


def test_published_lists():
    schedule = Discrete()
    assert times(schedule, 13, "trailing") == [999, 922, 845, 768, 691, 614, 537, 461, 384, 307, 230, 153, 76]
    assert times(schedule, 10, "leading", offset=1) == [float(100 * i + 1) for i in reversed(range(10))]
    assert times(schedule, 10, "linspace") == [float(111 * i) for i in reversed(range(10))]
    assert times(schedule, 8, "lcm") == [999, 879, 759, 639, 499, 379, 259, 139]
    karras = [14.6146469, 9.1029377, 5.4784012, 3.1686111, 1.7494231, 0.9140765, 0.4469209, 0.2013999, 0.0819111]
    found = [math.exp(-math.log(a / s)) for a, s in map(schedule.at, times(schedule, 10, "karras"))]
    assert found == pytest.approx([*karras, 0.0291675], rel=2e-5)


@pytest.mark.parametrize("spacing", list(SPACINGS))
@pytest.mark.parametrize(
    "schedule", [Discrete(), Discrete(zero_terminal_snr=True), Discrete(betas="cosine", steps=50), Flow(shift=3.0)]
)
def test_every_spacing_at_every_length(schedule, spacing):
    for steps in (1, 2, 3, 13, 49, 50):
        values = times(schedule, steps, spacing)
        assert len(values) == steps
        assert all(after < before for before, after in itertools.pairwise(values))
        assert schedule.first <= values[-1]
        assert values[0] <= schedule.last
    if schedule.discrete and spacing not in ("karras", "exponential", "ays"):
        assert times(schedule, schedule.steps, spacing) == [float(t) for t in reversed(range(schedule.steps))]


def test_exponential_is_even_in_log_snr():
    schedule = Discrete()
    lam = [math.log(a / s) for a, s in map(schedule.at, times(schedule, 12, "exponential"))]
    gaps = [b - a for a, b in itertools.pairwise(lam)]
    assert gaps == pytest.approx([gaps[0]] * 11, rel=1e-6)


def test_ays_at_ten_steps_is_the_published_curve():
    """Stable Diffusion's schedule has the range that the curve was published for."""
    ratios = [s / a for a, s in map(Discrete().at, times(Discrete(), 10, "ays"))]
    published = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152]
    assert ratios == pytest.approx(published, rel=5e-3)
