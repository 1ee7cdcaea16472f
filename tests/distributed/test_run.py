"""Runs on two ranks: saving fails on all or on none, averages of every kind are the same at every stage, validation."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import dist
from ldm.checkpoint import files
from ldm.checkpoint.lock import LockLost
from ldm.diffusion.density import LogitNormal
from ldm.diffusion.prediction import Velocity
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Flow
from ldm.train import state
from ldm.train.chosen import choose
from ldm.train.config import ValidateConfig
from ldm.train.ema import EmaConfig
from ldm.train.engine_config import EngineConfig
from ldm.train.guards import GuardConfig
from ldm.train.log import LogConfig
from ldm.train.trainer import CheckpointConfig, TrainConfig, Trainer
from ldm.train.validate import LossOnHeldOut
from ldm.train.writer import SaveFailed
from ldm.types import Batch
from tests import ranks
from tests.distributed import tiny

AVERAGES = EmaConfig(decay=0.6, others=(0.9,), power=(0.1, 0.2), snapshot=2)


class Rows:
    """A rank's part of the tiny batches; the second rank of two may be slow."""

    def __init__(self, slow: float = 0.0) -> None:
        self.slow = slow

    def batches(self, start: int) -> Iterator[Batch]:
        while True:
            time.sleep(self.slow * dist.rank())
            yield tiny.micro_batches(start, dist.rank(), dist.world_size(), 1)[0]
            start += 1


def trainer(out: str, stage: int, slow: float = 0.0, **changes: Any) -> Trainer:
    warnings.simplefilter("ignore")
    offload = {k: changes.pop(k) for k in ("offload_optimizer", "offload_parameters", "compile") if k in changes}
    settings: dict[str, Any] = {
        "steps": tiny.STEPS,  # which the rates of plain PyTorch's training depend on
        "batch": tiny.BATCH,
        "optim": tiny.OPTIM,
        "engine": EngineConfig(zero_stage=stage, precision="fp32", clip=tiny.CLIP, **offload),
        "ema": AVERAGES,
        "checkpoint": CheckpointConfig(every=2, keep=1),
        "log": LogConfig(every=1, tensorboard=False),
    }
    rows: Any = Rows(slow)
    return Trainer(TrainConfig(**settings | changes), tiny.build(), rows, Path(out), seed=tiny.SEED, settings="")


def averages(stages: list[int], folder: str) -> dict[int, Any]:
    """A run at each stage: every average as its checkpoint has it."""
    found = {}
    for stage in stages:
        run = trainer(f"{folder}/stage-{stage}", stage)
        assert run.run([]) == 0
        found[stage] = dict(run.engine.full(run.engine.masters))
    return found


@pytest.mark.parametrize(("world", "stages"), [(1, [0, 3]), (2, [2])])
def test_every_average_is_the_same_at_every_stage(tmp_path: Path, world: int, stages: list[int]) -> None:
    """Against plain PyTorch's weights of every step, averaged by their closed forms in float64."""
    oracle = tiny.plain(tiny.STEPS)
    trajectory = [{n: w.double() for n, w in step.items()} for step in oracle.weights]
    ranks.run(averages, world, stages, str(tmp_path), timeout=400)
    for stage in stages:
        out = tmp_path / f"stage-{stage}"
        assert files.steps(out / "ema") == [2, 4, 6, 8, 10]
        assert tiny.worst(state.read_weights(out / "checkpoints" / "step-10"), oracle.ema[-1]) < 1e-4
        for width in (0.1, 0.2):
            gamma = width_exponent(width)
            shares = [(s ** (gamma + 1) - (s - 1) ** (gamma + 1)) / 10 ** (gamma + 1) for s in range(1, 11)]
            expected = {n: sum(p * t[n] for p, t in zip(shares, trajectory)) for n in trajectory[0]}
            found = {f"trained.{n}": w.double() for n, w in choose(out, ema=str(width)).weights.items()}
            assert tiny.worst(found, expected) < 1e-4  # type: ignore[arg-type]


