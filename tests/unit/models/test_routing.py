"""Tokens led around blocks: against all tokens in the blocks with those masked out as keys, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import networks
from ldm.models.transformers import blocks as layers
from ldm.models.transformers import presets
from ldm.models.transformers.base import Transformer
from ldm.models.transformers.routing import Routed, Span
from tests.families import scrambled

N, B, T = 16, 3, 5
KEPT = torch.tensor([[0, 3, 4, 9, 11, 15], [1, 2, 3, 5, 8, 13], [6, 7, 8, 10, 12, 14]])
FAMILIES = {
    "sd3": (replace(presets.SD3_TINY, num_layers=4), Span(1, 2), {"text": 32, "pooled": 32}),
    "pixart": (replace(presets.PIXART_TINY, num_layers=4), Span(1, 2), {"text": 32}),
    "flux": (replace(presets.FLUX_TINY, num_layers=2, num_single_layers=3), Span(1, 3), {"text": 32, "pooled": 32}),
    "flux, single blocks": (replace(presets.FLUX_TINY, num_layers=1, num_single_layers=3), Span(2, 3), {}),
    "zimage": (replace(presets.ZIMAGE_TINY, n_layers=4), Span(1, 2), {}),
}


def network(name: str) -> Transformer:
    torch.manual_seed(3)
    made = scrambled(networks.build(FAMILIES[name][0]), 0.2).double().train()
    assert isinstance(made, Transformer)
    made.routing = FAMILIES[name][1]
    return made


def told(net: Transformer) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(4)
    config: Any = net.config
    text = getattr(config, "joint_attention_dim", None) or getattr(config, "caption_channels", None)
    text = text or getattr(config, "cap_feat_dim", None) or config.cross_attention_dim
    side = int(N**0.5) * net.multiple
    cond = {"text": torch.randn(B, T, text).double()}
    if "pooled" in net.needs:
        cond["pooled"] = torch.randn(B, config.pooled_projection_dim).double()
    if "guidance" in net.needs:
        cond["guidance"] = torch.full((B,), 3.5).double()
    if type(net).__name__ == "ZImageTransformer":
        cond["mask"] = torch.arange(T)[None] < torch.tensor([5, 2, 3])[:, None]
    return torch.randn(B, net.in_channels, side, side).double(), torch.tensor([700.0, 300.0, 50.0]).double(), cond


def block_modules(net: Transformer) -> list[nn.Module]:
    """Those that `skip` counts."""
    found = [module for _, module in net.blocks()]
    return found[len(found) - net.depth :]


def masked(net: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block computes all tokens; within the span the others are hidden from attention, and afterwards put back.

    The image's tokens are found by the sequence's length: alone, behind the text, before Z-Image's.
    """
    span, modules = net.routing, block_modules(net)
    assert span is not None
    kept = torch.zeros(B, N, dtype=torch.bool).scatter(1, KEPT, True)
    inside = [False]
    original = layers.attention

    def image_from(length: int) -> int:
        return 0 if type(net).__name__ == "ZImageTransformer" else length - N

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        own = q.shape[1] == k.shape[1] and k.shape[1] >= N
        if not (inside[0] and own):
            return original(q, k, v, mask)
        length = k.shape[1]
        first = image_from(length)
        shown = F.pad(padded(kept), (first, length - first - padded(kept).shape[1]), value=True)[:, None, None]
        return original(q, k, v, shown if mask is None else mask & shown)

    def padded(seen: Tensor) -> Tensor:
        """Z-Image fills pictures up to a multiple of tokens, which are led around as well."""
        full = -(-N // 32) * 32 if type(net).__name__ == "ZImageTransformer" else N
        return F.pad(seen, (0, full - N), value=False)

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        inside[0] = True
        module.before = args[0]  # type: ignore[assignment]

    def end(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        inside[0] = False
        x = out[0] if isinstance(out, tuple) else out
        before: Tensor = modules[span.first].before  # type: ignore[assignment]
        first = image_from(x.shape[1])
        start = image_from(before.shape[1])
        image = before[:, start : start + padded(kept).shape[1]]
        part = x[:, first : first + image.shape[1]]
        part = torch.where(padded(kept)[..., None], part, image)
        x = torch.cat([x[:, :first], part, x[:, first + image.shape[1] :]], dim=1)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    monkeypatch.setattr(layers, "attention", attention)
    modules[span.first].register_forward_pre_hook(begin)
    modules[span.last].register_forward_hook(end)


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_tokens_see_each_other_alone_and_the_rest_goes_around(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and gradients equal those of masked attention over all tokens."""
    found = []
    for reference in (False, True):
        net = network(name)
        x, t, cond = told(net)
        x.requires_grad_(True)
        if reference:
            masked(net, monkeypatch)
        out = net(x, t, cond if reference else {**cond, "route": KEPT})
        found.append((out.detach(), torch.autograd.grad(out.square().sum(), x)[0]))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    plain = network(name)
    x, t, cond = told(plain)
    assert not torch.allclose(plain(x, t, cond), found[0][0], rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_tokens_kept_is_no_routing(name: str) -> None:
    net = network(name)
    x, t, cond = told(net)
    every = torch.arange(-(-N // 32) * 32 if name == "zimage" else N).expand(B, -1)
    assert torch.allclose(net(x, t, {**cond, "route": every}), net(x, t, cond), rtol=1e-12, atol=1e-12)


def test_blocks_of_the_span_see_fewer_tokens_and_recomputing_changes_nothing() -> None:
    net = network("sd3")
    x, t, cond = told(net)
    seen: list[int] = []
    for block in block_modules(net):
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    x.requires_grad_(True)
    wanted = torch.autograd.grad(net(x, t, {**cond, "route": KEPT}).square().sum(), x)[0]
    assert seen == [N, 6, 6, N]
    net.enable_gradient_checkpointing()
    again = torch.autograd.grad(net(x, t, {**cond, "route": KEPT}).square().sum(), x)[0]
    assert torch.equal(wanted, again)


def test_a_route_without_a_span_is_refused() -> None:
    with pytest.raises(ValueError, match='cond "route" needs a span of blocks'):
        Routed(None, KEPT, N)
