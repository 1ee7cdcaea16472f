"""Captions composed of the plain one and of what a sample's json says, in batches and in caches alike."""

from __future__ import annotations

import pytest
import torch

from ldm.data.captions import filled
from ldm.data.encode import EncodeConfig, encode, finish
from ldm.data.loader import DataConfig, Loader

RICH = "{}[, {tone} skin tone][, of the group {group}]"


@pytest.mark.parametrize(
    ("template", "meta", "expected"),
    [
        (RICH, {"tone": "dark", "group": "people"}, "a cook, dark skin tone, of the group people"),
        (RICH, {"tone": "", "group": "people"}, "a cook, of the group people"),
        (RICH, {"tone": None}, "a cook"),
        ("{} in [brackets], {year}", {"year": 1999}, "a cook in [brackets], 1999"),
        ("{}[ {a} and {b}]", {"a": "one"}, "a cook"),
        ("a photo of {}", {}, "a photo of a cook"),
        ("{group}: {}", {"group": "{tone}"}, "{tone}: a cook"),  # what a field says is no template
    ],
)
def test_fields_and_parts_that_are_left_out(template: str, meta: dict[str, object], expected: str) -> None:
    assert filled(template, "a cook", meta) == expected


def test_a_caption_with_braces_is_kept_as_it_is() -> None:
    assert filled("{}[, {tone}]", "set {x} [{y}]", {"tone": "dark"}) == "set {x} [{y}], dark"


def test_a_missing_field_outside_of_brackets_is_named() -> None:
    with pytest.raises(ValueError, match=r"a sample has no 'tone' \(it has \['group'\]\); write the part .* in square"):
        filled("{}, {tone}", "a cook", {"group": "people", "captions": ["x"]})


def test_the_embedded_data_online_and_cached(tmp_path) -> None:
    """The same captions from pictures, from a cache, and to the text encoder that fills the cache."""
    data = DataConfig(path="emoji", split="compositional", size=8, captions="first", template=RICH, shuffle=False)
    online = Loader(data, seed=0, micro_batch=16).batch(0, 0)["caption"]
    assert sum("skin tone, of the group people-body" in c for c in online) >= 8
    asked: list[str] = []

    def text(texts: list[str]) -> dict[str, torch.Tensor]:
        asked.extend(texts)
        return {"text": torch.zeros(len(texts), 2, 3)}

    config = EncodeConfig(path="emoji", splits=("compositional",), size=8, template=RICH)
    encode(config, tmp_path, moments=lambda x: torch.zeros(len(x), 2, 2, 2), text=text, hashes={"text": "0"})
    finish(config, tmp_path)
    assert set(online) <= set(asked)
    cached = DataConfig(path=str(tmp_path), split="compositional", size=8, captions="first", template=RICH,
                        shuffle=False, cached=True)  # fmt: skip
    assert Loader(cached, seed=0, micro_batch=16).batch(0, 0)["caption"] == online
