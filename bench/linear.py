"""Of linear: two ranks under each ZeRO stage beside one process alone with the same batch a rank, images per second.

Two forms of "alone": one process while the other core idles, and one on each core at once, which share the memory as
the ranks do but send nothing. Alone is the bare loop with our loss (`bench.step.with_objective`), without an engine.
All run in turns on the same two processes. Processor seconds hold on a busy machine too, but not what ranks wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from bench import parts, step
from bench.timing import Spread
from ldm import dist
from ldm.models.unet import UNetConfig
from ldm.rng import Rng
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig

STAGES = (0, 1, 2, 3)
Case = Callable[[], object]


def demo_network() -> UNetConfig:
    """Of `ldm demo`."""
    from ldm.config.schema import load_run
    from ldm.models.shipped import ASSETS

    task: Any = load_run(ASSETS / "demo.yaml", []).task
    return task.unet


def with_engine(config: UNetConfig, size: int, settings: EngineConfig) -> Case:
    """A step of an engine, on all ranks."""
    objective = step.objective_of(config)
    engine = Engine(objective, step.OPTIM.build(objective.parameters()), settings, micro_batch=size, accumulate=1)
    batches = parts.batches(config, size)

    def one() -> float:
        batch = next(batches)
        loss, _ = engine.forward(batch, Rng.of(0, batch["position"]))
        engine.backward_step(loss)
        return loss.item()

    return one


def measure(config: UNetConfig, folder: Path, rounds: int, precision: str, quick: bool) -> dict[str, Any]:
    """Both networks; the demo's at the batch it has and at half of it."""
    networks = {"the shipped model": (config, 2 if quick else 16)}
    if not quick:
        networks |= {f"the demo, {size} a rank": (demo_network(), size) for size in (16, 32)}
    found = {}
    for name, (network, size) in networks.items():
        found[name] = _report(name, size, _seconds(_cases(network, size, precision), rounds, 1 if quick else 3))
    return {"linear": found}


def _cases(config: UNetConfig, size: int, precision: str) -> dict[str, Case]:
    settings = {stage: EngineConfig(zero_stage=stage, precision=cast("Any", precision)) for stage in STAGES}
    bare = step.with_objective(config, size, settings[0].dtype())
    cases: dict[str, Case] = {"alone": bare if dist.rank() == 0 else lambda: None, "beside": bare}
    return cases | {f"ZeRO {stage}": with_engine(config, size, settings[stage]) for stage in STAGES}


def _seconds(cases: dict[str, Case], rounds: int, warmup: int) -> dict[str, torch.Tensor]:
    """By case (rounds, ranks, 2): wall and processor seconds; each round in the opposite order of the one before."""
    names = list(cases)
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        for name in names if i % 2 == 0 else reversed(names):
            dist.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            cases[name]()
            own = torch.tensor([[time.perf_counter() - wall, time.process_time() - processor]], dtype=torch.float64)
            every = dist.gather(own)
            if i >= warmup:
                kept[name].append(every)
    return {name: torch.stack(rows) for name, rows in kept.items()}


def _report(name: str, size: int, seconds: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Images per second of both ranks; shares of linear by round, as the median of the ratios."""
    wall = {case: 1 / (size / of[..., 0]).mean(1) * size for case, of in seconds.items()}  # of a rank, harmonic mean
    wall["alone"] = seconds["alone"][:, 0, 0]
    processor = {case: of[..., 1].mean(1) for case, of in seconds.items()}
    processor["alone"] = seconds["alone"][:, 0, 1]
    found: dict[str, Any] = {}
    for case in seconds:
        found[case] = {
            "images_per_second": _median(dist.world_size() * size / wall[case]),
            "processor_ms_a_rank": 1e3 * _median(processor[case]),
            "of_linear": _median(wall["beside"] / wall[case]),
            "of_linear_alone": _median(wall["alone"] / wall[case]),
            "of_linear_processor": _median(processor["beside"] / processor[case]),
        }
    if dist.rank() == 0:
        print(f"of linear: {name}, {size} samples a rank, {dist.world_size()} ranks ({len(wall['alone'])} rounds)")
        print(f"  {'':<8} {'images/s':>9} {'of beside':>10} {'of alone':>9} {'processor ms':>13} {'of beside':>10}")
        for case, row in found.items():
            print(
                f"  {case:<8} {row['images_per_second']:9.1f} {row['of_linear']:10.3f} {row['of_linear_alone']:9.3f} "
                f"{row['processor_ms_a_rank']:13.1f} {row['of_linear_processor']:10.3f}"
            )
    return found


def _median(values: torch.Tensor) -> float:
    return Spread.of(values.tolist()).median
