"""Tiles meet without seams: local estimates are those of the whole exactly, others pass into each other."""

from __future__ import annotations

import itertools

import pytest
import torch

from ldm.sampling.tiles import spans, tiled

T = torch.tensor([500.0])


def local(x, t, cond):
    return 0.5 * x + cond["concat"][:, :2] * cond["text"].mean()


@pytest.mark.parametrize("size", [(8, 8), (9, 30), (33, 17), (64, 8)])
def test_what_depends_on_its_pixel_alone_is_that_of_the_whole(size):
    x, cond = torch.randn(2, 2, *size), {"concat": torch.randn(2, 3, *size), "text": torch.randn(2, 4, 5)}
    got = tiled(local, tile=8, overlap=3)(x, T, cond)
    assert torch.allclose(got, local(x, T, cond), atol=1e-6)


def test_spans_cover_and_overlap():
    for length in range(5, 200):
        for tile, overlap in ((8, 3), (16, 4), (5, 4)):
            found = spans(length, tile, overlap)
            assert found[0][0] == 0
            assert found[-1][1] == length
            assert all(b - a == min(tile, length) for a, b in found)
            assert all(before[1] - after[0] >= overlap for before, after in itertools.pairwise(found))


def test_estimates_that_differ_from_tile_to_tile_pass_into_each_other():
    """Each tile answers its own mean, as norms over a tile do: there is no step larger than the ramp's."""
    x = torch.linspace(0, 1, 64).expand(1, 1, 64, 64).contiguous()
    got = tiled(lambda x, t, cond: x.mean((2, 3), keepdim=True).expand_as(x), tile=16, overlap=8)(x, T, {})
    steps = (got[..., 1:] - got[..., :-1]).abs()
    apart = 8 / 63  # of neighbouring tiles' means
    assert steps.max() < 2.01 * apart / 9  # where one tile ends another begins; without ramps: apart
    assert (got[..., 1:] - got[..., :-1]).min() > -1e-6


def test_tiles_that_do_not_overlap_are_refused():
    for overlap in (0, 8):
        with pytest.raises(ValueError, match=f"less than the tile's 8 pixels, got {overlap}"):
            tiled(local, tile=8, overlap=overlap)
