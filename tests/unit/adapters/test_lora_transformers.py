"""Adapters on the transformers: against PEFT on the same network, merged, taken out, and what they choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.full import FullAdapter, FullConfig
from ldm.adapters.lora import LoraAdapter, LoraConfig, LoraNet
from ldm.adapters.low_rank import Loras, extract
from ldm.adapters.sites import all_sites, network_sites, other_sites, usual_targets
from ldm.models.network import Network
from ldm.models.text import TextTower
from ldm.models.transformers import presets
from ldm.models.transformers.flux import FluxTransformer
from ldm.models.transformers.pixart import PixArtTransformer
from ldm.models.transformers.sd3 import SD3Transformer
from ldm.models.transformers.zimage import ZImageTransformer
from tests.unit.adapters.test_lora import TEXT, filled, set_peft, weights

NETS: dict[str, Callable[[], Network]] = {
    "sd3": lambda: SD3Transformer(presets.SD3_TINY),
    "flux": lambda: FluxTransformer(presets.FLUX_TINY),
    "pixart": lambda: PixArtTransformer(presets.PIXART_TINY),
    "zimage": lambda: ZImageTransformer(presets.ZIMAGE_TINY),
}
CONFIGS = {
    "lora": LoraConfig(rank=3, alpha=5.0),
    "dora": LoraConfig(rank=2, dora=True),
    "every layer": LoraConfig(rank=2, targets=("attention", "feed_forward", "projection", "time", "linear")),
}


def made(family: str, seed: int = 0) -> Network:
    """Random weights, none of them zero."""
    torch.manual_seed(seed)
    network = NETS[family]()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1) if p.ndim == 1 else nn.init.xavier_normal_(p)
    return network


def in_double(family: str, seed: int = 0) -> Network:
    return made(family, seed).double()


def inputs(network: Network) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(5)
    cond = {"text": torch.randn(2, 5, 20, generator=g).double()}
    if "pooled" in network.needs:
        cond["pooled"] = torch.randn(2, 12, generator=g).double()
    if "guidance" in network.needs:
        cond["guidance"] = torch.tensor([3.5, 1.0])
    return torch.randn(2, 4, 8, 6, generator=g).double(), torch.tensor([30.0, 700.0]), cond


@pytest.fixture(params=NETS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("kind", CONFIGS)
def test_outputs_and_gradients_are_those_of_peft(family: str, kind: str) -> None:
    import peft

    config, network = CONFIGS[kind], in_double(family)
    x, t, cond = inputs(network)
    with torch.no_grad():
        plain = network(x, t, cond)
    adapter = LoraAdapter(config)
    net = filled(adapter.attach(network, [])).double()
    found = net(x, t, cond)
    found.square().mean().backward()
    assert (found - plain).abs().max() > 1e-3
    lora, other = adapter.lora(weights(net)), in_double(family)
    names = {n.removeprefix("transformer."): low for n, low in lora.items()}
    theirs = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, use_dora=config.dora, target_modules=list(names)
    )
    peft.inject_adapter_in_model(theirs, other)
    for module in other.modules():  # which the patches' layer is asked for, and PEFT's does not pass on
        if isinstance(base := getattr(module, "base_layer", None), nn.Conv2d):
            module.out_channels = base.out_channels  # type: ignore[assignment]
    set_peft(other.double(), names)
    wanted = other(x, t, cond)
    wanted.square().mean().backward()
    assert torch.allclose(found, wanted, atol=1e-9, rtol=1e-9)
    named = dict(net.named_parameters())
    for name in names:
        layer: Any = other.get_submodule(name)
        pairs = [("down", layer.lora_A["default"].weight), ("up", layer.lora_B["default"].weight)]
        if config.dora:
            pairs.append(("magnitude", layer.lora_magnitude_vector["default"].weight))
        for part, p in pairs:
            mine = named[f"layers.transformer/{name.replace('.', '/')}.{part}"].grad
            assert mine is not None
            top = p.grad.abs().max().clamp(min=1e-6)
            assert ((mine - p.grad.view_as(mine)).abs().max() / top) < 1e-4, (name, part)


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_as_trained_and_out_again_to_the_last_bit(family: str, kind: str) -> None:
    network, adapter = in_double(family), LoraAdapter(CONFIGS[kind])
    before = {k: v.clone() for k, v in network.state_dict().items()}
    x, t, cond = inputs(network)
    net = filled(adapter.attach(network, [])).double()
    with torch.no_grad():
        found = net(x, t, cond)
        net.detach()
        loras, lora = Loras(network, []), adapter.lora(weights(net))
        loras.add("a", lora)
        assert torch.allclose(network(x, t, cond), found, atol=1e-9, rtol=1e-9)
        prepared = network(x, t, network.prepared(cond))
        assert torch.allclose(prepared, found, atol=1e-9, rtol=1e-9)
        loras.add("b", lora, -0.5)
        loras.remove("a", "b")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_checkpointing_gives_the_same_gradients(family: str) -> None:
    found = []
    for recompute in (False, True):
        network = in_double(family)
        network.enable_gradient_checkpointing(recompute)
        net = filled(LoraAdapter(LoraConfig()).attach(network, [])).double()
        net(*inputs(network)).square().mean().backward()
        found.append({n: p.grad for n, p in net.named_parameters()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_extraction_from_a_trained_network(family: str) -> None:
    before, after = in_double(family), in_double(family)
    net = filled(LoraAdapter(LoraConfig(rank=2)).attach(after, []))
    net.detach()
    lora = LoraAdapter(LoraConfig(rank=2)).lora(weights(net))
    Loras(after, []).add("x", lora)
    found = extract((before, []), (after, []), 2)
    assert set(found) == set(lora)
    sites = all_sites(before, [])
    for name, low in found.items():
        delta = lora[name].delta(sites[name].read())
        assert (low.delta(sites[name].read()) - delta).norm() < 1e-5 * delta.norm()


def ends(net: LoraNet) -> set[str]:
    """The names of the chosen layers, without the numbers of their blocks."""
    names = {n.rpartition(".")[0].removeprefix("layers.transformer/").replace("/", ".") for n in weights(net)}
    return {".".join("N" if p.isdigit() and i == 1 else p for i, p in enumerate(n.split("."))) for n in names}


ATTENTION = {f"transformer_blocks.N.attn.{n}" for n in
             ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}  # fmt: skip
FEED = {f"transformer_blocks.N.{n}" for n in ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")}
SINGLE = {f"single_transformer_blocks.N.attn.{n}" for n in ("to_q", "to_k", "to_v")}
CROSS = {f"transformer_blocks.N.attn{k}.{n}" for k in (1, 2) for n in ("to_q", "to_k", "to_v", "to_out.0")}


@pytest.mark.parametrize(
    ("family", "wanted"), [("sd3", ATTENTION), ("flux", ATTENTION | FEED | SINGLE), ("pixart", CROSS)]
)
def test_what_is_corrected_where_nothing_is_said(family: str, wanted: set[str]) -> None:
    """diffusers' scripts' layers (train_dreambooth_lora_sd3, .._flux), found by their names' ends as PEFT does it."""
    if family == "sd3":  # without the second attentions of SD3.5 medium
        network: Network = SD3Transformer(replace(presets.SD3_TINY, dual_attention_layers=()))
    else:
        network = in_double(family)
    assert ends(LoraAdapter(LoraConfig()).attach(network, [])) == wanted
    named = LoraConfig(targets=usual_targets(network))
    assert ends(LoraAdapter(named).attach(network, [])) == wanted


