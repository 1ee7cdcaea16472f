"""Skip-layer guidance step by step, texts of different lengths in one call, and what a network is told of its scale."""

from __future__ import annotations

import pytest
import torch

from ldm.checkpoint.schedulers import scheduler_from_diffusers
from ldm.diffusion import Process, Velocity
from ldm.sampling import sample
from ldm.sampling.guidance import (
    classifier_free,
    interval_of_steps,
    perpendicular,
    projected,
    skip_layers,
    together,
    told_guidance,
)
from ldm.sampling.settings import Settings
from ldm.sampling.texts import is_text, padded, trimmed

SHAPE = (2, 3, 4, 4)


def velocity(blocks):
    """A stand-in for a transformer of so many blocks."""

    def net(x, t, cond):
        net.calls.append(len(x))
        out = x
        for i in blocks:
            out = torch.tanh(
                out + 0.3 * (i + 1) * cond["text"].mean((1, 2)).view(-1, 1, 1, 1) - t.view(-1, 1, 1, 1) / 3e3
            )
        return out

    net.calls = []
    return net


@pytest.mark.parametrize("steps", [1, 4, 10, 28, 40])
@pytest.mark.parametrize("shares", [(0.01, 0.2), (0.0, 1.0), (0.25, 0.5)])
def test_skip_layers_as_published(steps, shares):
    """StableDiffusion3Pipeline's loop written out: v = u + g (c - u) + k (c - s) at the steps N start < i < N stop."""
    how = scheduler_from_diffusers({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert how.own is not None
    path = how.own.times(how.schedule, steps)
    whole, less = velocity([0, 1, 2, 3]), velocity([0, 3])
    cond, uncond = {"text": torch.randn(2, 5, 3)}, {"text": torch.randn(1, 5, 3)}
    start = torch.randn(SHAPE)
    x, asked = start.double(), 0
    for i, (a, b) in enumerate(zip(path, [*path[1:], 0.0])):
        t = torch.full((2,), a)
        c, u = whole(x, t, cond), whole(x, t, uncond)
        v = u + 7 * (c - u)
        if steps * shares[0] < i < steps * shares[1]:
            v = v + 2.8 * (c - less(x, t, cond))
            asked += 1
        x = x + (b - a) / 1000 * v
    less.calls.clear()
    process = Process(schedule=how.schedule, prediction=Velocity())
    push = skip_layers(process.denoiser(less), 2.8, interval_of_steps(path, shares))
    denoise = classifier_free(process.denoiser(whole), uncond, 7.0, push=push)
    options = {"steps": steps, "times": path, "noise": lambda i: start}
    got = sample("euler", denoise, start.double(), cond, schedule=how.schedule, **options)
    assert torch.allclose(got, x, atol=1e-6)
    assert less.calls == [2] * asked  # no call where there is nothing to add


def test_skip_layers_with_the_other_guides():
    process = Process(schedule=scheduler_from_diffusers({}).schedule)
    whole, less = process.denoiser(velocity([0, 1])), process.denoiser(velocity([0]))
    cond, uncond, negative = ({"text": torch.randn(n, 5, 3)} for n in (2, 1, 1))
    x, t = torch.randn(SHAPE), torch.tensor([500.0, 900.0])
    push = skip_layers(less, 2.0, (600.0, 1000.0))
    added = 2.0 * (whole(x, t, cond) - less(x, t, cond))
    added[0] = 0
    for make in (
        lambda **more: classifier_free(whole, uncond, 1.0, **more),
        lambda **more: classifier_free(whole, uncond, 3.0, 0.5, **more),
        lambda **more: projected(whole, uncond, 3.0, **more),
        lambda **more: perpendicular(whole, uncond, negative, 3.0, **more),
    ):
        assert torch.allclose(make(push=push)(x, t, cond), make()(x, t, cond) + added, atol=1e-5)


def test_settings_of_skipping():
    assert Settings(skip_layers=(7, 8, 9)).skip_scale == 2.8
    for wrong, message in [
        ({"skip_layers": (-1,)}, "skip_layers: expected numbers of blocks from 0 on, got -1"),
        ({"skip_layers": (1, 1)}, "skip_layers: a block is named twice"),
        ({"skip_scale": float("nan")}, "skip_scale must be a number"),
        ({"skip_interval": (0.5, 0.2)}, "skip_interval must be two shares of the steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)
    assert interval_of_steps([3.0, 2.0, 1.0], (0.01, 0.2)) is None


def attended(x, t, cond):
    """A masked mean over tokens: what is hidden has no part."""
    seen = cond["mask"].to(cond["text"]).unsqueeze(2)
    return 0.5 * x + ((cond["text"] * seen).sum((1, 2)) / seen.sum((1, 2))).view(-1, 1, 1, 1)


def test_texts_of_different_lengths_under_masks():
    """The doubled call gives what two calls give; a text without a mask is seen as a whole."""
    x, t = torch.randn(SHAPE), torch.tensor([500.0, 900.0])
    cond = {"text": torch.randn(2, 7, 3), "mask": torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]]).bool()}
    uncond = {"text": torch.randn(1, 4, 3), "mask": torch.tensor([[1, 1, 0, 0]]).bool()}
    seen = {}

    def net(x, t, c):
        seen.update(c)
        return attended(x, t, c)

    for other in (uncond, {"text": uncond["text"]}):
        alone = {"mask": torch.ones(1, 4, dtype=torch.bool), **other}
        c, u = together(net, x, t, [cond, other])
        assert torch.allclose(c, attended(x, t, cond), atol=1e-6)
        assert torch.allclose(u, attended(x, t, {k: v.expand(2, *v.shape[1:]) for k, v in alone.items()}), atol=1e-6)
        assert seen["text"].shape == (4, 7, 3)
        assert seen["mask"].dtype == torch.bool
        assert seen["copies"].shape == (2, 0)
        c, u = together(net, x, t, [other | {k: v.expand(2, *v.shape[1:]) for k, v in other.items()}, cond])
        assert torch.allclose(u, attended(x, t, cond), atol=1e-6)


def test_texts_of_several_encoders():
    """Each under its own mask; one without a mask must have one length."""
    one = {"text.0": torch.randn(1, 3, 2), "text.1": torch.randn(1, 6, 4), "mask.1": torch.ones(1, 6)}
    two = {"text.0": torch.randn(1, 3, 2), "text.1": torch.randn(1, 2, 4), "mask.1": torch.ones(1, 2)}
    a, b = padded([one, two])
    assert all(torch.equal(a[k], one[k]) for k in one)
    assert torch.equal(b["text.1"], torch.cat([two["text.1"], torch.zeros(1, 4, 4)], 1))
    assert b["mask.1"].tolist() == [[1, 1, 0, 0, 0, 0]]
    assert torch.equal(b["text.0"], two["text.0"])
    with pytest.raises(ValueError, match=r"cond 'text.0' has texts of 3 and 5 tokens and no 'mask.0'"):
        padded([one, {**two, "text.0": torch.randn(1, 5, 2)}])
    with pytest.raises(ValueError, match=r"cond 'context' has texts of 2 and 4 tokens and no 'mask'"):
        padded([{"context": torch.randn(1, 2, 3)}, {"context": torch.randn(1, 4, 3)}])
    short = trimmed({"text": torch.randn(2, 6, 3), "mask": torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])})
    assert short["text"].shape == (2, 3, 3)
    assert trimmed({"text": torch.randn(1, 6, 3), "mask": torch.zeros(1, 6)})["text"].shape == (1, 1, 3)


