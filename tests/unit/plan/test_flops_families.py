"""Operations of the transformers: the planner's counts against torch's counter on real tensors, and closed forms."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.models import networks, onednn
from ldm.models.fit import told
from ldm.models.presets import PRESETS, TEXTS
from ldm.models.transformers import presets
from ldm.models.transformers.flux import FluxConfig
from ldm.models.transformers.sd3 import SD3Config
from ldm.plan.flops import count_flops
from ldm.plan.trace import trace
from ldm.types import Cond

SMALL: dict[str, Any] = {
    "sd3": presets.SD3_TINY, "flux": presets.FLUX_TINY, "pixart": presets.PIXART_TINY, "zimage": presets.ZIMAGE_TINY
}  # fmt: skip
TOKENS = 32


def cond(config: Any, batch: int, device: str) -> Cond:
    """Conditioning of a small network, every token of it seen."""
    width = {"pixart": "caption_channels", "zimage": "cap_feat_dim"}.get(config.kind, "joint_attention_dim")
    found = {"text": torch.zeros(batch, TOKENS, getattr(config, width), device=device)}
    if config.kind in ("sd3", "flux"):
        found["pooled"] = torch.zeros(batch, config.pooled_projection_dim, device=device)
    else:
        found["mask"] = torch.ones(batch, TOKENS, dtype=torch.bool, device=device)
    return found | ({"guidance": torch.ones(batch, device=device)} if config.kind == "flux" else {})


def inputs(config: Any, batch: int, device: str) -> tuple[Any, ...]:
    channels = config.in_channels // (4 if config.kind == "flux" else 1)
    x = torch.zeros(batch, channels, 8, 8, device=device)
    return x, torch.zeros(batch, device=device), cond(config, batch, device)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_counts_are_torch_s_on_real_tensors(kind: str, recompute: bool) -> None:
    """Forward, and a training step of 2 samples, with blocks computed again or not: equal."""
    config = SMALL[kind]
    with torch.device("meta"):
        planned = networks.build(config).train()
    real = networks.build(config).train()
    for network in (planned, real):
        network.enable_gradient_checkpointing(recompute)
    forward, step = (FlopCounterMode(display=False, custom_mapping=onednn.formulas()) for _ in range(2))
    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad(), forward:
            real(*inputs(config, 2, "cpu"))
        with step:
            real(*inputs(config, 2, "cpu")).square().mean().backward()
    assert count_flops(planned, *inputs(config, 2, "meta")) == forward.get_total_flops() > 0
    found = trace(planned, lambda b: inputs(config, b, "meta"), 2, precision=torch.float32, gpu=False)
    assert (
        sum(op.flops for op in found.ops)
        == step.get_total_flops()
        > (2.9 if recompute else 2.5) * count_flops(planned, *inputs(config, 2, "meta"))
    )


def sd3(config: SD3Config, n: int, t: int) -> tuple[float, float]:
    """(of linear layers, of attention) in a forward pass over n image and t text tokens, 2 a multiply-add.

    Linear layers cost 2 a weight and token: 4 d^2 of attention and 8 d^2 of the feed-forward.
    """
    d, layers, dual = config.width, config.num_layers, len(config.dual_attention_layers)
    weights = (12 * layers + 4 * dual) * d * d * n + (12 * (layers - 1) + 3) * d * d * t
    weights += (6 * layers + 3 * dual + 6 * (layers - 1) + 2 + 2) * d * d  # modulations, once a sample
    patch = config.patch_size**2 * config.in_channels
    weights += 2 * patch * d * n + config.joint_attention_dim * d * t
    weights += (256 + d) * d + (config.pooled_projection_dim + d) * d
    return 2.0 * weights, 4.0 * d * (layers * (n + t) ** 2 + dual * n**2)


def flux(config: FluxConfig, n: int, t: int) -> tuple[float, float]:
    """The same of FLUX.1; a single block is 4 d^2, 4 d^2 and 4 d^2 on text and image together."""
    d, both, single = config.width, config.num_layers, config.num_single_layers
    weights = 12 * both * d * d * (n + t) + 12 * single * d * d * (n + t)
    weights += (12 * both + 3 * single + 2) * d * d
    weights += 2 * config.in_channels * d * n + config.joint_attention_dim * d * t
    weights += 2 * (256 + d) * d + (config.pooled_projection_dim + d) * d
    return 2.0 * weights, 4.0 * d * (both + single) * (n + t) ** 2


FORMS: dict[str, Any] = {"sd35_medium": (sd3, "sd3", 77 + 256), "flux_dev": (flux, "flux", 512)}


@cache
def published(name: str, layers: int | None = None) -> tuple[Any, tuple[Any, ...], float, float]:
    """A network on the meta device, its inputs for 1024 pixels, and the closed form."""
    form, text, tokens = FORMS[name]
    config: Any = PRESETS[name]
    if layers is not None:
        own = {"num_single_layers": layers} if name == "flux_dev" else {"dual_attention_layers": (0,)}
        config = replace(config, num_layers=layers, **own)
    with torch.device("meta"):
        network = networks.build(config).train()
    x = torch.empty(1, network.in_channels, 128, 128, device="meta")
    given = (x, torch.empty(1, device="meta"), told(network, TEXTS[text]))
    return network, given, *form(config, 64 * 64, tokens)


@pytest.mark.parametrize("name", FORMS)
def test_the_published_transformers(name: str) -> None:
    """At 1024 pixels; the published sizes give 2 x weights x tokens and attention."""
    network, given, linear, attention = published(name)
    assert count_flops(network, *given) == pytest.approx(linear + attention, rel=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_a_step_on_a_gpu_is_its_closed_form(name: str) -> None:
    """Linear layers three times, fused attention 1 + 2.5 times (it computes its products again), on 3 layers."""
    network, given, linear, attention = published(name, 3)
    found = trace(network, lambda _: given, 1, precision=torch.bfloat16, gpu=True)
    assert sum(op.flops for op in found.ops) == pytest.approx(3 * linear + 3.5 * attention, rel=0.01)
