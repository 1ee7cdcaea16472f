"""LoHa, LoKr and OFT while they train, layers by pattern, dropouts and bounds: against closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.adapters.layers import Low
from ldm.adapters.lora import LoraAdapter, LoraConfig
from ldm.adapters.low_rank import Loras
from ldm.checkpoint.lora_files import read_lora
from ldm.checkpoint.lycoris_files import write_lycoris
from tests.unit.adapters.test_lora import EVERY, filled, inputs, model, weights
from tests.unit.adapters.test_lora_transformers import inputs as transformer_inputs
from tests.unit.adapters.test_lora_transformers import made

ALGOS: tuple[Any, ...] = ("loha", "lokr", "oft")


@pytest.mark.parametrize("algo", ALGOS)
def test_starts_as_none_trains_every_weight_and_reaches_the_towers(algo: Any) -> None:
    unet, tower = model()
    x, t, cond = inputs()
    before = unet(x, t, cond).detach()
    states = tower(["a cat"])["text"].detach() if callable(tower) else None
    net = LoraAdapter(LoraConfig(algo=algo, rank=2, targets=EVERY, text=True)).attach(unet, [tower])
    assert torch.equal(net(x, t, cond), before)
    filled(net)(x, t, cond).square().mean().backward()
    named = dict(net.named_parameters())
    missing = [n for n, p in named.items() if p.grad is None and "/text_model/" not in n]
    assert not missing
    assert states is None or not torch.allclose(tower(["a cat"])["text"], states, atol=1e-3)


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("family", ["sd3", "flux", "pixart", "zimage"])
def test_transformers_train_write_and_read_the_same(algo: Any, family: str, tmp_path: Path) -> None:
    network = made(family).double()
    adapter = LoraAdapter(LoraConfig(algo=algo, rank=2))
    net = filled(adapter.attach(network, [])).double().eval()
    answer = net(*transformer_inputs(network)).detach()
    write_lycoris(tmp_path / "x.safetensors", adapter.corrections(weights(net)), network.config)
    again = made(family).double()
    assert not torch.allclose(again(*transformer_inputs(again)), answer, atol=1e-3)
    Loras(again, []).add("x", read_lora(tmp_path / "x.safetensors", again, []))
    assert torch.allclose(again(*transformer_inputs(again)), answer, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [*(LoraConfig(algo=a, rank=2, targets=EVERY) for a in ALGOS), LoraConfig(rank=3, alpha=2.0, targets=EVERY)],
    ids=[*ALGOS, "lora"],
)
def test_going_on_from_a_file_is_where_it_was(config: LoraConfig, tmp_path: Path) -> None:
    unet, tower = model()
    adapter = LoraAdapter(config)
    net = filled(adapter.attach(unet, [tower]))
    write_lycoris(tmp_path / "x.safetensors", adapter.corrections(weights(net)), unet.config)
    answer = net(*inputs()).detach()
    other, tower = model()
    fresh = LoraAdapter(replace(config, alpha=None if config.algo == "oft" else 5.0))
    again = fresh.attach(other, [tower])
    fresh.load(again, read_lora(tmp_path / "x.safetensors", other, [tower]))
    assert torch.allclose(again(*inputs()), answer, atol=1e-5)


def test_patterns_choose_layers_ranks_and_alphas() -> None:
    unet, tower = model()
    config = LoraConfig(
        rank=4, alpha=2.0, targets=("attention", "convolution"), include=(r"down_blocks", r"mid_block"),
        exclude=(r"attn1\.", r"conv2$"), rank_pattern={r"attn2\.to_k": 3}, alpha_pattern={r"attn2\.to_k": 6.0},
    )  # fmt: skip
    adapter = LoraAdapter(config)
    net = adapter.attach(unet, [tower])
    names = {key.replace("/", ".") for key in net.layers}
    assert names
    assert all(("down_blocks" in n or "mid_block" in n) for n in names)
    assert not any("attn1." in n or n.endswith("conv2") for n in names)
    for name, low in adapter.lora(weights(net)).items():
        assert (low.rank, low.scale) == ((3, 2.0) if "attn2.to_k" in name else (4, 0.5)), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"include": ("nothing",)}, "leave none of"),
        ({"rank_pattern": {"nothing": 2}}, "rank_pattern: 'nothing' fits none"),
        ({"exclude": ("(",)}, "no regular expression"),
        ({"factor": 4}, "factor: is of algo lokr"),
        ({"algo": "oft", "alpha": 1.0}, "alpha: a rotation has none"),
        ({"rank_dropout": 1.0}, r"rank_dropout must be in \[0, 1\)"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], said: str) -> None:
    unet, tower = model()
    with pytest.raises(ValueError, match=said) as caught:
        LoraAdapter(LoraConfig(**changes)).attach(unet, [tower])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("algo", "most"), [("lora", 1.0), ("loha", 0.1), ("lokr", 1.0)])
def test_the_bound_shortens_long_changes_alone(algo: Any, most: float) -> None:
    lengths = {}
    for max_norm in (0.0, most):
        unet, tower = model()
        adapter = LoraAdapter(LoraConfig(algo=algo, rank=2, alpha=3.0, targets=EVERY, max_norm=max_norm))
        net = filled(adapter.attach(unet, [tower]))
        found = adapter.corrections(weights(net))
        lengths[max_norm] = {n: float(c.change().norm()) for n, c in found.items()}
        answer = net(*inputs()).detach()
        net.detach()
        Loras(unet, [tower]).add("x", found)
        assert torch.allclose(unet(*inputs()), answer, atol=2e-5)  # what is exported is what was trained
    assert max(lengths[0.0].values()) > most > min(lengths[0.0].values())
    for name, free in lengths[0.0].items():
        assert lengths[most][name] == pytest.approx(min(free, most), rel=1e-5)


@pytest.mark.parametrize("algo", ["lora", *ALGOS])
def test_a_correction_is_dropped_as_often_as_said_and_never_outside_training(algo: Any) -> None:
    unet, tower = model()
    site = LoraAdapter(LoraConfig(algo=algo, rank=2, module_dropout=0.3)).attach(unet, [tower])
    layer: Any = next(iter(filled(site).layers.values()))
    into = layer._site.read().shape[1]
    x = torch.randn(1, 3, into)
    out = nn.functional.linear(x, layer._site.read())
    layer.eval()
    kept = layer(x, out)
    assert not torch.allclose(kept, out, atol=1e-4)
    layer.train()
    torch.manual_seed(0)
    drawn = [layer(x, out) for _ in range(400)]
    missing = [torch.allclose(y, out, atol=1e-6) for y in drawn]
    assert all(m or torch.allclose(y, kept, atol=1e-5) for m, y in zip(missing, drawn, strict=True))
    assert abs(sum(missing) / 400 - 0.3) < 0.08  # three deviations


def test_ranks_are_dropped_by_sample_and_the_mean_stays() -> None:
    unet, tower = model()
    net = filled(LoraAdapter(LoraConfig(rank=2, rank_dropout=0.25)).attach(unet, [tower]))
    layer: Any = next(iter(net.layers.values()))
    assert isinstance(layer, Low)
    x = torch.randn(1, 1, layer.down.shape[1]).expand(6000, 1, -1)
    out = torch.zeros(6000, 1, len(layer.up))
    torch.manual_seed(0)
    found = layer.train()(x, out)
    parts = [layer.scale / 0.75 * (x[0, 0] @ layer.down[i]) * layer.up[:, i] for i in range(2)]
    wanted = [a * parts[0] + b * parts[1] for a in (0, 1) for b in (0, 1)]
    distance = torch.stack([(found[:, 0] - w).norm(dim=1) for w in wanted])
    assert distance.min(0).values.max() < 1e-5
    shares = (distance.argmin(0)[:, None] == torch.arange(4)).float().mean(0)
    assert torch.allclose(shares, torch.tensor([0.0625, 0.1875, 0.1875, 0.5625]), atol=0.02)