def width_exponent(width: float) -> float:
    """By bisection: the spread of the profile falls with its exponent."""
    low, high = 0.0, 1e4
    for _ in range(200):
        gamma = (low + high) / 2
        spread = (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)
        low, high = (gamma, high) if spread > width else (low, gamma)
    return low


def fails_on(kind: str, folder: str) -> tuple[str, list[int]]:
    """A run whose second checkpoint cannot be saved by one rank: what each rank raises, and what is published."""
    run = trainer(folder, 2, ema=None)
    if kind == "disk":
        write = state.write

        def full(held: Any, beside: Path) -> None:
            if held.step == 4 and dist.rank() == 1:
                raise OSError(28, "No space left on device")
            write(held, beside)

        state.write = full
    else:
        calls: list[int] = []

        def guard() -> None:
            calls.append(1)
            if len(calls) == 2:
                raise LockLost("taken over by another")

        run.writer._guard = guard
    try:
        run.run([])
    except (SaveFailed, LockLost) as error:
        return f"{type(error).__name__}: {error}", files.steps(run.checkpoints)
    return "nothing", []


@pytest.mark.parametrize(("kind", "rank", "own"), [("disk", 1, "No space left"), ("lock", 0, "taken over by another")])
def test_a_save_that_fails_on_one_rank_fails_on_all(tmp_path: Path, kind: str, rank: int, own: str) -> None:
    found = ranks.run(fails_on, 2, kind, str(tmp_path), timeout=300)
    for r, (said, steps) in enumerate(found):
        assert said.startswith("SaveFailed" if kind == "disk" else "LockLost")
        assert (own if r == rank else "another rank tells why") in said
        assert steps == [2]


def straggles(folder: str) -> None:
    run = trainer(folder, 1, slow=0.2, steps=4, ema=None, guard=GuardConfig(straggler=1.5))
    run.run([])


