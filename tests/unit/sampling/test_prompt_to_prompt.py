"""Prompt-to-prompt: token alignment, edited weights by hand, the hook on a real network, local blend, maps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ldm.diffusion import Discrete, Process, V
from ldm.models.presets import UNETS
from ldm.models.unet import UNet
from ldm.models.unet.control import attention_layers, controlled
from ldm.sampling import prompt_to_prompt as p2p
from ldm.sampling import sample
from ldm.sampling.guidance import classifier_free

LENGTH = 8


def test_spans():
    assert p2p.spans([1, 2, 3, 9], [1, 5, 3, 9]) == [(range(1, 2), range(1, 2))]
    assert p2p.spans([1, 2, 9], [1, 4, 5, 2, 9]) == [(range(1, 1), range(1, 3))]
    assert p2p.spans([1, 2, 3], [1, 2, 3]) == []
    assert p2p.spans([1], [2]) == [(range(1), range(1))]


def test_word_swap_of_unequal_lengths():
    edit = p2p.word_swap([1, 2, 3, 9], [1, 5, 9], LENGTH)  # two tokens become one
    assert edit.mapping[:, 1].tolist() == [0, 0.5, 0.5, 0, 0, 0, 0, 0]
    assert edit.mapping[3, 2] == 1
    assert edit.mapping[4, 3] == 1  # padding follows
    assert torch.equal(edit.blend[:7], torch.ones(7))
    with pytest.raises(ValueError, match="word swap needs"):
        p2p.word_swap([1, 2, 9], [1, 2, 3, 9], LENGTH)
    with pytest.raises(ValueError, match="at most 2 tokens, got 3 and 3"):
        p2p.word_swap([1, 2, 9], [1, 3, 9], 2)


def test_refinement_keeps_new_words():
    edit = p2p.refinement([1, 2, 9], [1, 7, 2, 9], LENGTH)
    assert edit.blend.tolist() == [1, 0, 1, 1, 1, 1, 1, 1]
    assert edit.mapping[1, 2] == edit.mapping[2, 3] == edit.mapping[3, 4] == 1


def test_weights_by_hand():
    """Swap, refinement and re-weighting on random weights, unconditional rows untouched, later steps free."""
    swap = p2p.word_swap([1, 2, 9], [1, 5, 9], LENGTH)
    refine = p2p.refinement([1, 2, 9], [1, 7, 2, 9], LENGTH)
    heavy = p2p.reweight(p2p.unchanged(LENGTH), {1: 3.0})
    control = p2p.PromptToPrompt([swap, refine, heavy], steps=10, cross=0.5, own=0.3)
    weights = torch.rand(8, 2, 16, LENGTH).softmax(-1)
    got = control("mid.attn2", weights)
    assert torch.equal(got[:5], weights[:5])  # the unconditional rows and the source
    source = weights[4]
    assert torch.allclose(got[5], source)  # a swap takes the source's maps
    order = [0, None, 1, 2, 3, 4, 5, 6]
    for j, i in enumerate(order):
        want = weights[6, ..., j] if i is None else source[..., i]
        assert torch.allclose(got[6, ..., j], want)
    factor = torch.ones(LENGTH)
    factor[1] = 3
    assert torch.allclose(got[7], source * factor)
    own = torch.rand(8, 2, 16, 16)
    assert torch.equal(control("mid.attn1", own)[5:], own[4:5].expand(3, -1, -1, -1))
    control.progress(2, weights)  # step 3 of 10: self-attention is free again
    assert torch.equal(control("mid.attn1", own), own)
    control.progress(4, weights)  # step 5: cross-attention too, but for the factors
    got = control("mid.attn2", weights)
    assert torch.equal(got[:7], weights[:7])
    assert torch.allclose(got[7], weights[7] * factor)


def test_large_self_attention_is_left_alone():
    control = p2p.PromptToPrompt([p2p.unchanged(LENGTH)], steps=4, own=1.0, own_pixels=15)
    weights = torch.rand(2, 1, 16, 16)
    assert torch.equal(control("a.attn1", weights), weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edits": []}, "edits must not be empty"),
        ({"cross": 1.5}, r"cross must lie in \[0, 1\], got 1.5"),
        ({"words": [[1]]}, "words needs one entry per row, 2, got 1"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        p2p.PromptToPrompt(**{"edits": [p2p.unchanged(LENGTH)], "steps": 4, **options})
    with pytest.raises(ValueError, match=r"token position must lie in \[0, 7\], got 8"):
        p2p.reweight(p2p.unchanged(LENGTH), {8: 2.0})


def network():
    config = dataclasses.replace(UNETS["tiny"], sample_size=8)
    torch.manual_seed(0)
    unet = UNet(config).eval()
    for weight in unet.parameters():  # a new network's last layers are 0 and would hide what the hand does
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return unet, config


def conds(config, rows):
    g = torch.Generator().manual_seed(1)
    return {"text": torch.randn(rows, LENGTH, config.cross_attention_dim, generator=g)}


def run(unet, cond, x, uncond=None, wrap=lambda denoise: denoise, progress=None):
    denoise = Process(prediction=V()).denoiser(unet)
    if uncond is not None:
        denoise = classifier_free(denoise, uncond, 2.0)
    return sample("ddim", wrap(denoise), x, cond, schedule=Discrete(), steps=3, noise=lambda i: x, progress=progress)


def test_a_hand_that_changes_nothing_changes_nothing():
    """Weights passed through give the fused attention's pictures; outside the block no layer has a hand."""
    unet, config = network()
    x = torch.randn(2, config.in_channels, 8, 8)
    cond = conds(config, 2)
    plain = run(unet, cond, x)
    seen = []

    def hand(name, weights):
        seen.append(name)
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        return weights

    with controlled(unet, hand):
        held = run(unet, cond, x)
    assert torch.allclose(held, plain, atol=1e-4)
    assert set(seen) == set(attention_layers(unet))
    assert all(layer.control is None for layer in attention_layers(unet).values())
    calls = len(seen)
    assert torch.equal(run(unet, cond, x), plain)
    assert len(seen) == calls
    with controlled(unet, hand, own=False):
        run(unet, cond, x)
    assert all(name.endswith("attn2") for name in seen[calls:])


