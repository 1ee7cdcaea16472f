"""Pictures of a compiled pipeline: by block, and which words there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.models import compiling
from ldm.pipeline import TextToImage
from ldm.rng import Rng
from ldm.sampling.settings import Settings


def test_pictures_of_compiled_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guided steps, whose rows are computed once up to the text, with keys and values that are made once."""
    if torch._dynamo.config.disable:
        pytest.skip("TORCHDYNAMO_DISABLE is set")
    pipe = TextToImage.load("emoji")
    settings = Settings(steps=4, guidance=3.0)
    draw = lambda: pipe.latents(["a red apple"], settings, Rng.of(5, [0]))  # noqa: E731
    wanted = draw()
    made: list[int] = []
    by_block = compiling.by_block
    monkeypatch.setattr(compiling, "by_block", lambda network: made.append(by_block(network, "aot_eager")))
    torch._dynamo.reset()
    assert pipe.compile("blocks") is pipe
    blocks = list(compiling.repeated_blocks(pipe.network))
    assert made == [1]
    assert all(block._compiled_call_impl is not None for block in blocks)
    found = draw()
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert not torch.equal(wanted, torch.zeros_like(wanted))
    other: Any = pipe.compile()
    assert all(block._compiled_call_impl is None for block in blocks), "whole after blocks: those are plain again"
    assert other._compiled is not None
    torch._dynamo.reset()


def test_another_word_is_refused() -> None:
    pipe = TextToImage.load("emoji")
    with pytest.raises(ValueError, match=r"compile: 'block' is not one of \['blocks', 'default', 'reduce-overhead'"):
        pipe.compile("block")
