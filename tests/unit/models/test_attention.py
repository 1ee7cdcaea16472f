"""Attention: backends against the formula in float64, masks, odd lengths, and the choice of a backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.models import attention as module
from ldm.models.attention import attention, choose, sliced, using


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h].T / math.sqrt(q.shape[-1])
            if mask is not None:
                m = mask.expand(q.shape[0], q.shape[2], *mask.shape[2:])[b, h]
                scores = scores.masked_fill(~m, -math.inf) if m.dtype == torch.bool else scores + m
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            out[b, :, h] = weights @ v[b, :, h]
    return out


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("masked", ["no", "bool", "added"])
@pytest.mark.parametrize(("queries", "keys", "width"), [(16, 16, 8), (7, 13, 5), (1, 3, 40)])
def test_backends_equal_the_formula(backend: str, masked: str, queries: int, keys: int, width: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, queries, 3, width, dtype=torch.float64)
    k, v = torch.randn(2, 2, keys, 3, width, dtype=torch.float64)
    mask = None
    if masked == "bool":
        mask = torch.rand(2, 1, queries, keys) > 0.4
        mask[..., 0] = True
    elif masked == "added":
        mask = torch.randn(1, 3, queries, keys, dtype=torch.float64)
    expected = formula(q, k, v, mask)
    with using("cpu", backend):
        assert (attention(q, k, v, mask) - expected).abs().max() < 1e-12
        single = attention(q.float(), k.float(), v.float(), mask if masked != "added" else mask.float())  # type: ignore[union-attr]
        assert (single - expected).abs().max() < 1e-5


@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize("rows", [None, 1, 16])
def test_slices_of_queries_give_all_of_them(queries: int, rows: int | None) -> None:
    """A mask may have one row for all queries (padding of text) or a row for each."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.float64) for n in (16, 11, 11))
    mask = None if rows is None else torch.rand(2, 1, rows, 11) > 0.4
    expected = formula(q, k, v, None if mask is None else (mask | ~mask.any(-1, keepdim=True)).expand(-1, -1, 16, -1))
    with sliced(queries):
        out = attention(q, k, v, None if mask is None else mask | ~mask.any(-1, keepdim=True))
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < 1e-12


@pytest.mark.parametrize("keys", [300, 304, 5])
@pytest.mark.parametrize("rows", [1, 7])
def test_xformers_is_given_aligned_masks(keys: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels refuse a bias whose rows are not a multiple of 8 numbers apart; here a stand-in checks that."""
    seen: list[Tensor] = []

    class Xformers:
        @staticmethod
        def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor) -> Tensor:
            seen.append(attn_bias)
            return formula(q, k, v, attn_bias)

    monkeypatch.setitem(module._chosen, "cpu", "xformers")
    monkeypatch.setattr(module, "_xformers", Xformers)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 8, dtype=torch.float64) for n in (7, keys, keys))
    mask = torch.rand(2, 1, rows, keys) > 0.4
    mask[..., 0] = True
    out = attention(q, k, v, mask)
    assert (out - formula(q, k, v, mask.expand(-1, -1, 7, -1))).abs().max() < 1e-12
    assert seen[0].shape == (2, 2, 7, keys)
    assert all(stride % 8 == 0 for stride in seen[0].stride()[:3])
    assert seen[0].stride(3) == 1


def test_half_precision_training_takes_another_path_to_the_same_values_and_gradients() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.bfloat16, requires_grad=True) for n in (9, 14, 14))
    weight = torch.randn(2, 9, 3, 8)
    assert module._slow(q, k)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, exact = attention(q, k, v), formula(wide[0], wide[1], wide[2], None)
    assert (out - exact).norm() < 0.01 * exact.norm()
    (out.float() * weight).sum().backward()
    (exact * weight).sum().backward()
    for ours, theirs in zip((q, k, v), wide, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() < 0.02 * theirs.grad.norm()


def test_half_precision_without_gradients_takes_products_for_few_tokens() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16, dtype=torch.bfloat16) for n in (300, 400, 400))
    assert module._slow(q, k)
    assert not module._slow(q.expand(1, 300, 2, 16).repeat(1, 3, 1, 1), k)
    assert not module._slow(q.float(), k.float())
    exact = formula(q.double(), k.double(), v.double(), None)
    assert (attention(q, k, v) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
@pytest.mark.parametrize(("queries", "keys"), [(64, 77), (63, 5)])
def test_backends_agree_on_the_gpu(backend: str, queries: int, keys: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, queries, 4, 40, device="cuda", dtype=torch.float16)
    k, v = torch.randn(2, 2, keys, 4, 40, device="cuda", dtype=torch.float16)
    expected = formula(q.double(), k.double(), v.double(), None)
    with using("cuda", backend):
        assert (attention(q, k, v) - expected).abs().max() < 5e-3


def test_choice_is_stated_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    before = dict(module._chosen)
    with caplog.at_level("INFO"):
        assert choose("cpu") == "sdpa"
    assert "attention on cpu: sdpa (xformers has no cpu operator)" in caplog.text
    with using("cpu", "reference"):
        assert module._chosen["cpu"] == "reference"
    assert module._chosen["cpu"] == "sdpa"
    module._chosen.clear()
    module._chosen.update(before)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"'flash' is not one of \['auto', 'xformers', 'sdpa', 'reference'\]"):
        choose("cpu", "flash")
    with pytest.raises(ValueError, match="xformers has no cpu operator"):
        choose("cpu", "xformers")
