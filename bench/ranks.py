"""Several processes: DeepSpeed against DDP on 2 ranks and what of linear they reach, a checkpoint's pause, resuming.

Every rank is pinned to a core of its own where there are enough. The peer is torch's DistributedDataParallel around the
same objective with the same optimizer and clipping.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed

from bench import linear, parts, step
from bench.timing import Options, Spread, interleaved, ratio, report
from ldm import dist
from ldm.models.unet import UNetConfig
from ldm.rng import Rng
from ldm.train import engine as engines
from ldm.train import state
from ldm.train.ema import EmaConfig
from ldm.train.engine_config import EngineConfig
from ldm.train.trainer import CheckpointConfig, TrainConfig, Trainer


def run(options: Options) -> dict[str, Any]:
    """Start the ranks of each case, one case after the other."""
    with tempfile.TemporaryDirectory() as folder:
        shared = ["--quick"] if options.quick else []
        result: dict[str, Any] = {}
        for world, case in [(2, "peer"), (2, "linear"), (1, "pause"), (1, "resume"), (2, "resume"), (4, "resume")]:
            rounds = str(options.times(10 if case in ("peer", "linear") else 5))
            found = _start(world, [case, folder, rounds, options.precision, *shared])
            result |= found if case in ("peer", "linear") else {f"{case} {world}": found}
    over = result["deepspeed_over_ddp_percent"]
    print(
        "  DeepSpeed over DDP on 2 ranks: " + ", ".join(f"{stage} {percent:+.1f} %" for stage, percent in over.items())
    )
    for name, value in result.items():
        if name.startswith(("pause", "resume")):
            print(f"  {name} rank(s): " + ", ".join(f"{k} {v:.3g}" for k, v in value.items()))
    return result


def _start(world: int, arguments: list[str]) -> dict[str, Any]:
    """Run this module on so many ranks; what rank 0 wrote last."""
    with tempfile.TemporaryDirectory() as store:
        ranks = []
        for rank in range(world):
            env = os.environ | {
                "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            argv = [sys.executable, "-m", "bench.ranks", f"{store}/store", *arguments]
            ranks.append(subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True))
        said = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"a rank failed: {[process.returncode for process in ranks]}")
    *shown, last = said[0].splitlines()
    print("\n".join(shown))
    return json.loads(last)


def main(argv: list[str]) -> None:
    """One rank."""
    store, case, folder, rounds, precision, *rest = argv
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = range(os.cpu_count() or 1)
        os.sched_setaffinity(0, {cores[dist.rank() % len(cores)]})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=dist.rank(), world_size=dist.world_size()
    )
    engines.start()
    config = parts.unet_config("--quick" in rest)
    cases = {"peer": peer, "linear": linear.measure, "pause": pause, "resume": resume}
    found = cases[case](config, Path(folder), int(rounds), precision, "--quick" in rest)
    if dist.rank() == 0:
        print(json.dumps(found))


def peer(config: UNetConfig, folder: Path, rounds: int, precision: str, quick: bool) -> dict[str, Any]:
    """A step of DDP and of the engine at stages 0 to 2, in turns on the same ranks."""
    size = 2 if quick else 16
    dtype = EngineConfig(precision=cast("Any", precision)).dtype()
    cases: dict[str, Callable[[], object]] = {"DDP": _ddp(config, size, dtype)}
    for stage in (0, 1, 2):
        cases[f"ZeRO {stage}"] = linear.with_engine(
            config, size, EngineConfig(zero_stage=stage, precision=cast("Any", precision))
        )
    seconds = interleaved(cases, rounds, warmup=1 if quick else 2)
    if dist.rank():
        return {}
    title = f"a step on {dist.world_size()} ranks, {size} samples each, {str(dtype).removeprefix('torch.')}"
    result = report(title, seconds, [(f"ZeRO {stage}", "DDP") for stage in (0, 1, 2)])
    over = {name: (ratio(seconds, name, "DDP").median - 1) * 100 for name in cases if name != "DDP"}
    return result | {"deepspeed_over_ddp_percent": over}


def _ddp(config: UNetConfig, size: int, dtype: torch.dtype) -> Callable[[], object]:
    objective = step.objective_of(config)
    model = torch.nn.parallel.DistributedDataParallel(objective)
    optimizer = step.OPTIM.build(objective.parameters())
    batches = parts.batches(config, size)

    def one() -> float:
        batch = next(batches)
        with step.compute(dtype):
            loss, _ = model(batch, Rng.of(0, batch["position"]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), step.CLIP)
        optimizer.step()
        return loss.item()

    return one


def _trainer(config: UNetConfig, folder: Path, size: int, asynchronous: bool = True) -> Trainer:
    train = TrainConfig(
        steps=10**9, batch=size, optim=step.OPTIM, engine=EngineConfig(zero_stage=2), ema=EmaConfig(),
        checkpoint=CheckpointConfig(keep=1, asynchronous=asynchronous),
    )  # fmt: skip
    objective = step.objective_of(config)
    return Trainer(train, objective, cast("Any", None), folder, seed=0, settings={})


def pause(config: UNetConfig, folder: Path, rounds: int, precision: str, quick: bool) -> dict[str, Any]:
    """How long training waits for a checkpoint that is written beside it, of the time that one takes in all."""
    trainer = _trainer(config, folder, 4)
    batches: Any = parts.batches(config, 4)
    batch = next(batches)
    loss, _ = trainer.engine.forward(batch, Rng.of(0, batch["position"]))
    trainer.engine.backward_step(loss)
    waits, wholes, sizes = [], [], 0
    for _ in range(rounds):
        trainer.step += 1
        began = time.perf_counter()
        trainer.save()
        waits.append(time.perf_counter() - began)
        trainer.writer.finish()
        wholes.append(time.perf_counter() - began)
        sizes = state.hold(0, trainer.engine, trainer.ema, {}).bytes
    return {"pause_seconds": Spread.of(waits).median, "whole_seconds": Spread.of(wholes).median, "mb": sizes / 1e6}


def resume(config: UNetConfig, folder: Path, rounds: int, precision: str, quick: bool) -> dict[str, Any]:
    """From the folder to an engine that is ready, hashes checked; the checkpoint is that of `pause`, of one rank."""
    trainer = _trainer(config, folder, 4 * dist.world_size())
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        trainer.resume()
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    return {"seconds": Spread.of(seconds).median}


if __name__ == "__main__":
    main(sys.argv[1:])