def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    ranks.run(straggles, 2, str(tmp_path))
    events = [json.loads(line) for line in (tmp_path / "log" / "events.jsonl").read_text().splitlines()]
    assert {(e["event"], e["rank"]) for e in events} == {("straggler", 1)}
    row = json.loads((tmp_path / "log" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["data_seconds"] > 0.15
    assert row["slowest_rank_seconds"] > 1.5 * row["fastest_rank_seconds"]


def offloaded(folder: str) -> dict[str, list[float]]:
    found = {}
    for name, stage, options in (
        ("optimizer 2", 2, {"offload_optimizer": True}),
        ("both 3", 3, {"offload_optimizer": True, "offload_parameters": True}),
    ):
        for again in (False, True):  # the second start resumes
            run = trainer(f"{folder}/{name}", stage, steps=8 if again else 5, **options)
            run.run([])
        found[name] = list(Path(f"{folder}/{name}/log/metrics.jsonl").read_text().splitlines())
    return {k: [json.loads(line)["loss"] for line in v] for k, v in found.items()}


def test_offloading_changes_nothing(tmp_path: Path) -> None:
    found = ranks.run(offloaded, 1, str(tmp_path), timeout=240)[0]
    assert found["optimizer 2"][:3] == pytest.approx(tiny.plain(3).losses, rel=1e-5)  # while the rate rises alike
    assert len(found["both 3"]) == 8
    assert found["both 3"] == pytest.approx(found["optimizer 2"], rel=1e-5)


def validated(folder: str, stage: int, times: int = 0) -> list[float]:
    """The validation loss of the averaged and of the raw weights after a short run."""
    run = trainer(folder, stage, steps=2)
    batch = tiny.rows(50, list(range(7)))
    hook = LossOnHeldOut(ValidateConfig(samples=7, every=1, times=times), batch, seed=0)
    run.run([hook])
    with run.averaged():
        assert hook.loss(run) == hook.last
    return [hook.last, hook.loss(run)]


def test_validation_is_the_same_for_any_number_of_ranks(tmp_path: Path) -> None:
    """Seven samples on one rank, and on two with padding; the mean over samples by plain PyTorch."""
    one = ranks.run(validated, 1, f"{tmp_path}/one", 1)[0]
    for found in ranks.run(validated, 2, f"{tmp_path}/two", 2):
        assert found == pytest.approx(one, rel=1e-5)
    objective = tiny.build()
    weights = choose(tmp_path / "one", ema="raw").weights
    objective.trained.load_state_dict(weights)
    batch = tiny.rows(50, list(range(7)))
    with torch.no_grad():
        losses = [objective(_one(batch, i), tiny.Rng.of(1, [i]))[0].item() for i in range(7)]
    assert one[1] == pytest.approx(sum(losses) / 7, rel=1e-5)
    logged = [json.loads(line) for line in (tmp_path / "one" / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in logged if "validation_loss" in r] == [0, 1, 2]


def test_fixed_times_are_taken_in_turn_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Seven samples at t = 0, 250, 500, 750, 0, 250, 500: the loss of v with min-SNR by its formula in float64."""
    one = ranks.run(validated, 1, f"{tmp_path}/one", 1, 4)[0]
    for found in ranks.run(validated, 2, f"{tmp_path}/two", 2, 4):
        assert found == pytest.approx(one, rel=1e-5)
    objective = tiny.build()
    objective.trained.load_state_dict(choose(tmp_path / "one", ema="raw").weights)
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bars = torch.cumprod(1 - beta, 0)
    losses = []
    for i in range(7):
        batch, rng, t = _one(tiny.rows(50, list(range(7))), i), tiny.Rng.of(1, [i]), 250 * (i % 4)
        x0, noise = objective.latents(batch, rng).double(), rng.normal("noise", (4, 4, 4)).double()
        alpha, sigma = bars[t].sqrt(), (1 - bars[t]).sqrt()
        x = (alpha * x0 + sigma * noise).float()
        with torch.no_grad():
            out = objective.trained(x, torch.tensor([t]), objective.cond(batch, rng)).double()
        snr = bars[t] / (1 - bars[t])
        losses.append((out - (alpha * noise - sigma * x0)).square().mean() * snr.clamp(max=5) / (snr + 1))
    assert one[1] == pytest.approx(float(sum(losses)) / 7, rel=1e-5)


@pytest.mark.parametrize("times", [-1, 8])
def test_fixed_times_without_samples_are_refused(times: int) -> None:
    with pytest.raises(ValueError, match=f"times must be between 0 .* samples 7, got {times}"):
        ValidateConfig(samples=7, times=times)


def test_fixed_times_of_a_flow_are_not_shifted() -> None:
    """Neither by its shift nor by the density, which move only what is drawn."""
    share = torch.arange(8) / 8
    flow = Process(schedule=Flow(shift=3.0), prediction=Velocity(), density=LogitNormal())
    assert flow.fixed_times(share).tolist() == [0, 125, 250, 375, 500, 625, 750, 875]
    assert Process().fixed_times(share).tolist() == [0, 125, 250, 375, 500, 625, 750, 875]


def _one(batch: Batch, i: int) -> Batch:
    return {k: v[i : i + 1] for k, v in batch.items()} | {"position": torch.tensor([i])}


@pytest.mark.parametrize("how", ["aot_eager", "blocks"])
def test_compiled_training_is_the_same(how: str, tmp_path: Path) -> None:
    found = ranks.run(compiled, 1, str(tmp_path), how, timeout=240)[0]
    assert found == pytest.approx(tiny.plain(2).losses, rel=1e-4)


def compiled(folder: str, how: str) -> list[float]:
    import torch._dynamo

    from ldm.models import compiling

    torch._dynamo.config.disable = False
    made = compiling.by_block
    compiling.by_block = lambda network, backend: made(network, "aot_eager")  # C++ would take a minute
    run = trainer(folder, 1, steps=2, ema=None, compile=how)
    run.run([])
    network: Any = run.objective.trained
    inside = [block for block in compiling.repeated_blocks(network) if block._compiled_call_impl is not None]
    assert bool(inside) == (how == "blocks")
    assert (network._compiled_call_impl is not None) == (how != "blocks")
    return [json.loads(line)["loss"] for line in (Path(folder) / "log/metrics.jsonl").read_text().splitlines()]
