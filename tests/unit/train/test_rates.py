"""Rates by part: which parameter has which rate, LoRA+ against plain loops, what names nothing that trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.lora import LoraAdapter, LoraConfig
from ldm.models.unet import UNet
from ldm.rng import Rng
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from ldm.train.optim import Optim
from ldm.train.rates import Rates
from tests import ranks
from tests.distributed import tiny


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("trained.layers.unet/down_blocks/0/attentions/0/to_q.down", 0.5),
        ("trained.layers.unet/down_blocks/0/attentions/0/to_q.up", 8.0),
        ("trained.layers.unet/down_blocks/0/resnets/0/conv1.down", 0.25),
        ("trained.layers.unet/down_blocks/10/resnets/0/conv1.down", 1.0),
        ("trained.layers.unet/mid_block/attentions/0/to_q.down", 0.0),
        ("trained.layers.text_encoder/text_model/encoder/layers/0/q_proj.down", 2.0),
        ("trained.layers.text_encoder_2/text_model/encoder/layers/0/q_proj.up", 48.0),
        ("trained.lora.layers.unet/down_blocks/0/attentions/0/to_q.up", 8.0),
        ("trained.down_blocks.0.resnets.0.conv1.weight", 0.25),
        ("trained.unet.down_blocks.0.resnets.0.conv1.weight", 0.25),
        ("trained.text.0.transformer.resblocks.0.ln_1.weight", 2.0),
        ("trained.text.1.token_embedding.weight", 3.0),
        ("trained.conv_in.weight", 1.0),
    ],
)
def test_share_of_a_name(name: str, share: float) -> None:
    blocks = {"down_blocks.0": 0.25, "unet.down_blocks.0.attentions": 0.5, "mid_block": 0.0}
    assert Rates(text=(0.2, 0.3), lora_plus=16.0, blocks=blocks).share(name, 0.1) == pytest.approx(share)


def test_one_rate_of_text_encoders_is_all_of_theirs() -> None:
    rates = Rates(text=0.05)
    assert rates.share("trained.text.1.x.weight", 0.1) == 0.5
    assert rates.share("trained.mid_block.x.weight", 0.1) == 1.0


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        (Rates(text=1e-5), "rates.text: 1e-05, but no text encoder trains"),
        (Rates(lora_plus=4.0), "rates.lora_plus: 4.0, but no LoRA trains"),
        (Rates(blocks={"down_block": 0.5}), "blocks.down_block: no layer that trains begins so; .*: down_blocks.0, "),
    ],
)
def test_what_does_not_train_is_refused(rates: Rates, told: str) -> None:
    model = tiny.build()
    names = {p: n for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=told):
        Optim(rates=rates).build(model.parameters(), names=names)


@pytest.mark.parametrize("algorithm", ["muon", "prodigy"])
def test_algorithms_of_one_rate_refuse_parts(algorithm: Any) -> None:
    with pytest.raises(ValueError, match=f"rates: algorithm '{algorithm}' has one rate"):
        Optim(algorithm=algorithm, lr=1.0, rates=Rates(lora_plus=2.0))


def test_lora_plus_is_two_optimizers() -> None:
    """The U-Net's LoRA by one AdamW of parts and by two of torch's, each with its rate, over one set of gradients."""
    networks = []
    for _ in range(2):
        torch.manual_seed(1)
        networks.append(LoraAdapter(LoraConfig(rank=2, targets=("attention",))).attach(UNet(tiny.UNET), []))
    (first, a), (second, b) = ((net, dict(net.named_parameters())) for net in networks)
    assert [n for n in a if n.endswith(".up")]
    names = {p: f"trained.{n}" for n, p in a.items()}
    ours = Optim(lr=0.01, weight_decay=0.1, rates=Rates(lora_plus=16.0)).build(first.parameters(), names=names)
    theirs = [
        torch.optim.AdamW([p for n, p in b.items() if n.endswith(".down")], lr=0.01, weight_decay=0.1),
        torch.optim.AdamW([p for n, p in b.items() if n.endswith(".up")], lr=0.16, weight_decay=0.1),
    ]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for n in a:
            a[n].grad = torch.randn(a[n].shape, generator=generator)
            b[n].grad = a[n].grad.clone()
        for group in ours.param_groups:
            group["lr"] = 0.01 * group["share"]
        ours.step()
        for one in theirs:
            one.step()
    assert second is not first
    assert tiny.worst(dict(a), dict(b)) < 1e-6


def divided(stage: int) -> dict[str, Tensor]:
    """How much each parameter moved in a step, and rates that the engine set."""
    objective = tiny.build()
    before = {n: p.detach().clone() for n, p in objective.named_parameters()}
    optim = Optim(lr=1e-3, eps=1e-15, weight_decay=0.0, rates=Rates(blocks={"down_blocks": 0.0, "mid_block": 10.0}))
    optimizer = optim.build(objective.parameters(), names={p: n for n, p in objective.named_parameters()})
    engine = Engine(objective, optimizer, EngineConfig(zero_stage=stage, precision="fp32", clip=0.0), micro_batch=4,
                    accumulate=1)  # fmt: skip
    engine.set_lr(1e-3)
    batch = tiny.micro_batches(0, torch.distributed.get_rank(), 2, 1)[0]

    loss, _ = engine.forward(batch, Rng.of(tiny.SEED, batch["position"]))
    engine.backward_step(loss)
    return {n: (p - before[n]).abs().max() for n, p in engine.full(engine.masters)}


def test_rates_by_block_under_zero_2() -> None:
    """AdamW's first step moves each weight by its rate."""
    for moved in ranks.run(divided, 2, 2):
        for name, far in moved.items():
            part = name.removeprefix("trained.").split(".")[0]
            assert float(far) == pytest.approx({"down_blocks": 0.0, "mid_block": 1e-2}.get(part, 1e-3), rel=1e-2)


def test_alike_rates_leave_the_groups_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.GroupNorm(1, 2))
    assert [g.get("share") for g in Optim().build(model.parameters()).param_groups] == [None, None]
