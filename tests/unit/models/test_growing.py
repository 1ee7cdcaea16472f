"""Networks that grow in depth: the same answer bit for bit, new layers that learn, and what cannot grow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ldm.models.growing import check_growth, grown
from ldm.models.network import Network
from ldm.models.networks import build
from ldm.models.presets import UNETS
from ldm.models.transformers import presets
from ldm.types import Cond
from tests.distributed import tiny

TINY = UNETS["tiny"]
EMOJI = UNETS["emoji"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "unet": (tiny.UNET, {"layers_per_block": 3}),
    "unet, one level": (TINY, {"layers_per_block": (2, 1)}),
    "unet, three levels": (EMOJI, {"layers_per_block": (1, 3, 2)}),
    "unet, scale and shift": (replace(tiny.UNET, resnet_time_scale_shift="scale_shift"), {"layers_per_block": 2}),
    "sd3": (presets.SD3_TINY, {"num_layers": 6}),
    "sd3, new ones with two attentions": (presets.SD3_TINY, {"num_layers": 5, "dual_attention_layers": (0, 1, 2)}),
    "flux": (presets.FLUX_TINY, {"num_layers": 3}),
    "flux, both": (presets.FLUX_TINY, {"num_layers": 4, "num_single_layers": 3}),
    "pixart": (presets.PIXART_TINY, {"num_layers": 4}),
    "zimage": (presets.ZIMAGE_TINY, {"n_layers": 5}),
}


def start(config: Any) -> Network:
    torch.manual_seed(0)
    network = build(config)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return network


def inputs(network: Network) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    torch.manual_seed(1)
    unet = network.component == "unet"
    width = network.config.per_level("cross_attention_dim")[0] if unet else 20
    cond: Cond = {"text": torch.randn(2, 5, width)}
    if "pooled" in network.needs:
        cond["pooled"] = torch.randn(2, 12)
    if "guidance" in network.needs:
        cond["guidance"] = torch.tensor([1.0, 3.5])
    return torch.randn(2, network.in_channels, 8, 8), torch.tensor([3, 700]), cond


@pytest.mark.parametrize("case", CASES)
def test_the_answer_is_the_same_bit_for_bit(case: str) -> None:
    own, changes = CASES[case]
    network = start(own).eval()
    x, t, cond = inputs(network)
    made = grown(network, replace(own, **changes))
    assert made.config == replace(own, **changes)
    assert sum(p.numel() for p in made.parameters()) > sum(p.numel() for p in network.parameters())
    with torch.no_grad():
        before, after = network(x, t, cond), made(x, t, cond)
    assert torch.equal(before, after)
    assert before.abs().max() > 1e-3
    # with gradients other code runs (norms that are computed again)
    assert torch.equal(network.train()(x, t, cond), made.train()(x, t, cond))


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_every_new_block_and_old_ones_have_theirs(case: str) -> None:
    """Each new block's own last layer, or gate, learns at once; after a step of it all of its weights do."""
    own, changes = CASES[case]
    network = start(own)
    x, t, cond = inputs(network)
    made = grown(network, replace(own, **changes))
    assert made.training
    target = torch.randn(2, made.out_channels, 8, 8)

    def gradients(net: Network) -> dict[str, torch.Tensor]:
        net.zero_grad()
        (net(x, t, cond) - target).square().mean().backward()
        return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}

    before = dict(network.named_parameters())  # all random: a new weight is equal to none of them
    twins = {n: m for n, p in made.named_parameters() for m, q in before.items() if torch.equal(p, q)}
    assert sorted(twins.values()) == sorted(before)
    first, old = gradients(made), gradients(network)
    for name, twin in twins.items():
        torch.testing.assert_close(first[name], old[twin], rtol=1e-5, atol=1e-8)
    fresh = set(first) - set(twins)
    assert any(first[n].any() for n in fresh)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p -= 0.05 * first[name]
    second = gradients(made)
    silent = {n for n in fresh if not second[n].any()}
    assert not silent


def test_other_networks_and_fewer_layers_are_refused() -> None:
    wrong: list[tuple[Any, Any, str]] = [
        (tiny.UNET, presets.SD3_TINY, "grow: from 'unet' to 'sd3'"),
        (tiny.UNET, replace(tiny.UNET, block_out_channels=(16, 24)), r"block_out_channels \(16, 24\) for \(8, 12\)"),
        (replace(tiny.UNET, layers_per_block=2), tiny.UNET, "layers_per_block 1 is fewer than the start's 2"),
        (tiny.UNET, replace(tiny.UNET, layers_per_block=(1, 1)), "nothing to grow; write false"),
        (presets.SD3_TINY, replace(presets.SD3_TINY, num_layers=2), "num_layers 2 is fewer than the start's 3"),
        (
            presets.SD3_TINY,
            replace(presets.SD3_TINY, num_layers=5, dual_attention_layers=(0, 1, 4)),
            r"dual_attention_layers \[0, 1, 4\]: block 2 of the start, block 4 then, has no second attention",
        ),
        (
            presets.FLUX_TINY,
            replace(presets.FLUX_TINY, num_layers=1, num_single_layers=4),
            "num_layers 1 is fewer than the start's 2",
        ),
        (presets.PIXART_TINY, replace(presets.PIXART_TINY, num_layers=3, in_channels=8), "in_channels 8 for 4"),
    ]
    for own, wanted, why in wrong:
        with pytest.raises(ValueError, match=why):
            check_growth(own, wanted)
