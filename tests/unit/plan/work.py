"""What a real rank allocates: its tensors between steps, and what torch's allocator gives out and takes within one.

Not the allocator's events alone, from the first on: the profiler does not see all that comes back (of several ranks
their sum grew from step to step, by other amounts in every run, while the tensors stayed the same).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.unet import UNet, UNetConfig
from ldm.objectives import Objective
from ldm.rng import Rng
from ldm.train.ema import Ema, EmaConfig
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
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
    """(bytes at rest after two steps, highest bytes of the second one) of a U-Net alone on this rank."""
    config = SHAPES[shape]

    def make() -> tuple[Objective, Batch, Any]:
        unet = UNet(config).train()
        for p in unet.parameters():
            nn.init.normal_(p, std=0.02)
        unet.enable_gradient_checkpointing(recompute)
        x, t, cond = inputs(config, micro, "cpu")
        return Squares(unet), {"x": x, "t": t, **cond}, None

    return _measured(make, EngineConfig(zero_stage=stage, precision="fp32", bucket=BUCKET), micro, accumulate)


def measured_task(path: str, micro: int) -> tuple[int, int]:
    """The same of a run's own objective, with all that its recipe keeps beside it, on a batch as a cache gives it."""
    from ldm.config.schema import load_run
    from ldm.recipes import assemble, plan_job, planned_models
    from ldm.recipes.planned import Asked, latents
    from ldm.recipes.text_to_image import TextToImageTask

    run = load_run(path)
    if isinstance(run.task, TextToImageTask):
        planned = latents(planned_models.whole(run.task.vae, "task.vae", []), run.data, micro)
    else:
        planned = plan_job(run.task, run.data, run.train, Asked(name=run.name, world=1, gpu=False)).inputs(micro)[0]

    def make() -> tuple[Objective, Batch, Any]:
        assembly = assemble(run.task, run.data, run.train, 0, 0)
        batch: Any = {k: _filled(k, v) if isinstance(v, Tensor) else v for k, v in planned.items()}
        return assembly.objective.train(), batch, assembly

    return _measured(make, run.train.engine, micro, 1)


def _filled(key: str, like: Tensor) -> Tensor:
    """Zeros, and a mask that shows every token."""
    return (torch.ones_like if key.startswith("mask") else torch.zeros_like)(like, device="cpu")


def _measured(
    make: Callable[[], tuple[Objective, Batch, Any]], config: EngineConfig, micro: int, accumulate: int
) -> tuple[int, int]:
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    held = rest = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective, batch, kept = make()
        engine = Engine(
            objective, Optim().build(objective.parameters()), config, micro_batch=micro, accumulate=accumulate
        )
        ema = Ema(EmaConfig(), engine.masters)
        for step in range(2):
            if step == 1:
                held = tensors()
                with torch.profiler.record_function("second step"):
                    pass
            for _ in range(accumulate):
                loss, _ = engine.forward(batch, Rng.of(0, range(micro)))
                engine.backward_step(loss)
                del loss
            ema.update(engine.masters, step + 1)
        rest = tensors()
    del kept
    live, peak, began = 0, 0, None
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "second step":
            began, peak = live, live
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert began is not None
    return rest, held + peak - began


def tensors() -> int:
    """Bytes of the storages of all tensors that there are."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
