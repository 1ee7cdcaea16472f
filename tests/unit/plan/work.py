"""What a real rank allocates: all that torch's allocator gave out less what came back, from the first tensor on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.unet import UNet, UNetConfig
from ldm.objectives import Objective
from ldm.rng import Rng
from ldm.train.ema import Ema, EmaConfig
from ldm.train.engine import Engine, EngineConfig
from ldm.train.optim import Optim
from ldm.types import Batch, Metrics

WIDE = UNetConfig(
    sample_size=16,
    block_out_channels=(64, 128),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=32,
    attention_head_dim=2,
)
DEEP = UNetConfig(
    sample_size=8,
    block_out_channels=(64, 128, 256),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=48,
    attention_head_dim=4,
    use_linear_projection=True,
)
SHAPES = {"wide": WIDE, "deep": DEEP}
TOKENS = 8
BUCKET = 200_000


class Squares(Objective):
    """Mean square of the network's answer: its loss needs no memory of its own."""

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        out = self.trained(batch["x"], batch["t"], {"text": batch["text"]})
        return (out.float() ** 2).mean(), {}


def inputs(config: UNetConfig, batch: int, device: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Arguments of the U-Net, zeros."""
    side, width = config.sample_size or 0, config.per_level("cross_attention_dim")[0]
    x = torch.zeros(batch, config.in_channels, side, side, device=device)
    return x, torch.zeros(batch, device=device), {"text": torch.zeros(batch, TOKENS, width, device=device)}


def measured(shape: str, stage: int, micro: int, accumulate: int, recompute: bool) -> tuple[int, int]:
    """(bytes at rest after two steps, highest bytes of the second one) on this rank."""
    from torch.profiler import ProfilerActivity, profile

    config = SHAPES[shape]
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        unet = UNet(config).train()
        for p in unet.parameters():
            nn.init.normal_(p, std=0.02)
        unet.enable_gradient_checkpointing(recompute)
        objective = Squares(unet)
        engine = Engine(
            objective, Optim().build(objective.parameters()),
            EngineConfig(zero_stage=stage, precision="fp32", bucket=BUCKET),
            micro_batch=micro, accumulate=accumulate,
        )  # fmt: skip
        ema = Ema(EmaConfig(), engine.masters)
        x, t, cond = inputs(config, micro, "cpu")
        batch: Any = {"x": x, "t": t, **cond}
        for step in range(2):
            if step == 1:
                with torch.profiler.record_function("second step"):
                    pass
            for _ in range(accumulate):
                loss, _ = engine.forward(batch, Rng.of(0, [0]))
                engine.backward_step(loss)
                del loss
            ema.update(engine.masters, step + 1)
    live, peak, began = 0, 0, None
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "second step":
            began, peak = live, live
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert began is not None
    return live, peak
