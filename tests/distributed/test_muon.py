"""Muon at every ZeRO stage, on one and two ranks, against a plain loop of its arithmetic; resuming at others."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm import dist
from ldm.rng import Rng
from ldm.train import state
from ldm.train.fragments import Fragment
from ldm.train.muon import Muon, MuonConfig
from tests import ranks
from tests.distributed import tiny, work

OPTIM = replace(tiny.OPTIM, algorithm="muon", muon=MuonConfig(lr=2e-3))


def orthogonal(x: Tensor) -> Tensor:
    """The quintic on the singular values (float64), five times."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


def plain(steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of one process with nothing of ours but the objective."""
    objective = tiny.build()
    named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    matrix = {n for n, p in named.items() if "block" in n and p.ndim > 1}
    assert len(matrix) > 40
    rest = [(p, OPTIM.weight_decay if p.ndim > 1 else 0.0) for n, p in named.items() if n not in matrix]
    adam = torch.optim.AdamW([{"params": [p], "weight_decay": w} for p, w in rest], betas=OPTIM.betas, eps=OPTIM.eps)
    momentum = {n: torch.zeros_like(named[n]) for n in matrix}
    losses = []
    for step in range(steps):
        lr = OPTIM.lr_at(step, tiny.STEPS)
        batch = tiny.rows(step, list(range(tiny.BATCH)))
        loss, _ = objective(batch, Rng.of(tiny.SEED, batch["position"]))
        objective.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(named.values()), tiny.CLIP)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        with torch.no_grad():
            for n in matrix:
                p, grad = named[n], named[n].grad
                assert grad is not None
                momentum[n] = 0.95 * momentum[n] + 0.05 * grad
                update = orthogonal((0.05 * grad + 0.95 * momentum[n]).flatten(1))
                update *= 0.2 * max(update.shape) ** 0.5
                own = lr * 2e-3 / OPTIM.lr
                p.mul_(1 - own * OPTIM.weight_decay).sub_(own * update.view(p.shape).float())
        losses.append(loss.item())
    return losses, {n: p.detach().clone() for n, p in named.items()}


@pytest.fixture(scope="module")
def oracle() -> tuple[list[float], dict[str, Tensor]]:
    return plain(4)


def train(stage: int, steps: int, clip: float = tiny.CLIP) -> dict[str, Any]:
    """Losses and weights of a short training."""
    training = work.Training(stage, clip=clip, optim=OPTIM)
    losses = [training.step(i) for i in range(steps)]
    return {"losses": losses, "weights": training.full()}


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_training_equals_the_plain_loop(oracle: Any, world: int, stage: int) -> None:
    losses, weights = oracle
    for found in ranks.run(train, world, stage, 4):
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert tiny.worst(found["weights"], weights) < 1e-4


def test_stages_give_the_same_matrices() -> None:
    """Bit by bit, on two ranks, of equal gradients: the first step's, not scaled by a norm that adds up otherwise.

    The gradients of stage 3 are others in their last bits.
    """
    first, *others = [ranks.run(train, 2, stage, 1, 0.0)[0]["weights"] for stage in (0, 1, 2)]
    matrices = [n for n, p in first.items() if "block" in n and p.ndim > 1]
    for other in others:
        assert all(torch.equal(other[n], first[n]) for n in matrices)


def story(stage: int, folder: str) -> dict[str, Any]:
    """Save after 3 steps, load into another engine, save after 4, load again: a resumed run's checkpoint is whole."""
    warnings.simplefilter("ignore")
    training = work.Training(stage, optim=OPTIM)
    losses = [training.step(i) for i in range(3)]
    path = state.save(Path(folder), 3, training.engine, training.ema, {}, keep=0)
    losses += [training.step(i) for i in range(3, 5)]
    second = work.Training(stage, seed=2, optim=OPTIM)
    state.load(path, second.engine, second.ema)
    again = [second.step(3)]
    state.save(Path(folder), 4, second.engine, second.ema, {}, keep=0)
    third = work.Training(stage, seed=3, optim=OPTIM)
    state.load(Path(folder) / "step-4", third.engine, third.ema)
    again.append(third.step(4))
    return {"losses": losses, "again": again, "end": training.full(), "again end": third.full()}


def go_on(stage: int, folder: str) -> list[float]:
    """The losses of steps 3 and 4."""
    warnings.simplefilter("ignore")
    training = work.Training(stage, seed=3, optim=OPTIM)
    state.load(Path(folder) / "step-3", training.engine, training.ema)
    return [training.step(i) for i in range(3, 5)]


@pytest.mark.parametrize(("world", "stage", "other"), [(1, 0, (2, 3)), (2, 1, (1, 0)), (2, 2, (2, 0)), (2, 3, (2, 1))])
def test_resume_is_bit_exact_and_elastic(tmp_path: Path, world: int, stage: int, other: tuple[int, int]) -> None:
    found = ranks.run(story, world, stage, str(tmp_path))[0]
    assert found["again"] == found["losses"][3:]
    assert tiny.worst(found["again end"], found["end"]) == 0
    assert ranks.run(go_on, *other, str(tmp_path))[0] == pytest.approx(found["losses"][3:], rel=1e-5)


SHAPES = {"a": (12, 8), "b": (4, 3, 3, 3), "c": (8, 12), "d": (6, 6)}


def divided() -> tuple[dict[str, Tensor], list[Tensor]]:
    """Three steps of flat shards that cut the first and the third matrix; in order, the second rank has no piece of
    the second, the first none of the last."""
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    grads = [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(3)]
    ends = {"a": 40, "b": 108, "c": 50, "d": 0}  # of the first rank's pieces
    rest = nn.Parameter(torch.zeros(2))
    whole = {n: nn.Parameter(w.clone()) for n, w in weights.items()}
    one = Muon(list(whole.values()), [{"params": [rest]}], MuonConfig(), weight_decay=0.1, lr=0.01)
    rank, fragments, pieces = dist.rank(), [], []
    for name, shape in SHAPES.items():
        numel = weights[name].numel()
        start, stop = ((0, ends[name]), (ends[name], numel))[rank]
        if stop > start:
            offset = sum(len(p) for p in pieces)
            fragments.append(Fragment(name, shape, start, stop - start, 0, offset))
            pieces.append(weights[name].flatten()[start:stop])
    master = nn.Parameter(torch.cat(pieces))
    other = Muon([master], [{"params": [rest]}], MuonConfig(), weight_decay=0.1, lr=0.01)
    other.divide([master], fragments, {n: list(s) for n, s in SHAPES.items()})
    for step in grads:
        for n, p in whole.items():
            p.grad = step[n].clone()
        master.grad = torch.cat([step[f.name].flatten()[f.start : f.start + f.length] for f in fragments])
        one.step()
        other.step()
    mine = [whole[f.name].detach().flatten()[f.start : f.start + f.length] for f in fragments]
    return {n: p.detach() for n, p in whole.items()}, [torch.cat(mine), master.detach()]


def test_cut_matrices_are_updated_as_whole_ones() -> None:
    for weights, (expected, found) in ranks.run(divided, 2):
        assert len(weights) == 4
        assert torch.equal(expected, found)
