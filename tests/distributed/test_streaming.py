"""LoRA training over a network whose blocks come and go: the same losses and weights, bit by bit, at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm import dist
from ldm.adapters.lora import LoraAdapter, LoraConfig
from ldm.models.streaming import stream
from ldm.objectives.base import Objective
from ldm.rng import Rng
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from ldm.types import Batch, Metrics
from tests import ranks
from tests.counting import Counted
from tests.unit.models.test_network import NETS, inputs

FAMILIES = ("unet", "unet, told sizes", "sd3", "flux", "pixart", "zimage")
STEPS = 3


class Fit(Objective):
    """A network's answers to other inputs at every step, squared."""

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        network: Any = self.trained
        x, t, cond = inputs(network.network)
        torch.manual_seed(rng.seed)
        out = network(x + torch.randn_like(x), t, cond)
        return (out.float() - batch["wanted"]).square().mean(), {}


def trained(family: str, blocks: int | None, recompute: Any, stage: int, precision: Any) -> dict[str, Any]:
    """Losses and weights of a few steps, and the most blocks that were held and how many were fetched a step."""
    torch.manual_seed(0)
    network, device = NETS[family](), Counted()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    network.requires_grad_(False)
    streaming = None if blocks is None else stream(network, blocks, "cpu", device)
    torch.manual_seed(7)
    net = LoraAdapter(LoraConfig(rank=2)).attach(network, [])
    network.enable_gradient_checkpointing(recompute)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    config = EngineConfig(zero_stage=stage, precision=precision, blocks_on_device=blocks)
    engine = Engine(Fit(net), optimizer, config, micro_batch=2, accumulate=1)
    losses, fetched = [], []
    for step in range(STEPS):
        before = len(device.sizes)
        loss, _ = engine.forward({"wanted": 1.0}, Rng.of(10 * step + dist.rank(), [0]))
        losses.append(float(loss.detach()))
        assert engine.backward_step(loss)
        fetched.append(len(device.sizes) - before)
    weights = {name: value.clone() for name, value in engine.whole()}
    moving = 0 if streaming is None else len(streaming.moving)
    assert all(p.requires_grad for p in net.parameters())
    return {"losses": losses, "weights": weights, "most": device.most, "fetched": fetched[-1], "moving": moving}


def runs(cases: list[tuple[str, int | None, Any, int, Any]]) -> list[dict[str, Any]]:
    """Several trainings in one process of each rank."""
    torch.use_deterministic_algorithms(True)
    return [trained(*case) for case in cases]


def check(world: int, family: str, stage: int, precision: str = "fp32", recompute: Any = "block") -> None:
    blocks = (1,) if family == "pixart" else (1, 2)  # of whose blocks there are two
    ways: list[tuple[int | None, Any]] = [(None, "none"), *((n, how) for n in blocks for how in ("none", recompute))]
    for results in ranks.run(runs, world, [(family, n, how, stage, precision) for n, how in ways]):
        whole, *others = results
        assert whole["most"] == 0
        assert len(set(whole["losses"])) == STEPS
        assert any(value.abs().max() > 0 for name, value in whole["weights"].items() if name.endswith("up"))
        for (n, how), other in zip(ways[1:], others, strict=True):
            assert other["losses"] == whole["losses"], (n, how)
            assert all(torch.equal(other["weights"][k], v) for k, v in whole["weights"].items()), (n, how)
            assert other["most"] == n
            assert other["fetched"] == 2 * (other["moving"] - n)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    check(1, family, 0)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("family", ["unet", "flux"])
def test_stages_on_two_ranks(family: str, stage: int) -> None:
    check(2, family, stage)


def test_parts_of_a_block_are_computed_again() -> None:
    check(1, "unet", 0, recompute="transformer")


def test_half_precision() -> None:
    """Under autocast, whose copies of weights are made of what was fetched."""
    cases = [("sd3", n, how, 0, "bf16") for n, how in ((None, "none"), (1, "none"), (1, "block"))]
    (found,) = ranks.run(runs, 1, cases)
    assert found[0]["losses"] == found[1]["losses"] == found[2]["losses"]
    assert found[2]["most"] == 1
