"""Files of sample prompts: kohya's documented lines, its TOML and JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.interop.prompts import Prompt, read_prompts, samples_of

DOCUMENTED = """# prompt 1
masterpiece, best quality, (1girl), in white shirts --n low quality, worst quality --w 768 --h 768 --d 1 --l 7.5 --s 28

# prompt 2
a dog -- a good one --w 576 --d 2
"""


def test_the_example_of_kohyas_documentation(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(DOCUMENTED)
    first, second = read_prompts(tmp_path / "p.txt")
    assert first.text == "masterpiece, best quality, (1girl), in white shirts"
    assert first.own == {"negative": "low quality, worst quality", "size": [768, 768], "seed": 1, "guidance": 7.5,
                         "steps": 28}  # fmt: skip
    assert second == Prompt("a dog -- a good one", {"seed": 2, "size": [512, 576]})


def test_toml_and_json_hold_the_same(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(
        '[prompt]\nwidth = 64\nheight = 32\nscale = 5\n[[prompt.subset]]\nprompt = "a"\nseed = 3\n'
        '[[prompt.subset]]\nprompt = "b"\nsample_steps = 9\n'
    )
    (tmp_path / "p.json").write_text(
        '[{"prompt": "a", "width": 64, "height": 32, "scale": 5, "seed": 3}, '
        '{"prompt": "b", "width": 64, "height": 32, "scale": 5, "sample_steps": 9}]'
    )
    found = read_prompts(tmp_path / "p.toml")
    assert found == read_prompts(tmp_path / "p.json")
    assert samples_of(found) == {
        "prompts": ["a", "b"], "settings": {"guidance": 5.0, "size": [32, 64]}, "own": [{"seed": 3}, {"steps": 9}],
    }  # fmt: skip


def test_what_is_not_known_is_told_and_what_is_no_number_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a dog --cn edges.png --s 4")
    assert read_prompts(tmp_path / "p.txt")[0].odd == ("--cn",)
    (tmp_path / "q.txt").write_text("a dog --s many")
    with pytest.raises(ValueError, match=r"q\.txt.*steps 'many' of 'a dog"):
        read_prompts(tmp_path / "q.txt")
