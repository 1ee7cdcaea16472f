"""Small networks on 2 ranks: the collectives of a step are few, and no more in a larger network; nothing else changes.

The oracle of the arithmetic is DeepSpeed's own path, which a bucket smaller than the network takes: equal bit by bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from ldm import dist
from ldm.objectives import Objective
from ldm.rng import Rng
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from ldm.train.optim import Optim
from ldm.types import Batch, Metrics
from tests import ranks

WIDTH, STEPS, MICRO = 101, 3, 2
"""101: neither weights nor biases divide over 2 ranks; a layer's weights are above the 10,000 that stage 3 divides."""
CALLS = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")


class Layers(Objective):
    """So many layers."""

    def __init__(self, depth: int) -> None:
        torch.manual_seed(3)
        super().__init__(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth)))

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        x = batch["x"]
        for layer in list(self.trained.children()):
            x = layer(x).tanh()
        return (x - batch["x"].roll(1, 1)).square().mean(), {}


def train(stage: int, depth: int, bucket: int, accumulate: int, clip: float, **more: Any) -> dict[str, Any]:
    """Losses, norms and weights of a short training, and the collectives of its last step; NaN in step `bad`."""
    calls, bad = more.get("calls", Counter()), more.get("bad", -1)
    objective = Layers(depth)
    config = EngineConfig(zero_stage=stage, precision="fp32", clip=clip, bucket=bucket)
    optimizer = Optim(lr=1e-2, eps=1e-6, weight_decay=0.1).build(objective.parameters())
    engine = Engine(objective, optimizer, config, micro_batch=MICRO, accumulate=accumulate)
    losses, norms, updated = [], [], []
    for step in range(STEPS):
        calls.clear()
        for micro in range(accumulate):
            first = ((step * accumulate + micro) * dist.world_size() + dist.rank()) * MICRO
            positions = list(range(first, first + MICRO))
            x = Rng.of(4, positions).normal("x", (WIDTH,))
            if step == bad and dist.rank() == 1:
                x = x * float("nan")
            batch = {"x": x, "position": torch.tensor(positions)}
            loss, _ = engine.forward(batch, Rng.of(0, batch["position"]))
            now = engine.backward_step(loss)
            losses.append(float(loss))
        updated.append(now)
        norms.append(engine.grad_norm)
    counted = dict(calls)
    masters = dict(engine.full(engine.masters))
    whole = dict(engine.whole())
    moments = dict(engine.full([engine.inner.state[m]["exp_avg"] for m in engine.masters]))
    return {
        "losses": losses, "norms": norms, "updated": updated, "calls": counted, "masters": masters, "whole": whole,
        "moments": moments, "flat": engine._flat is not None,
    }  # fmt: skip


def counting() -> Counter[str]:
    """From now on calls of collectives are counted; before the first engine, which keeps some of them."""
    counted: Counter[str] = Counter()
    inside: list[str] = []  # a collective may call another

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def one(*args: Any, **kwargs: Any) -> Any:
            counted[name] += not inside
            inside.append(name)
            try:
                return call(*args, **kwargs)
            finally:
                inside.pop()

        return one

    for name in CALLS:
        setattr(torch.distributed, name, wrapped(name, getattr(torch.distributed, name)))
    return counted


LARGE = EngineConfig().bucket
CASES = [(stage, accumulate, clip) for stage in (0, 1, 2) for accumulate, clip in ((1, 0.05), (3, 0.0))]


def compare() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each case with a bucket that holds the network and with one that does not."""
    small = WIDTH * WIDTH + 1
    return [(train(s, 3, LARGE, a, c), train(s, 3, small, a, c)) for s, a, c in CASES]


def test_losses_norms_weights_and_moments_are_deepspeeds_bit_by_bit() -> None:
    for found in ranks.run(compare, 2):
        for (stage, accumulate, _), (own, theirs) in zip(CASES, found, strict=True):
            assert own["flat"]
            assert not theirs["flat"]
            for key in ("losses", "norms"):
                assert own[key] == theirs[key], (stage, accumulate, key)
            for key in ("masters", "whole", "moments"):
                for name, value in theirs[key].items():
                    assert torch.equal(own[key][name], value), (stage, accumulate, key, name)
            for name, value in own["masters"].items():
                assert torch.equal(own["whole"][name], value), (stage, accumulate, name)


def steps_of_stages() -> dict[tuple[int, int], dict[str, int]]:
    calls = counting()
    return {(s, depth): train(s, depth, LARGE, 1, 1.0, calls=calls)["calls"] for s in range(4) for depth in (3, 8)}


def test_collectives_of_a_step_are_few_and_do_not_grow_with_the_network() -> None:
    """Two groups of weights (with and without decay): each rank's part of both is reduced at once."""
    expected = {
        0: {"all_reduce": 1},
        1: {"reduce": 2, "all_reduce": 1, "broadcast": 4},
        2: {"reduce": 2, "all_reduce": 1, "broadcast": 4},
        # all divided weights before the first layer, and after the step those that are whole between steps
        3: {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 1, "all_reduce": 2},
    }
    for found in ranks.run(steps_of_stages, 2):
        for (stage, depth), calls in found.items():
            assert {name: count for name, count in calls.items() if count} == expected[stage], (stage, depth)


def bad_steps() -> list[dict[str, Any]]:
    return [train(stage, 3, LARGE, 2, 0.05, bad=1) for stage in range(3)]


def test_a_step_that_is_not_finite_on_one_rank_is_none() -> None:
    for found in ranks.run(bad_steps, 2):
        for stage, story in enumerate(found):
            assert story["updated"] == [True, False, True], stage
            assert all(value.isfinite().all() for value in story["masters"].values())
