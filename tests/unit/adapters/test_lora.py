"""Low-rank adaptation against PEFT on the same U-Net, against transformers' text model, and against merged weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.lora import LoraAdapter, LoraConfig, LoraNet
from ldm.adapters.low_rank import Loras, LowRank, extract
from ldm.adapters.sites import all_sites
from ldm.models.text import TextConfig, TextTower
from ldm.models.unet import UNet, UNetConfig
from tests.miniature import UNET

TEXT = TextConfig(width=16, heads=2, layers=2, context_length=12, vocab_size=4096, activation="gelu", bpe="emoji")
EVERY = ("attention", "feed_forward", "projection", "convolution", "time", "conv_in", "conv_out")


def model(seed: int = 0) -> tuple[UNet, TextTower]:
    """Random weights, none of them zero."""
    torch.manual_seed(seed)
    unet = UNet(UNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in UNET.items()}))
    tower = TextTower(TEXT)
    for p in [*unet.parameters(), *tower.model.parameters()]:
        nn.init.normal_(p, std=0.1) if p.ndim == 1 else nn.init.xavier_normal_(p)
    return unet, tower


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, t, cond."""
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return draw(batch, 4, 8, 8), torch.tensor([3.0, 700.0])[:batch], {"text": draw(batch, 12, 16)}


def filled(net: LoraNet, seed: int = 7) -> LoraNet:
    """With corrections that are not zero, and magnitudes that are not those of the weights."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("magnitude"):
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=g))
            else:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return net


def weights(net: nn.Module) -> dict[str, Tensor]:
    """As the trainer gives them to the export."""
    return {n: p.detach().clone() for n, p in net.named_parameters()}


CONFIGS = [
    LoraConfig(rank=3, alpha=5.0, targets=EVERY),
    LoraConfig(rank=4, alpha=2.0, rslora=True, targets=EVERY),
    LoraConfig(rank=2, dora=True, targets=EVERY),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["lora", "rslora", "dora"])
def test_outputs_and_gradients_are_those_of_peft(config: LoraConfig) -> None:
    import peft

    unet, tower = model()
    net = filled(LoraAdapter(config).attach(unet, [tower]))
    x, t, cond = inputs()
    found = net(x, t, cond)
    found.square().mean().backward()
    lora = LoraAdapter(config).lora(weights(net))

    other, _ = model()
    names = [n.removeprefix("unet.") for n in lora]
    theirs = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=names,
    )
    peft.inject_adapter_in_model(theirs, other)
    set_peft(other, lora)
    wanted = other(x, t, cond)
    wanted.square().mean().backward()
    assert torch.allclose(found, wanted, atol=2e-6, rtol=1e-5)
    named = dict(net.named_parameters())
    for name in names:
        layer: Any = other.get_submodule(name)
        own = f"layers.unet/{name.replace('.', '/')}"
        pairs = [("down", layer.lora_A["default"].weight), ("up", layer.lora_B["default"].weight)]
        if config.dora:
            pairs.append(("magnitude", layer.lora_magnitude_vector["default"].weight))
        for kind, p in pairs:
            mine = named[f"{own}.{kind}"].grad
            assert mine is not None
            top = p.grad.abs().max().clamp(min=1e-6)
            assert ((mine - p.grad.view_as(mine)).abs().max() / top) < 1e-4, (name, kind)


def set_peft(module: nn.Module, lora: dict[str, LowRank]) -> None:
    """Give PEFT's layers our tensors."""
    with torch.no_grad():
        for name, low in lora.items():
            layer: Any = module.get_submodule(name.removeprefix("unet."))
            layer.lora_A["default"].weight.copy_(low.down)
            layer.lora_B["default"].weight.copy_(low.up)
            if low.magnitude is not None:
                p = layer.lora_magnitude_vector["default"].weight
                p.copy_(low.magnitude.view_as(p))


@pytest.mark.parametrize("config", CONFIGS, ids=["lora", "rslora", "dora"])
def test_merged_weights_give_what_the_corrections_gave(config: LoraConfig) -> None:
    unet, tower = model()
    adapter = LoraAdapter(LoraConfig(**{**vars(config), "text": True}))
    net = filled(adapter.attach(unet, [tower]))
    x, t, cond = inputs()
    with torch.no_grad():
        found, text = net(x, t, cond), tower(["a red dot", ""])["text"]
        net.detach()
        plain, words = unet(x, t, cond), tower(["a red dot", ""])["text"]
        assert (found - plain).abs().max() > 1e-3
        assert (text - words).abs().max() > 1e-3
        loras = Loras(unet, [tower])
        loras.add("one", adapter.lora(weights(net)))
        assert torch.allclose(unet(x, t, cond), found, atol=1e-6, rtol=1e-5)
        assert torch.allclose(tower(["a red dot", ""])["text"], text, atol=1e-6, rtol=1e-5)


