"""What a GPU's autocast keeps: the planner's rules beside torch's own dispatcher, on tensors of a GPU without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.models import networks
from ldm.models.attention import using
from ldm.models.casts import planned
from ldm.models.fit import told
from ldm.models.presets import PRESETS, TEXTS
from ldm.models.transformers import zimage
from ldm.plan.trace import _Gpu, _Tracker

SIDE, BATCH = 32, 2
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny", {}),
    "sd35_medium": ("sd3", {"num_layers": 3, "dual_attention_layers": (0,)}),
    "flux_dev": ("flux", {"num_layers": 2, "num_single_layers": 2}),
    "pixart_sigma": ("pixart", {"num_layers": 2}),
    "zimage": ("zimage", {"n_layers": 2, "n_refiner_layers": 1}),
}
"""A small U-Net; published widths of few layers; and the presets of their text encoders."""


def small(name: str) -> nn.Module:
    return networks.build(replace(PRESETS[name], **SMALL[name][1])).train()  # type: ignore[type-var]


def kept(network: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without the weights."""
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        found.setdefault(x.untyped_storage()._cdata, x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    return sum(x.untyped_storage().nbytes() for key, x in found.items() if key not in own)


class Fused(torch.autograd.Function):
    """What a fused attention keeps (Dao et al. 2022): its inputs, its output, a sum for each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    to = torch.get_autocast_dtype("cuda")
    return Fused.apply(q.to(to), k.to(to), v.to(to))  # type: ignore[return-value]


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """torch's dispatcher as it is on a GPU; `torch.autocast` itself asks for one."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
        torch.clear_autocast_cache()


@pytest.mark.parametrize("name", SMALL)
def test_what_is_kept_is_what_the_dispatcher_keeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 0.1 %: the rest is masks."""
    with torch.device("meta"):
        network: Any = small(name)
    cond = told(network, TEXTS[SMALL[name][0]], BATCH)
    x, t = torch.empty(BATCH, network.in_channels, SIDE, SIDE, device="meta"), torch.empty(BATCH, device="meta")
    tracker = _Tracker()
    with using("meta", "sdpa"), planned(torch.bfloat16), tracker, _Gpu(tracker, torch.bfloat16):
        counted = kept(network, lambda: network(x, t, cond))
    monkeypatch.setattr(zimage, "_known", lambda numbers: False)  # there are none to read
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    with FakeTensorMode(), using("cuda", "sdpa"):
        with torch.device("cuda"):
            there: Any = small(name)
            given = [torch.empty(v.shape, dtype=v.dtype) for v in (x, t, *cond.values())]
        with gpu_autocast():
            real = kept(there, lambda: there(given[0], given[1], dict(zip(cond, given[2:], strict=True))))
    print(f"{name}: {counted / 1e6:.1f} MB for {real / 1e6:.1f}")
    assert counted == pytest.approx(real, rel=1e-3)
