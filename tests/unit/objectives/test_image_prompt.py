"""The loss with pictures as prompts: what is dropped, and where the states come from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from ldm.models.unet.image_prompt import STATES
from ldm.objectives.image_prompt import ImagePromptObjective
from ldm.objectives.inputs import LatentFeed
from ldm.rng import Rng

COUNT = 4_000


class Eyes:
    """An image encoder that sees the mean colour."""

    def blank(self, *, states: bool) -> Tensor:
        return torch.full((1, 3), -1.0)

    def fitted(self, images: Tensor) -> Tensor:
        return images

    def __call__(self, pixels: Tensor, *, states: bool) -> Tensor:
        return pixels.mean((2, 3))


def objective(drop: float = 0.1, both: float = 0.05, captions: float = 0.1) -> ImagePromptObjective:
    denoise = SimpleNamespace(trained=nn.Linear(1, 1), options=SimpleNamespace(drop=captions))
    return ImagePromptObjective(cast("Any", denoise), cast("Any", Eyes()), False, drop, both, 0)


def test_captions_and_pictures_are_dropped_as_published() -> None:
    """5 % lose the picture alone, 5 % the caption alone, 5 % both (tutorial_train.py)."""
    rng = Rng(3, tuple(range(COUNT)))
    told = objective().prepared({STATES: torch.ones(COUNT, 3)}, rng)
    picture = told[STATES][:, 0] == -1
    assert torch.equal(told[STATES][~picture], torch.ones(int((~picture).sum()), 3))
    encode = lambda texts: {"text": torch.tensor([[[float(bool(t))]] for t in texts])}  # noqa: E731
    feed = LatentFeed(cast("Any", None), encode, 0.1)
    words = feed.cond({"caption": ["a"] * COUNT}, rng, torch.device("cpu"))["text"].flatten() == 0
    for lost in (picture & ~words, words & ~picture, picture & words):
        assert abs(float(lost.float().mean()) - 0.05) < 4 * (0.05 * 0.95 / COUNT) ** 0.5


@pytest.mark.parametrize(("drop", "both", "captions"), [(0.3, 0.0, 0.2), (0.2, 0.2, 0.5)])
def test_other_shares(drop: float, both: float, captions: float) -> None:
    rng = Rng(5, tuple(range(COUNT)))
    gone = objective(drop, both, captions).prepared({STATES: torch.ones(COUNT, 3)}, rng)[STATES][:, 0] == -1
    words = rng.uniform("drop") < captions
    for share, lost in ((drop, gone), (both, gone & words)):
        assert abs(float(lost.float().mean()) - share) < 4 * (0.25 / COUNT) ** 0.5


def test_states_come_from_the_reference_else_the_cache_else_the_picture() -> None:
    pixels, own = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    loss = objective()
    picture = {"image": pixels * 2 - 1}
    assert (loss.states(picture) - pixels.mean((2, 3))).abs().max() < 1e-6
    cached = picture | {"features": torch.full((2, 3), 7.0, dtype=torch.float16)}
    assert loss.states(cached).eq(7).all()
    assert (loss.states(cached | {"reference": own}) - own.mean((2, 3))).abs().max() < 1e-6
    with pytest.raises(ValueError, match="no pictures to be prompts, and no cached features"):
        loss.states({"moments": pixels})
