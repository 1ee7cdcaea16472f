"""What every planned task shares: how it is divided, its pictures and data, and networks that stay frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.config.schema import RunConfig
    from ldm.plan.memory import Layout
    from ldm.plan.report import Frozen

HOW_MANY = "--samples N tells how many there will be"


def layout(config: RunConfig, world: int, gpu: bool) -> Layout:
    """How the run is divided."""
    from ldm.plan.memory import Layout

    train, engine = config.train, config.train.engine
    return Layout(
        stage=engine.zero_stage,
        world=world,
        half=engine.precision == "fp16",
        copies=0 if train.ema is None else 1 + len(train.ema.others) + len(train.ema.power),
        bucket=engine.bucket,
        overlap=gpu,
        accumulate=train.accumulate,
        offload_optimizer=engine.offload_optimizer,
        offload_parameters=engine.offload_parameters,
    )


def precision(config: RunConfig, gpu: bool) -> Any:
    """What the forward computes in on the planned hardware."""
    import torch

    name = config.train.engine.precision
    if name == "auto":  # the GPUs of the plan have bf16; the CPU counts in float32
        name = "bf16" if gpu else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name] if gpu else torch.float32


def frozen(vae: Any, towers: list[Any], pixels: int, context: int, cached: bool) -> list[Frozen]:
    """The networks that stay on the GPU beside the trained one; they run for each image where nothing is cached."""
    import torch

    from ldm.plan.flops import count_flops
    from ldm.plan.report import Frozen

    def weight(module: Any) -> float:
        return 4.0 * sum(p.numel() for p in module.parameters())

    vae_flops = 0 if cached else count_flops(vae.encode, torch.empty(1, 3, pixels, pixels, device="meta"))
    found = [Frozen(name="vae", bytes=weight(vae), flops=float(vae_flops))]
    for i, tower in enumerate(towers):
        tokens = torch.zeros(1, context, dtype=torch.int64, device="meta")
        flops = 0 if cached else count_flops(tower.model, tokens)
        found.append(Frozen(name=f"text {i + 1}", bytes=weight(tower), flops=float(flops)))
    return found


def pixels(config: RunConfig, otherwise: int) -> int:
    """The side of the pictures."""
    from ldm.data.loader import DataConfig

    return config.data.size if isinstance(config.data, DataConfig) else otherwise


def cached(config: RunConfig) -> bool:
    """Whether the data are encoded already."""
    from ldm.data.loader import DataConfig

    return isinstance(config.data, DataConfig) and config.data.cached


def data(config: RunConfig, encoded: float, cached: bool, said: list[str]) -> tuple[int | None, float]:
    """Samples and bytes of one as training reads it: `encoded` in a cache, else as stored."""
    from ldm.data.loader import DataConfig
    from ldm.data.manifest import Manifest, resolve

    if not isinstance(config.data, DataConfig):
        return None, encoded if cached else 0.0
    try:
        manifest = Manifest.read(resolve(config.data.path), config.data.remote)
    except (ValueError, OSError) as error:
        said.append(f"{error}; {HOW_MANY}")
        return None, encoded
    shards = manifest.split(config.data.split)
    samples = sum(s.samples for s in shards)
    if cached and manifest.cached is None:
        return samples, encoded
    return samples, sum(s.bytes for s in shards) / max(1, samples)
