"""The engine on one rank, of NCCL on a card: every ZeRO stage, offloading, fp16's scale, an exact resume."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.rng import Rng
from ldm.types import Batch
from tests.devices import DEVICES, alone
from tests.distributed import tiny

STEPS = 3


def collectives(device: str) -> dict[str, Any]:
    """What each gives on one rank."""
    from ldm import dist

    if not dist.initialized():
        dist.join()
    group, x = torch.distributed, torch.arange(6.0, device=device).view(2, 3)
    summed, sent, gathered, scattered = x.clone(), x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    group.all_reduce(summed)
    group.broadcast(sent, 0)
    group.all_gather_into_tensor(gathered, x)
    group.reduce_scatter_tensor(scattered, x)
    group.barrier()
    return {
        "x": x.cpu(),
        "results": [v.cpu() for v in (summed, sent, gathered, scattered, dist.gather(x), dist.mean(x))],
        "numbers": (dist.sums([0.1, 0.2]), dist.from_first(2**40 + 1), dist.any_rank(True), dist.any_rank(False)),
        "rows": [v.cpu() for v in dist.gather_rows(x, [1])],
        "backend": group.get_backend(),
        "device": dist.device().type,
    }


@pytest.mark.parametrize("device", DEVICES)
def test_collectives_of_one_rank_change_nothing(device: str) -> None:
    found = alone(device, collectives)
    assert (found["backend"], found["device"]) == (("gloo", "cpu") if device == "cpu" else ("nccl", "cuda"))
    assert all(torch.equal(v, found["x"]) for v in found["results"])
    assert found["numbers"] == ([0.1, 0.2], 2**40 + 1, True, False)
    assert torch.equal(found["rows"][0], found["x"][:1])


def trained(device: str, config: dict[str, Any]) -> dict[str, Any]:
    """Losses and weights of some steps at a stage, which one process otherwise runs as stage 0."""
    from ldm.train.engine import Engine
    from ldm.train.engine_config import EngineConfig

    EngineConfig.effective = lambda self, world: self  # type: ignore[method-assign]
    objective = tiny.build().to(device)
    settings = EngineConfig(clip=tiny.CLIP, precision="fp32", tf32=False, **config)
    optimizer = tiny.OPTIM.build(objective.parameters())
    engine = Engine(objective, optimizer, settings, micro_batch=tiny.BATCH, accumulate=1)
    losses, norms = [], []
    for step in range(STEPS):
        engine.set_lr(tiny.OPTIM.lr_at(step, tiny.STEPS))
        batch = tiny.rows(step, list(range(tiny.BATCH)))
        loss, _ = engine.forward(batch, Rng.of(tiny.SEED, batch["position"]))
        assert engine.backward_step(loss)
        losses.append(float(loss.detach()))
        norms.append(engine.grad_norm)
    full = {n: v.clone() for n, v in engine.full(engine.masters)}
    held = {m.device.type for m in engine.masters}
    return {"losses": losses, "norms": norms, "full": full, "held": held, "device": engine.device.type}


@pytest.fixture(scope="module")
def oracle() -> tiny.Plain:
    return tiny.plain(STEPS)


OFFLOADED = {"offload_optimizer": True, "offload_parameters": True}
WAYS: dict[str, dict[str, Any]] = {
    **{f"stage {stage}": {"zero_stage": stage} for stage in range(4)},
    "optimizer of stage 2 in the host's memory": {"zero_stage": 2, "offload_optimizer": True},
    "all of stage 3 in the host's memory": {"zero_stage": 3, **OFFLOADED},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_stage_of_one_rank_is_plain_pytorch(oracle: tiny.Plain, device: str, way: str) -> None:
    pytest.importorskip("deepspeed")
    found = alone(device, trained, WAYS[way])
    close = 1e-5 if device == "cpu" else 1e-4
    assert found["device"] == device
    assert found["held"] == {"cpu" if "memory" in way else device}
    assert found["losses"] == pytest.approx(oracle.losses, rel=close)
    assert found["norms"] == pytest.approx(oracle.norms, rel=10 * close)
    assert tiny.worst(found["full"], oracle.weights[-1]) < 10 * close


class Rows:
    """Batches by step."""

    def batches(self, start: int) -> Iterator[Batch]:
        while True:
            yield tiny.rows(start, list(range(tiny.BATCH)))
            start += 1


def resumed(device: str, folder: str, steps: int, precision: Any) -> dict[str, Any]:
    """A run of the trainer that goes on where its folder is; what it ends with."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    from ldm.train.engine_config import EngineConfig
    from ldm.train.log import LogConfig
    from ldm.train.trainer import CheckpointConfig, TrainConfig, Trainer

    config = TrainConfig(
        steps=steps, batch=tiny.BATCH, optim=tiny.OPTIM, ema=tiny.EMA,
        engine=EngineConfig(precision=precision, clip=tiny.CLIP),
        checkpoint=CheckpointConfig(every=3, keep=1), log=LogConfig(every=1, tensorboard=False),
    )  # fmt: skip
    rows: Any = Rows()
    run = Trainer(config, tiny.build().to(device), rows, Path(folder), seed=tiny.SEED, settings="")
    began = run.step
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert run.run([]) == 0
    assert run.ema is not None
    parts = [*run.engine.masters, *run.ema.shards, *(run.engine.inner.state[m]["exp_avg"] for m in run.engine.masters)]
    return {"began": began, "parts": [p.detach().cpu().clone() for p in parts], "device": run.engine.device.type}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_ends_with_the_same_bits(device: str, precision: str, tmp_path: Path) -> None:
    """Weights, averages and moments."""
    pytest.importorskip("deepspeed")
    whole = alone(device, resumed, str(tmp_path / "whole"), 6, precision)
    first = alone(device, resumed, str(tmp_path / "parts"), 3, precision)
    parts = alone(device, resumed, str(tmp_path / "parts"), 6, precision)
    assert (whole["began"], first["began"], parts["device"]) == (0, 0, device)
    same = [torch.equal(a, b) for a, b in zip(whole["parts"], parts["parts"], strict=True)]
    assert all(same), f"{same.count(False)} of {len(same)} tensors differ"
    moved = [not torch.equal(a, b) for a, b in zip(first["parts"], parts["parts"], strict=True)]
    assert any(moved), "the second half trained nothing"


def overflowing(device: str, folder: str, steps: int) -> dict[str, Any]:
    """fp16 in a fresh process; the CPU's form tells DeepSpeed that it may."""
    from tests.distributed import test_half

    return test_half.trained(1, folder, steps, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_fp16_skips_what_overflows_and_halves_its_scale(device: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from tests.distributed.test_half import OVERFLOWS, POWER
    from tests.distributed.test_half import STEPS as ALL

    found = alone(device, overflowing, str(tmp_path), ALL)
    assert found["stepped"] == [i not in OVERFLOWS for i in range(ALL)]
    assert found["skipped"] == len(OVERFLOWS)
    assert found["scale"] < 2.0**POWER
    for i in OVERFLOWS:
        assert torch.equal(found["masters"][i], found["masters"][i - 1])
    good = [i for i in range(1, ALL) if i not in OVERFLOWS]
    assert all(not torch.equal(found["masters"][i], found["masters"][i - 1]) for i in good)
