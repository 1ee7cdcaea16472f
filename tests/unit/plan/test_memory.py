"""Planned memory against what torch's allocator gave to real ranks under DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.models.unet import UNet
from ldm.plan.memory import Activations, Layout, Sizes, largest_micro_batch, memory, resting
from ldm.plan.trace import trace
from tests import ranks
from tests.unit.plan import work


def planned(shape: str, layout: Layout, micro: int, recompute: bool) -> tuple[float, float]:
    """(bytes at rest, highest) of a rank on the CPU in float32."""
    config = work.SHAPES[shape]
    with torch.device("meta"):
        unet = UNet(config).train()
    unet.enable_gradient_checkpointing(recompute)
    counted = Activations.count(unet, lambda b: work.inputs(config, b, "meta"), precision=torch.float32, gpu=False)
    parts = memory(Sizes.of(unet), counted, micro, layout)
    return resting(Sizes.of(unet), layout), parts.total


@pytest.mark.parametrize(
    ("shape", "stage", "world", "micro", "accumulate", "recompute"),
    [
        ("wide", 0, 1, 8, 1, False),
        ("deep", 1, 2, 8, 1, False),
        ("wide", 2, 2, 8, 1, True),
        pytest.param("deep", 0, 1, 8, 1, True, marks=pytest.mark.slow),
        pytest.param("wide", 1, 2, 4, 2, False, marks=pytest.mark.slow),
        pytest.param("wide", 2, 2, 8, 1, False, marks=pytest.mark.slow),
        pytest.param("deep", 2, 2, 16, 1, False, marks=pytest.mark.slow),
        pytest.param("deep", 2, 2, 8, 2, False, marks=pytest.mark.slow),
        pytest.param("wide", 3, 2, 8, 1, False, marks=pytest.mark.slow),
        pytest.param("deep", 3, 2, 8, 1, False, marks=pytest.mark.slow),
    ],
)
def test_planned_memory_is_that_of_a_real_run(
    shape: str, stage: int, world: int, micro: int, accumulate: int, recompute: bool
) -> None:
    layout = Layout(stage=stage, world=world, bucket=work.BUCKET, overlap=False, accumulate=accumulate)
    rest, highest = planned(shape, layout, micro, recompute)
    case = (shape, stage, micro, accumulate, recompute)
    for real_rest, real_highest in ranks.run(work.measured, world, *case, timeout=500):
        print(
            f"{shape} stage {stage} x {world}: {highest / real_highest - 1:+.1%}, at rest {rest / real_rest - 1:+.1%}"
        )
        assert highest == pytest.approx(real_highest, rel=0.1)
        assert rest == pytest.approx(real_rest, rel=0.1)


class Chain(nn.Module):
    """Layers whose saved tensors can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_a_chain_keeps_what_its_formula_says() -> None:
    """At the fullest moment, the end of the backward pass of the first layer's input: counted by hand."""
    with torch.device("meta"):
        chain = Chain()

    def inputs(batch: int) -> tuple[Any, ...]:
        return (torch.empty(batch, 64, device="meta"),)

    counted = trace(chain, inputs, 1000, precision=torch.float32, gpu=False)
    products = [op.flops for op in counted.ops if op.flops]
    assert sum(products) == 2 * 1000 * 64 * 256 * (2 + 3)  # forward 2, backward 4 less the gradient of the input
    assert counted.gradients == 2 * 64 * 256 * 4
    hidden, narrow = 1000 * 256 * 4, 1000 * 64 * 4
    # relu's output is kept; its gradient and the one before it live beside it, with what is left of the narrow ones
    assert 3 * hidden <= counted.peak <= 3 * hidden + 3 * narrow + counted.gradients
    twice = trace(chain, inputs, 2000, precision=torch.float32, gpu=False)
    assert twice.peak == pytest.approx(2 * counted.peak, rel=0.05)


def test_one_sample_is_counted_by_itself() -> None:
    """Cast weights are the most at one sample, activations at two and four: the line through these lies below."""

    class Heavy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return checkpoint(self.wide, x, use_reentrant=False)  # type: ignore[return-value]

        @staticmethod
        def wide(y: Tensor) -> Tensor:
            y = y.repeat(1, 512)
            for _ in range(6):
                y = y.sigmoid()
            return (y + 1).sum(1)

    with torch.device("meta"):
        heavy = Heavy()

    def counted(**options: Any) -> Activations:
        inputs = lambda b: (torch.empty(b, 512, device="meta"),)  # noqa: E731
        return Activations.count(heavy, inputs, precision=torch.bfloat16, gpu=True, **options)

    line, exact = counted(), counted(one=True)
    assert exact.peak(1) > 2 * 8 * 512 * 512
    assert exact.peak(1) > 1.05 * line.peak(1)
    assert exact.peak(2) == line.peak(2)
    assert exact.kept(1) >= exact.peak(1)