def test_every_layer_has_a_group_and_a_name(family: str) -> None:
    network = in_double(family)
    sites = network_sites(network)
    layers = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert [s.name for s in sites] == [f"transformer.{n}" for n in layers]
    known = {s.name for s in sites} | set(other_sites(network, []))
    tensors = {f"transformer.{n.removesuffix('.weight')}" for n, _ in network.named_parameters()}
    assert {n for n in tensors - known if not n.endswith(("scale_shift_table", "_pad_token"))} == set()


class Other(nn.Module):
    """A text encoder that is no CLIP tower."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 4)


def test_text_lora_is_on_the_clip_towers_alone() -> None:
    flux, tower = in_double("flux"), TextTower(TEXT)
    net = LoraAdapter(LoraConfig(text=True)).attach(flux, [tower, Other()])  # type: ignore[list-item]
    text = {n for n in weights(net) if "text_encoder" in n}
    layers = {n.partition("/layers/")[2].partition(".")[0] for n in text}
    assert layers == {f"{i}/self_attn/{n}_proj" for i in (0, 1) for n in ("q", "k", "v", "out")}
    with pytest.raises(ValueError, match=r"text: LoRA adapts CLIP towers alone, and the PixArt.* \['Other'\]"):
        LoraAdapter(LoraConfig(text=True)).attach(in_double("pixart"), [Other()])  # type: ignore[list-item]


def test_all_weights_of_networks_and_encoders() -> None:
    """FLUX.1 is given CLIP's pooled vector, so that its last block trains; all of T5 does."""
    flux, tower, other = in_double("flux"), TextTower(replace(TEXT, output="penultimate")), Other()
    whole = FullAdapter(FullConfig(text=True)).attach(flux, [tower, other])  # type: ignore[list-item]
    frozen = [n for n, p in whole.named_parameters() if not p.requires_grad]
    assert frozen == []
    names = set(FullAdapter(FullConfig(text=True)).export(weights(whole)))
    assert {"text.1.weight", "transformer.x_embedder.weight"} <= names