def test_several_at_once_and_out_again_to_the_last_bit() -> None:
    unet, tower = model()
    before = {k: v.clone() for k, v in [*unet.state_dict().items(), *tower.model.state_dict().items()]}
    sites = all_sites(unet, [tower])
    originals = {name: site.read().clone() for name, site in sites.items()}
    adapters = [LoraAdapter(LoraConfig(rank=r, text=True, dora=r == 3, targets=EVERY)) for r in (2, 3)]
    loras = []
    for seed, adapter in enumerate(adapters):
        net = filled(adapter.attach(unet, [tower]), seed)
        loras.append(adapter.lora(weights(net)))
        net.detach()
    merged = Loras(unet, [tower])
    merged.add("a", loras[0], 0.5)
    merged.add("b", loras[1])
    merged.set({"b": -0.25})
    for name in loras[0]:
        base = originals[name].double()
        wanted = base + 0.5 * loras[0][name].delta(base.float()) - 0.25 * loras[1][name].delta(base.float())
        assert torch.allclose(sites[name].read().double(), wanted, atol=1e-6)
    merged.remove("a")
    merged.add("a", loras[0], 3.0)
    merged.remove()
    after = unet.state_dict() | tower.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert merged.weights == {}


def test_starts_as_none_and_leaves_no_trace() -> None:
    unet, tower = model()
    x, t, cond = inputs()
    tokens = ["a blue bar"]
    with torch.no_grad():
        plain, words = unet(x, t, cond), tower(tokens)["text"]
        net = LoraAdapter(LoraConfig(text=True, targets=EVERY)).attach(unet, [tower])
        assert torch.equal(net(x, t, cond), plain)
        assert torch.allclose(tower(tokens)["text"], words, atol=1e-6)
        filled(net)
        with net.disabled():
            assert torch.equal(net(x, t, cond), plain)
        assert not torch.equal(net(x, t, cond), plain)
        net.detach()
        assert torch.equal(unet(x, t, cond), plain)
        assert torch.equal(tower(tokens)["text"], words)
    trained = {n for n, p in [*unet.named_parameters(), *tower.named_parameters()] if p.requires_grad}
    assert not trained
    assert not [n for n, _ in net.named_parameters() if "unet" not in n and "text_encoder" not in n]


def test_recomputed_forward_gives_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        unet, tower = model()
        unet.enable_gradient_checkpointing(recompute)
        net = filled(LoraAdapter(LoraConfig(targets=EVERY)).attach(unet, [tower]))
        net(*inputs()).square().mean().backward()
        found.append({n: p.grad for n, p in net.named_parameters()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_half_precision_by_autocast() -> None:
    unet, tower = model()
    net = filled(LoraAdapter(LoraConfig(dora=True, targets=EVERY)).attach(unet, [tower]))
    x, t, cond = inputs()
    exact = net(x, t, cond)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x, t, cond)
    out.float().square().mean().backward()
    assert (out.float() - exact).norm() / exact.norm() < 0.05
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_dropout_is_off_without_gradients() -> None:
    unet, tower = model()
    net = filled(LoraAdapter(LoraConfig(dropout=0.5)).attach(unet, [tower]))
    x, t, cond = inputs()
    with torch.no_grad():
        assert torch.equal(net(x, t, cond), net(x, t, cond))
    assert not torch.equal(net(x, t, cond), net(x, t, cond))


def test_extraction_is_exact_at_full_rank_and_best_below() -> None:
    before, text = model(0)
    after, other = model(0)
    site = all_sites(after, [other])["unet.mid_block.resnets.0.conv1"]
    rows = all_sites(after, [other])["text_encoder.text_model.encoder.layers.1.self_attn.k_proj"]
    g = torch.Generator().manual_seed(3)
    for s in (site, rows):
        s.read().add_(0.1 * torch.randn(s.read().shape, generator=g))
    lora = extract((before, [text]), (after, [other]), 16)
    assert set(lora) == {site.name, rows.name}
    Loras(before, [text]).add("x", lora)
    assert torch.allclose(all_sites(before, [text])[site.name].read(), site.read(), atol=1e-6)
    fused = "transformer.resblocks.1.attn.in_proj_weight"
    assert torch.allclose(text.model.state_dict()[fused], other.model.state_dict()[fused], atol=1e-6)
    fresh, words = model(0)
    low = extract((fresh, [words]), (after, [other]), 2)[site.name]
    base = all_sites(fresh, [words])[site.name].read()
    delta = (site.read() - base).double().flatten(1)
    s = torch.linalg.svdvals(delta)
    error = (low.delta(base).flatten(1) - delta).norm()
    assert math.isclose(float(error), float(s[2:].square().sum().sqrt()), rel_tol=1e-5)  # Eckart-Young


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ()}, "targets"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoraConfig(**change)


def test_a_target_that_is_not_there() -> None:
    unet, tower = model()
    with pytest.raises(ValueError, match=r"to_qq.*allowed are.*attention"):
        LoraAdapter(LoraConfig(targets=("to_qq",))).attach(unet, [tower])
    net = LoraAdapter(LoraConfig(targets=("attn2.to_k",))).attach(unet, [tower])
    assert all(n.endswith(("attn2/to_k.down", "attn2/to_k.up")) for n, _ in net.named_parameters())


def test_another_base_model_is_refused() -> None:
    unet, tower = model()
    lora = {"unet.conv_in": LowRank(torch.zeros(1, 4, 3, 3), torch.zeros(9, 1, 1, 1), 1.0)}
    with pytest.raises(ValueError, match=r"conv_in has shape \(9, 4, 3, 3\)"):
        Loras(unet, [tower]).add("x", lora)
    with pytest.raises(ValueError, match="not in this model"):
        Loras(unet, [tower]).add("x", {"unet.other": lora["unet.conv_in"]})