def test_half_precision_keeps_half_and_recomputing_less() -> None:
    config = work.WIDE
    with torch.device("meta"):
        unet = UNet(config).train()

    def peak(precision: torch.dtype, recompute: bool) -> int:
        unet.enable_gradient_checkpointing(recompute)
        return trace(unet, lambda b: work.inputs(config, b, "meta"), 8, precision=precision, gpu=True).peak

    full, half = peak(torch.float32, False), peak(torch.bfloat16, False)
    assert 0.4 < half / full < 0.85  # norms and sums stay in float32
    assert peak(torch.bfloat16, True) < 0.6 * half


def test_states_by_stage_are_those_of_the_zero_paper() -> None:
    """With half-precision weights: 16 psi, 4 psi + 12 psi/N, 2 psi + 14 psi/N, 16 psi/N bytes (arXiv 1910.02054)."""
    psi, n = 1_000_000, 8
    sizes = Sizes(weights=psi, small=0, largest=1000)
    with torch.device("meta"):
        chain = Chain()
    none = Activations.count(chain, lambda b: (torch.empty(b, 64, device="meta"),), precision=torch.float32, gpu=False)
    for stage, fixed, divided in ((1, 2, 12), (2, 2, 12), (3, 0, 14)):
        parts = memory(sizes, none, 1, Layout(stage=stage, world=n, half=True, copies=0, bucket=1))
        # gradients are 2 psi, 2 psi/N and 2 psi/N of the paper's sums; they are a part of their own here
        assert parts.weights + parts.optimizer == pytest.approx(fixed * psi + divided * psi / n)
    offloaded = memory(sizes, none, 1, Layout(stage=2, world=n, offload_optimizer=True, bucket=1))
    assert offloaded.optimizer == 0
    assert offloaded.host == pytest.approx(12 * psi / n)


def test_what_is_copied_and_kept_whole_is_counted() -> None:
    """One process copies no gradients; stage 3 holds all weights whole, or as many as it is told."""
    psi, sizes = 4_000_000.0, Sizes(weights=1_000_000, small=0, largest=1000)
    none = Activations.count(
        Chain().to("meta"), lambda b: (torch.empty(b, 64, device="meta"),), precision=torch.float32, gpu=False
    )

    def held(**layout: Any) -> float:
        return memory(sizes, none, 1, Layout(bucket=1, overlap=False, copies=0, **layout)).total

    assert held(stage=0, world=2) - held(stage=0, world=1) == pytest.approx(psi)
    whole, few = held(stage=3, world=4), held(stage=3, world=4, live=2000)
    assert whole == pytest.approx((1 + 1 + 1 + 2) * psi / 4 + psi, rel=0.1)  # weights, masters, gradients, moments
    assert few == pytest.approx((1 + 2 + 1 + 2) * psi / 4, rel=0.1)  # and the optimizer's copy of the gradients
    halves = [memory(sizes, none, 1, Layout(stage=1, world=1, moments=m, offload_optimizer=True)).host for m in (2, 1)]
    assert halves[0] - halves[1] == psi


def test_the_largest_micro_batch_is_the_largest() -> None:
    config = work.DEEP
    with torch.device("meta"):
        unet = UNet(config).train()
    counted = Activations.count(unet, lambda b: work.inputs(config, b, "meta"), precision=torch.bfloat16, gpu=True)
    sizes, layout = Sizes.of(unet), Layout(stage=1, world=8)
    limit = 1.5e9
    most = largest_micro_batch(sizes, counted, layout, limit)
    assert memory(sizes, counted, most, layout).total <= limit < memory(sizes, counted, most + 1, layout).total
    assert largest_micro_batch(sizes, counted, layout, 1e6) == 0


def test_a_weight_that_was_cast_without_a_gradient_has_one_later() -> None:
    """As under torch's autocast: a network that first runs without gradients (a student's own steps) trains whole."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.layer(x)
            return self.layer(x)

    with torch.device("meta"):
        network = Twice()
    found = trace(network, lambda b: (torch.empty(b, 8, device="meta"),), 2, precision=torch.bfloat16, gpu=True)
    assert found.gradients == 4 * (8 * 8 + 8)


class Again(nn.Module):
    """Square layers, each computed again in the backward pass."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)  # type: ignore[assignment]
        return x


def test_casts_of_what_is_computed_again_end_with_it() -> None:
    """A GPU's autocast keeps a bfloat16 copy of each trained weight to the end of the forward pass, and in the backward
    pass of one layer at a time: beside all gradients then, of float32, there are two of one layer."""
    layers, width = 6, 1024
    weight = width * width
    with torch.device("meta"):
        network = Again(layers, width)
    inputs = lambda b: (torch.empty(b, width, device="meta"),)  # noqa: E731
    found = trace(network, inputs, 1, precision=torch.bfloat16, gpu=True)
    small = 0.02 * weight
    assert found.peak == pytest.approx(2 * layers * weight, abs=2 * small)
    # The last layer's gradient in bfloat16 and in float32, its weight's copy, and all the others' gradients.
    assert 4 * layers * weight < found.peak_kept < 4 * layers * weight + 4 * weight + small
