"""The table of deviations is what pytest's report says."""

from __future__ import annotations

from bench.deviations import collect, table

REPORT = """
==================================== PASSES ====================================
______________________ test_other[euler-EulerScheduler-7] ______________________
----------------------------- Captured stdout call -----------------------------
deviation 1.0e-06
_ test_other[euler_ancestral-EulerAncestralDiscreteScheduler-cosine-7-epsilon-longer] _
----------------------------- Captured stdout call -----------------------------
deviation 3.0e-06
______________________ test_other[euler-EulerScheduler-9] ______________________
deviation 4.0e-07
deviation 2.0e-05
____________________________ test_ddim_steps_alone _____________________________
deviation nan
deviation 1.0e-03
============================= slowest 10 durations =============================
deviation of another kind
""".splitlines()


def test_each_sampler_has_its_worst_case() -> None:
    found = collect(REPORT, ["ddim", "ddim_steps", "euler", "euler_ancestral"])
    euler = found["test_other", "euler"]
    assert (euler.cases, euler.value, euler.case) == (3, 2e-05, "euler-EulerScheduler-9")
    assert found["test_other", "euler_ancestral"].value == 3e-06
    assert found["test_ddim_steps_alone", "ddim_steps"].value != found["test_ddim_steps_alone", "ddim_steps"].value
    assert len(table(found).splitlines()) == 2 + 3
