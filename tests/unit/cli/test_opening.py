"""--variant, --ema and --prediction of `ldm sample` reach what opens the model, and say so where they are of no use."""

from __future__ import annotations

from typing import Any

import pytest

from ldm.cli import opening, sample
from ldm.pipeline import TextToImage, loading


def test_options_reach_what_opens_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    def opened(source: object, **options: Any) -> None:
        found.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(loading, "open_model", opened)
    args = sample.parser().parse_args(["x", "--ema", "--prediction", "v", "--variant", "fp16"])
    with pytest.raises(ValueError, match="seen"):
        TextToImage.load("gone.safetensors", **opening.which(args))
    assert (found["ema"], found["prediction"], found["variant"]) == (True, "v", "fp16")
    assert opening.which(sample.parser().parse_args(["x"])) == {}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--ema"], "--ema: is for single files"),
        (["--prediction", "v"], "--prediction: 'v': is for single files"),
    ],
)
def test_what_says_nothing_of_a_folder_is_one_line(option: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sample.main(["a cat", "--steps", "1", *option])