def test_keys_of_texts():
    texts = ["text", "kv", "context", "vector", "pooled", "mask", "text.0", "pooled.1", "mask.12"]
    assert all(is_text(key) for key in texts)
    assert not any(is_text(key) for key in ["time_ids", "concat", "class", "guidance", "copies", "texts"])


def test_copies_are_told_where_nothing_but_text_differs():
    """Not with a plain pooled vector, which enters the time embedding of SDXL's U-Net before any text."""
    x, t, seen = torch.randn(SHAPE), torch.tensor([500.0, 900.0]), []

    def net(x, t, c):
        seen.append("copies" in c)
        return x

    for keys in (["text"], ["context", "vector"], ["kv", "mask"], ["text.0", "pooled.0", "text.1"]):
        cond = {key: torch.zeros(2, 4, 3) for key in keys}
        together(net, x, t, [cond, {key: value[:1] for key, value in cond.items()}])
    assert seen == [True] * 4
    pooled = {"text": torch.zeros(2, 4, 3), "pooled": torch.zeros(2, 3)}
    together(net, x, t, [pooled, pooled])
    assert seen[-1] is False


@pytest.mark.parametrize(("is_scale", "want"), [(True, 3.5), (False, 2.5)])
def test_told_guidance(is_scale, want):
    seen = {}

    def net(x, t, c):
        seen.update(c)
        return x

    told_guidance(net, 3.5, is_scale=is_scale)(torch.randn(SHAPE), torch.tensor([1.0, 2.0]), {})
    assert seen["guidance"].tolist() == [want, want]
