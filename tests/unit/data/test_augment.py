"""Captions that are drawn, tags in kohya's forms, colours and rotation: closed forms and PIL's own figures."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.augment import augmented, turned
from ldm.data.captions import spoken, with_trigger
from ldm.data.loader import DataConfig, Loader
from ldm.data.pairs import Canny
from ldm.data.tags import Tags
from tests import miniature


def test_the_trigger_stands_for_its_place_or_before_a_caption_that_lacks_it() -> None:
    assert with_trigger("a photo of [trigger] in snow, [trigger]", "sks") == "a photo of sks in snow, sks"
    assert with_trigger("a sks dog", "sks") == "a sks dog"
    assert with_trigger("a dog", "sks") == "sks a dog"
    assert with_trigger("", "sks") == "sks"
    assert with_trigger("a [trigger]", "") == "a [trigger]"


def test_wildcards_draw_each_alternative_as_often_and_leave_doubled_braces() -> None:
    caption = "a {red|green|blue} {cat|dog} {{kept}} {one}\n\nsecond line"
    drawn = [spoken(caption, 3, p) for p in range(6000)]
    assert drawn == [spoken(caption, 3, p) for p in range(6000)]
    lines = Counter("second line" if d == "second line" else "first" for d in drawn)
    assert abs(lines["first"] / 6000 - 0.5) < 0.03
    firsts = Counter(d for d in drawn if d != "second line")
    assert set(firsts) == {f"a {c} {k} {{kept}} one" for c in ("red", "green", "blue") for k in ("cat", "dog")}
    assert all(abs(n / lines["first"] - 1 / 6) < 0.03 for n in firsts.values())


def test_tags_stay_by_a_separator_at_both_ends_and_secondary_ones_go_together() -> None:
    tags = Tags(keep=0, keep_separator="|||", secondary=";;;", prefix="best", suffix="end")
    caption = "girl, hat ||| a, b;;;c, d, e ||| photo"
    seen = set()
    for position in range(200):
        parts = tags.apply(caption, 0, position).split(", ")
        assert parts[:2] == ["best girl", "hat"]
        assert parts[-1] == "photo end"
        text = tags.apply(caption, 0, position)
        assert "b,c" in text
        seen.add(tuple(re.sub("b,c", "bc", text).split(", ")[2:-1]))
    assert len(seen) == math.factorial(4)


def test_single_tags_are_dropped_at_their_own_rates() -> None:
    tags = Tags(keep=1, dropout=0.5, shuffle=False, rates={"always": 1.0, "rare.*": 0.1, "first": 0.25})
    counts: Counter[str] = Counter()
    for position in range(4000):
        counts.update(tags.apply("first, always, rare one, other", 1, position).split(", "))
    shares = {k: v / 4000 for k, v in counts.items()}
    assert "always" not in shares
    for tag, rate in (("first", 0.25), ("rare one", 0.1), ("other", 0.5)):
        assert abs(shares[tag] - (1 - rate)) < 0.03, tag


def test_colours_are_those_of_the_drawn_factors() -> None:
    """On one colour: brightness times a factor; contrast keeps the mean; saturation moves from grey."""
    draws = {"colour Brightness": 0.75, "colour Contrast": 0.5, "colour Color": 0.5}
    picture = np.full((4, 4, 3), (100, 60, 20), np.uint8)
    found = augmented(picture, 0.2, 0.0, draws.__getitem__)
    assert np.abs(found.astype(int) - np.array([110, 66, 22])).max() <= 1  # 1 + 0.2 * 0.5
    draws |= {"colour Brightness": 0.5, "colour Color": 0.0}
    grey = 0.299 * 100 + 0.587 * 60 + 0.114 * 20
    wanted = grey + 0.8 * (np.array([100, 60, 20]) - grey)
    assert np.abs(augmented(picture, 0.2, 0.0, draws.__getitem__).astype(int) - wanted).max() <= 1.5


@pytest.mark.parametrize("size", [(48, 48), (64, 32)])
@pytest.mark.parametrize("angle", [-20.0, 7.5, 30.0])
def test_a_picture_is_turned_as_pil_turns_it_and_no_corner_is_empty(size: tuple[int, int], angle: float) -> None:
    width, height = size
    white = Image.new("RGB", size, "white")
    assert np.asarray(turned(white, angle)).min() == 255
    ramp = np.linspace(0, 255, width)[None, :, None].repeat(height, 0).repeat(3, 2).astype(np.uint8)
    own = np.asarray(turned(Image.fromarray(ramp), angle)).astype(float)[..., 0]
    theirs = np.asarray(Image.fromarray(ramp).rotate(angle, Image.Resampling.BICUBIC)).astype(float)[..., 0]
    middle = slice(height // 2 - 3, height // 2 + 3), slice(width // 2 - 3, width // 2 + 3)
    slopes = [np.polyfit(np.arange(6), part[middle].mean(0), 1)[0] for part in (own, theirs)]
    sine, cosine = math.sin(math.radians(abs(angle))), math.cos(math.radians(angle))
    zoom = max(cosine + sine * height / width, cosine + sine * width / height)
    assert slopes[0] * zoom == pytest.approx(slopes[1], rel=0.1)
    assert own[middle].mean() == pytest.approx(theirs[middle].mean(), abs=1.5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(miniature.data(tmp_path_factory.mktemp("augment")))


def test_a_sample_is_the_same_at_its_place_whatever_the_batch(path: str) -> None:
    config = DataConfig(path=path, size=16, colour=0.3, rotate=20.0, trigger="sks", wildcards=True)
    plain = DataConfig(path=path, size=16)
    one, four = Loader(config, seed=1, micro_batch=1, accumulate=4), Loader(config, seed=1, micro_batch=4)
    whole = four.batch(0, 0)
    for i, row in enumerate(itertools.islice(one.batches(0), 4)):
        assert torch.equal(row["image"][0], whole["image"][i])
        assert row["caption"][0] == whole["caption"][i]
    assert all(c.startswith("sks ") for c in whole["caption"])
    before = Loader(plain, seed=1, micro_batch=4).batch(0, 0)
    assert before["key"] == whole["key"]
    assert not torch.allclose(before["image"], whole["image"], atol=0.1)


@pytest.mark.parametrize(("changes", "said"), [
    ({"colour": 0.1, "cached": True}, "colour: 0.1 of cached latents"),
    ({"rotate": 5.0, "cached": True}, "rotate: 5.0 of cached latents"),
    ({"wildcards": True, "cached": True}, "wildcards: cached text"),
    ({"rotate": 5.0, "pairs": {"condition": Canny()}}, r"pairs \['condition'\] would not change with it"),
    ({"rotate": 90.0}, r"\[0, 45\]"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataConfig(path="emoji", **changes)


def test_tags_refuse_rates_that_are_none() -> None:
    with pytest.raises(ValueError, match="rates: 2 of 'x' must be in"):
        Tags(rates={"x": 2})
    assert Path(__file__).exists()