def test_the_hand_is_taken_off_after_an_error():
    unet, _ = network()

    def passing(name, weights):
        return weights

    def failing():
        with controlled(unet, passing):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert all(layer.control is None for layer in attention_layers(unet).values())
    with controlled(unet, passing), pytest.raises(ValueError, match="is controlled already"), controlled(unet, passing):
        pass
    with pytest.raises(ValueError, match="no attention layer"), controlled(torch.nn.Linear(1, 1), lambda n, w: w):
        pass


def test_editing_to_the_same_prompt_is_the_source():
    """The source row is never changed, the same prompt gives the source, another prompt something between."""
    unet, config = network()
    x = torch.randn(1, config.in_channels, 8, 8).expand(3, -1, -1, -1)
    cond, uncond = conds(config, 3), {"text": torch.zeros(1, LENGTH, config.cross_attention_dim)}
    cond["text"][1] = cond["text"][0]
    plain = run(unet, cond, x, uncond)
    same = p2p.unchanged(LENGTH)
    edit = p2p.PromptToPrompt([same, same], steps=3, cross=1.0, own=1.0)
    with controlled(unet, edit):
        got = run(unet, cond, x, uncond, progress=edit.progress)
    assert torch.allclose(got[0], plain[0], atol=1e-4)
    assert torch.allclose(got[1], plain[0], atol=1e-4)
    assert float((got[2] - plain[2]).abs().max()) > 1e-4
    none = p2p.PromptToPrompt([same, same], steps=3, cross=0.0, own=0.0)
    with controlled(unet, none):
        free = run(unet, cond, x, uncond, progress=none.progress)
    assert torch.allclose(free, plain, atol=1e-4)


def test_local_blend_keeps_the_rest():
    """Outside the mask the edit's estimate of x_0 is the source's."""
    edit = p2p.PromptToPrompt([p2p.unchanged(LENGTH)], steps=2, words=[[2], [2]], start_blend=0.0)
    weights = torch.full((2, 1, 16, LENGTH), 0.01)
    weights[:, :, 5, 2] = 1.0  # one pixel of a 4 x 4 map looks at token 2
    edit("a.attn2", weights)
    mask = edit.mask((4, 4))
    assert mask[0, 0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    x = torch.randn(2, 3, 4, 4)
    got = edit.blend(lambda x, t, cond: x)(x, torch.zeros(2), {})
    assert torch.equal(got[0], x[0])
    inside = mask[1].expand(3, 4, 4) == 1
    assert torch.allclose(got[1][inside], x[1][inside])
    assert torch.equal(got[1][~inside], x[0][~inside])


def test_maps_per_word():
    maps = p2p.AttentionMaps(rows=1, shape=(2, 8))
    weights = torch.rand(2, 3, 16, LENGTH)
    maps("a.attn2", weights)
    maps("b.attn2", 3 * weights)
    maps("b.attn1", torch.rand(2, 3, 16, 16))
    want = 2 * weights[1].mean(0)[:, [1, 4]].mean(1).view(2, 8)
    assert torch.allclose(maps.of(0, [1, 4]), want)
    with pytest.raises(ValueError, match=r"tokens must be positions in \[0, 7\]"):
        maps.of(0, [8])
    with pytest.raises(ValueError, match=r"pixels must be one of \[16\]"):
        maps.of(0, [1], pixels=64)
    with pytest.raises(ValueError, match="no cross-attention was recorded"):
        p2p.AttentionMaps(rows=1).of(0, [1])
