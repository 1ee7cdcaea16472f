"""Targets of alignment: EfficientNet's map and a CLIP's places by other code, and what a cache is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from ldm.metrics.features import EfficientNetLite0
from ldm.models.networks import build as build_network
from ldm.models.presets import UNETS
from ldm.objectives.align import AlignOptions
from ldm.recipes.aligning import align_target, aligned, named_target, plan_lines
from ldm.recipes.sources import load_clip
from tests import miniature

PICTURES = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_efficientnet_s_deepest_map_at_the_size_asked_for() -> None:
    target = align_target(AlignOptions(size=64), "cpu")
    network: Any = EfficientNetLite0().network
    x = functional.interpolate(PICTURES, size=(64, 64), mode="bilinear", antialias=True, align_corners=False)
    with torch.no_grad():
        x = network.bn1(network.conv_stem(x))
        for stage in network.blocks[:5]:
            x = stage(x)
    assert x.shape == (2, target.channels, 4, 4)
    torch.testing.assert_close(target.encode(PICTURES), x)
    assert target.encode(PICTURES).dtype == torch.float32
    assert align_target(AlignOptions(), "cpu").encode(PICTURES).shape == (2, 112, 3, 2)


def test_a_clip_s_last_places_are_what_its_pooled_vector_is_made_beside() -> None:
    """The tokens that open_clip itself gives beside the pooled vector, in the order of rows."""
    target = align_target(AlignOptions(target="clip_emoji"), "cpu")
    clip: Any = load_clip("clip_emoji")[0]
    clip.visual.output_tokens = True
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        _, tokens = clip.visual(pictures)
    expected = tokens.mT.unflatten(2, (8, 8))
    assert target.channels == 192
    torch.testing.assert_close(target.encode(pictures), expected)


def test_what_a_cache_is_told_names_the_weights_and_the_size(tmp_path: Path) -> None:
    told = {named_target("efficientnet_lite0", size, "cpu", "x").told for size in (None, 64, 224)}
    assert len(told) == 3
    assert all(name.startswith("efficientnet_lite0:") for name in told)
    first = named_target(str(miniature.clip(tmp_path / "a")), None, "cpu", "x")
    again = named_target(str(miniature.clip(tmp_path / "b" / "a")), None, "cpu", "x")
    assert first.hashes == again.hashes == {"features": first.told}


def test_what_cannot_be_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match="'clip_emoji' sees pictures at 64 pixels, not at size 128; write null"):
        align_target(AlignOptions(target="clip_emoji", size=128), "cpu")
    with pytest.raises(ValueError, match="nowhere"):
        align_target(AlignOptions(target="nowhere"), "cpu")


def test_the_target_runs_in_training_only_where_nothing_is_cached() -> None:
    unet = build_network(UNETS["emoji"])
    assert aligned(None, unet, torch.device("cpu"), True) == (None, None)
    for cached in (True, False):
        alignment, target = aligned(AlignOptions(hidden=8), unet, torch.device("cpu"), cached)
        assert alignment is not None
        assert target is not None
        assert (alignment._encode is None) == cached
        assert alignment.projector[4].weight.shape == (112, 8)
    assert plan_lines(None, unet, True) == []
    assert "the projector from mid_block (96 -> 2048 -> 2048" in plan_lines(AlignOptions(), unet, True)[0]
