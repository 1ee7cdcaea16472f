"""What every denoising network promises to those who train, draw, store or plan it, kept by each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ldm.models.network import Network
from ldm.models.networks import NETWORKS, build
from ldm.models.presets import UNETS
from ldm.models.transformers import presets
from ldm.types import Cond

TOLD = replace(
    UNETS["tiny"],
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=40,
)
NETS: dict[str, Callable[[], Network]] = {
    "unet": lambda: build(UNETS["tiny"]),
    "unet, three levels": lambda: build(UNETS["emoji"]),
    "unet, told sizes": lambda: build(TOLD),
    "sd3": lambda: build(presets.SD3_TINY),
    "flux": lambda: build(presets.FLUX_TINY),
    "flux, not told guidance": lambda: build(replace(presets.FLUX_TINY, guidance_embeds=False)),
    "pixart": lambda: build(presets.PIXART_TINY),
    "zimage": lambda: build(presets.ZIMAGE_TINY),
}
ENDS = {  # parameters that are no block's
    "unet": {"conv_in", "time_embedding", "add_embedding", "conv_norm_out", "conv_out"},
    "transformer": {
        "pos_embed", "x_embedder", "time_text_embed", "context_embedder", "norm_out", "proj_out", "adaln_single",
        "caption_projection", "scale_shift_table", "all_x_embedder", "all_final_layer", "t_embedder", "cap_embedder",
        "x_pad_token", "cap_pad_token",
    },
}  # fmt: skip


@pytest.fixture(params=NETS)
def network(request: pytest.FixtureRequest) -> Network:
    torch.manual_seed(0)
    made = NETS[request.param]()
    for p in made.parameters():
        nn.init.normal_(p, std=0.1)
    return made.eval()


def inputs(network: Network, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    torch.manual_seed(1)
    config = network.config
    unet = network.component == "unet"
    cond = {"text": torch.randn(rows, 5, config.per_level("cross_attention_dim")[0] if unet else 20)}
    if "pooled" in network.needs:
        cond["pooled"] = torch.randn(rows, 16 if unet else 12)
    if "time_ids" in network.needs:
        cond["time_ids"] = torch.rand(rows, 6) * 100
    if "guidance" in network.needs:
        cond["guidance"] = torch.rand(rows) * 8
    return torch.randn(rows, network.in_channels, 8, 12), torch.tensor([3.0, 700.0])[:rows], cond


def test_every_kind_is_tested() -> None:
    assert {type(make()) for make in NETS.values()} >= set(NETWORKS.values())
    kinds = [config.__dataclass_fields__["kind"].default for config in NETWORKS]
    assert len(set(kinds)) == len(kinds)


def test_what_it_needs_is_missed_by_name(network: Network) -> None:
    x, t, cond = inputs(network)
    optional = {"text", "guidance"} if network.component == "unet" else set()
    for key in sorted(network.needs - optional):
        with pytest.raises(ValueError, match=f"'{key}'"):
            network(x, t, {k: v for k, v in cond.items() if k != key})


def test_prepared_conditioning_gives_the_same_bits(network: Network) -> None:
    x, t, cond = inputs(network)
    before = {k: v.clone() for k, v in cond.items()}
    with torch.no_grad():
        ready = network.prepared(cond)
        assert torch.equal(network(x, t, cond), network(x, t, ready))
    assert all(torch.equal(cond[k], before[k]) for k in before)
    added = sum(v.numel() for k, v in ready.items() if k not in cond and v.ndim == 3)
    assert added == network.prepared_numbers(len(x), 5)


def test_blocks_run_in_their_order_and_hold_every_weight_between_the_ends(network: Network) -> None:
    seen: list[str] = []
    names = [name for name, _ in network.blocks()]
    for name, block in network.blocks():
        assert network.get_submodule(name) is block
        block.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        network(*inputs(network))
    assert seen == names
    assert len(set(names)) == len(names)
    inside = [p for _, block in network.blocks() for p in block.parameters()]
    assert len({id(p) for p in inside}) == len(inside), "no weight is in two blocks"
    ends = {n.split(".")[0] for n, p in network.named_parameters() if id(p) not in {id(q) for q in inside}}
    assert ends <= ENDS[network.component]


def test_correctable_layers_are_all_that_multiply(network: Network) -> None:
    found = {name: module for name, module, _ in network.correctable()}
    assert found == {n: m for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    groups = {group for _, _, group in network.correctable()}
    own = {"convolution"} if network.component == "unet" else set()
    assert groups - {"other"} == {"attention", "feed_forward", "projection", "time"} | own


def test_the_middle_is_as_deep_as_told(network: Network) -> None:
    if network.component != "unet":
        with pytest.raises(ValueError, match="gives no features half way"):
            network.middle(*inputs(network))
        return
    with torch.no_grad():
        assert network.middle(*inputs(network)).shape[:2] == (2, network.middle_channels)
    assert network.middle_channels % network.middle_groups == 0


def test_told_guidance_answers_as_before_until_it_learns(network: Network) -> None:
    x, t, cond = inputs(network)
    same = network.told_guidance(network.guidance_width).eval()
    with torch.no_grad():
        assert torch.equal(same(x, t, cond), network(x, t, cond))
    width = 256 if network.guidance_is_scale else 16
    if network.component != "unet":
        with pytest.raises(ValueError, match="has no place for one"):
            network.told_guidance(16)
        if not network.guidance_is_scale or network.guidance_width is not None:
            return
    told = network.told_guidance(width).eval()
    assert (told.guidance_width, "guidance" in told.needs) == (width, True)
    with torch.no_grad():
        for w in (0.0, 7.0):
            assert torch.equal(told(x, t, {**cond, "guidance": torch.full((2,), w)}), network(x, t, cond))
    with pytest.raises(ValueError, match=f"has one already, of width {width}, not 32|has no place for one of width 32"):
        told.told_guidance(32)


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (presets.SD3_TINY, {"transformer_blocks.0.attn2.to_q": "attention", "pos_embed.proj": "projection",
                                 "transformer_blocks.1.norm1_context.linear": "time",
                                 "transformer_blocks.0.ff_context.net.2": "feed_forward"}),
        (presets.FLUX_TINY, {"single_transformer_blocks.0.attn.to_q": "attention", "x_embedder": "projection",
                                  "time_text_embed.guidance_embedder.linear_1": "time",
                                  "single_transformer_blocks.1.proj_mlp": "feed_forward"}),
        (presets.PIXART_TINY, {"transformer_blocks.0.attn1.to_out.0": "attention", "proj_out": "projection",
                                    "adaln_single.linear": "time", "transformer_blocks.0.ff.net.2": "feed_forward",
                                    "caption_projection.linear_1": "other"}),
        (presets.ZIMAGE_TINY, {"layers.0.attention.to_v": "attention", "cap_embedder.1": "projection",
                                    "all_final_layer.2-1.adaLN_modulation.1": "time",
                                    "context_refiner.0.feed_forward.w3": "feed_forward"}),
    ],
    ids=lambda x: getattr(x, "kind", ""),
)  # fmt: skip
def test_the_groups_of_a_familys_layers(config: Any, groups: dict[str, str]) -> None:
    with torch.device("meta"):
        found = {name: group for name, _, group in build(config).correctable()}
    assert {name: found[name] for name in groups} == groups
