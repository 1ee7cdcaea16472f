"""The nearest known name, and names that other programs have for the same thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.words import expanded, near


@pytest.mark.parametrize(
    ("word", "said"),
    [("warmpu", "warmup"), ("LR", "lr"), ("batch-size", "batch_size"), ("learning_rate", "lr"), ("xyzzy", "")],
)
def test_near(word: str, said: str) -> None:
    found = near(word, ["warmup", "lr", "batch_size"], {"learning_rate": "lr"})
    assert found == (f"; did you mean {said!r}?" if said else "")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("euler_a", "euler_ancestral"), ("Euler a", "euler_ancestral"), ("k_euler_ancestral", "euler_ancestral"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"), ("EulerDiscreteScheduler", "euler"),
        ("DPM++ 2M", "dpmpp_2m"), ("DPM++ 2M Karras", "dpmpp_2m"), ("dpmpp_2m_karras", "dpmpp_2m"),
        ("DPM++ 2M SDE", "dpmpp_2m_sde"), ("DPMSolverMultistepScheduler", "dpmpp_2m"), ("uni_pc", "unipc"),
        ("UniPC", "unipc"), ("DDIM", "ddim"), ("DDIMScheduler", "ddim"), ("lms_karras", "lms"), ("k_heun", "heun"),
        ("LCMScheduler", "lcm"), ("eulr", "euler"), ("dpm_2", "kdpm2"),
    ],
)  # fmt: skip
def test_samplers_by_the_names_of_others(theirs: str, ours: str) -> None:
    from ldm.sampling import lookup

    with pytest.raises(ValueError, match=rf"; did you mean '{ours}'\?$"):
        lookup(theirs)


def test_other_choices_have_near_names() -> None:
    from ldm.data.filters import absent
    from ldm.models.shipped import locate
    from ldm.plan.hardware import find
    from ldm.sampling.guidance import check_guide

    with pytest.raises(ValueError, match=r"did you mean 'emoji'\?"):
        locate("emojii")
    with pytest.raises(ValueError, match=r"did you mean 'a100-80g'\?"):
        find("A100_81G")
    with pytest.raises(ValueError, match=r"did you mean 'projected'\?"):
        check_guide("projekted", 0.0, None)
    assert absent("widht > 3 and height > 1", ["width", "height"]) == ["'widht'; did you mean 'width'?"]


def test_a_models_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.checkpoint.convert import open_model
    from ldm.data.manifest import resolve
    from ldm.models.shipped import locate

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "manifest.json").write_text("{}")
    assert locate("~/m") == tmp_path / "m"
    assert resolve("~/d") == tmp_path / "d" / "manifest.json"
    with pytest.raises(ValueError, match=str(tmp_path / "m")):  # found, and no model in it
        open_model("~/m")
    assert expanded("a/~") == "a/~"
