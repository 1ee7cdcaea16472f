"""Optimizers of other packages: each step as the bare package's, exact resume, what is refused, x of schedule-free."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.rng import Rng
from ldm.train import packages, state
from ldm.train.chosen import choose
from ldm.train.ema import EmaConfig
from ldm.train.engine_config import EngineConfig
from ldm.train.log import LogConfig
from ldm.train.optim import Optim
from ldm.train.trainer import TrainConfig, Trainer
from tests import ranks
from tests.distributed import tiny, work
from tests.unit.train.test_trainer import Line, Rows

transformers = pytest.importorskip("transformers.optimization")
pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="pip install 'ldm[optimizers]'")

STEPS = 5
PLAIN = Optim(lr=3e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, warmup=3)
OPTIMS = {
    "adafactor": replace(PLAIN, algorithm="adafactor", decay="cosine", final=0.1),
    "relative": replace(
        PLAIN, algorithm="adafactor", warmup=0,
        adafactor=packages.AdafactorConfig(relative_step=True, scale_parameter=True, warmup_init=True, beta1=0.9),
    ),
    "came": replace(PLAIN, algorithm="came", decay="cosine", final=0.1),
    "prodigy": replace(
        PLAIN, algorithm="prodigy", lr=1.0, prodigy=packages.ProdigyConfig(d0=1e-4, d_coef=2.0, bias_correction=True)
    ),
    "adamw_schedule_free": replace(PLAIN, algorithm="adamw_schedule_free"),
}  # fmt: skip


def bare(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """As its own users build it."""
    if name == "adafactor":
        return transformers.Adafactor(groups, lr=3e-3, scale_parameter=False, relative_step=False)
    if name == "relative":
        return transformers.Adafactor(groups, warmup_init=True, beta1=0.9)
    if name == "came":
        return pytorch_optimizer.CAME(groups, lr=3e-3, betas=(0.9, 0.99, 0.9999))
    if name == "prodigy":
        return pytorch_optimizer.Prodigy(
            groups, lr=1.0, betas=(0.9, 0.99), eps=1e-6, d0=1e-4, d_coef=2.0, bias_correction=True
        )
    return pytorch_optimizer.ScheduleFreeAdamW(groups, lr=3e-3, betas=(0.9, 0.99), eps=1e-6)


def plain(name: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of a loop with nothing of ours but the objective; schedule-free ends in eval()."""
    objective, optim = tiny.build(), OPTIMS[name]
    named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer: Any = bare(name, groups)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(step, tiny.STEPS)
        batch = tiny.rows(step, list(range(tiny.BATCH)))
        loss, _ = objective(batch, Rng.of(tiny.SEED, batch["position"]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(named.values()), tiny.CLIP)
        optimizer.step()
        losses.append(loss.item())
    if name == "adamw_schedule_free":
        optimizer.eval()
    return losses, {n: p.detach().clone() for n, p in named.items()}


ORACLES: dict[str, tuple[list[float], dict[str, Tensor]]] = {}


def oracle(name: str) -> tuple[list[float], dict[str, Tensor]]:
    """Computed once."""
    if name not in ORACLES:
        ORACLES[name] = plain(name)
    return ORACLES[name]


def story(name: str, stage: int, folder: str) -> dict[str, Any]:
    """Losses and weights to use; a checkpoint after 3 steps, from which another engine goes on."""
    warnings.simplefilter("ignore")
    first = work.Training(stage, optim=OPTIMS[name])
    losses = [first.step(i) for i in range(3)]
    path = state.save(Path(folder) / f"{name}-{stage}", 3, first.engine, first.ema, {}, keep=0)
    held = first.full(first.engine.weights_to_use())
    losses += [first.step(i) for i in range(3, STEPS)]
    second = work.Training(stage, seed=2, optim=OPTIMS[name])
    state.load(path, second.engine, second.ema)
    again = [second.step(i) for i in range(3, STEPS)]
    return {"losses": losses, "again": again, "to use": first.full(first.engine.weights_to_use()), "held": held,
            "end": first.full(), "again end": second.full()}  # fmt: skip


def stories(cases: list[tuple[str, int]], folder: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Of all cases; one start of the processes for all."""
    return {case: story(*case, folder) for case in cases}


CASES = [
    *[(name, 0, 1) for name in OPTIMS],
    ("prodigy", 0, 2),
    ("adamw_schedule_free", 1, 2),
    ("adamw_schedule_free", 2, 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """By name, stage and world; of the first rank."""
    found = {}
    for world in (1, 2):
        cases = [(name, stage) for name, stage, w in CASES if w == world]
        ran = ranks.run(stories, world, cases, str(folder / str(world)), timeout=300)[0]
        found |= {(*case, world): what for case, what in ran.items()}
    return found


@pytest.mark.parametrize("case", CASES)
def test_training_equals_the_bare_package(told: Any, case: Any) -> None:
    losses, weights = oracle(case[0])
    assert told[case]["losses"] == pytest.approx(losses, rel=2e-5)
    assert tiny.worst(told[case]["to use"], weights) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_resuming_is_bit_exact(told: Any, folder: Path, case: Any) -> None:
    found, (name, stage, world) = told[case], case
    assert found["again"] == found["losses"][3:]
    assert tiny.worst(found["again end"], found["end"]) == 0
    stored = state.read_weights(folder / str(world) / f"{name}-{stage}" / "step-3", "w")
    assert tiny.worst(stored, found["held"]) == 0


def test_schedule_free_resumes_on_one_rank(told: Any, folder: Path) -> None:
    again = ranks.run(go_on, 1, str(folder / "2" / "adamw_schedule_free-2" / "step-3"))[0]
    assert again == pytest.approx(told["adamw_schedule_free", 2, 2]["losses"][3:], rel=1e-5)


def go_on(folder: str) -> list[float]:
    """The losses of the last steps."""
    training = work.Training(0, seed=3, optim=OPTIMS["adamw_schedule_free"])
    state.load(Path(folder), training.engine, training.ema)
    return [training.step(i) for i in range(3, STEPS)]


def test_weights_to_use_are_those_of_eval_and_training_goes_on_at_y() -> None:
    """x = (y - (1 - beta) z) / beta in float64, and eval() of the package; the masters are not touched."""
    p = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)))
    optimizer: Any = OPTIMS["adamw_schedule_free"].build([p])
    for i in range(4):
        p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(i))
        optimizer.step()
    y, z = p.detach().clone(), optimizer.state[p]["z"].clone()
    found = packages.averaged(optimizer, [p])[0]
    torch.testing.assert_close(found.double(), (y.double() - 0.1 * z.double()) / 0.9, rtol=0, atol=2e-6)
    assert torch.equal(p.detach(), y)
    optimizer.eval()
    assert torch.equal(found, p.detach())
    assert float((found - y).abs().max()) > 1e-4


@pytest.mark.parametrize("ema", [None, EmaConfig(decay=0.5, warmup=False)])
def test_what_the_trainer_shows_and_exports_is_x(tmp_path: Path, ema: Any) -> None:
    """Against a plain loop of the package that looks at its eval() weights after each step."""
    found, shown = ranks.run(trained, 1, str(tmp_path), ema)[0]
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer: Any = pytorch_optimizer.ScheduleFreeAdamW(
        [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}],
        lr=0.1, betas=(0.9, 0.99), eps=1e-6,
    )  # fmt: skip
    average = model.weight.detach().clone()
    for step, batch in zip(range(6), Rows().batches(0)):
        optimizer.zero_grad()
        ((model(batch["x"]).squeeze(1) - batch["x"].sum(1)) ** 2).mean().backward()
        optimizer.step()
        optimizer.eval()
        average = average.lerp(model.weight.detach(), 0.5)
        if step < 5:
            optimizer.train()
    expected = model.weight.detach() if ema is None else average
    for what in (found, shown, choose(tmp_path).weights["weight"]):
        torch.testing.assert_close(what, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        choose(tmp_path, ema="raw").weights["weight"], model.weight.detach(), rtol=1e-5, atol=1e-6
    )


def trained(out: str, ema: Any) -> tuple[Tensor, Tensor]:
    """What is exported after six steps, and what a hook sees inside `averaged`."""
    optim = Optim(algorithm="adamw_schedule_free", lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    config = TrainConfig(
        steps=6, batch=1, optim=optim, ema=ema, log=LogConfig(tensorboard=False),
        engine=EngineConfig(precision="fp32", clip=0.0),
    )  # fmt: skip
    trainer = Trainer(config, Line(), Rows(), Path(out), seed=3, settings={})  # type: ignore[arg-type]
    trainer.run([])
    y = trainer.objective.trained.weight.detach().clone()
    with trainer.averaged():
        shown = trainer.objective.trained.weight.detach().clone()
    assert torch.equal(trainer.objective.trained.weight.detach(), y)
    assert not torch.equal(shown, y)
    return trainer.weights()["weight"], shown


@pytest.mark.parametrize(
    ("algorithm", "stage", "world", "more", "refused"),
    [
        ("adafactor", 1, 2, {}, True), ("came", 2, 2, {}, True), ("prodigy", 3, 4, {}, True),
        ("adamw_schedule_free", 3, 2, {}, True), ("adamw_schedule_free", 2, 2, {}, False),
        ("adafactor", 2, 1, {}, False), ("prodigy", 0, 8, {}, False), ("adamw", 3, 8, {}, False),
        ("came", 1, 1, {"offload_optimizer": True}, True),
    ],
)  # fmt: skip
def test_state_that_cannot_be_divided_is_refused(
    algorithm: str, stage: int, world: int, more: dict[str, Any], refused: bool
) -> None:
    config = EngineConfig(zero_stage=stage, **more)
    if not refused:
        packages.check_divided(algorithm, config, world)
        return
    with pytest.raises(ValueError, match=rf"^train.optim.algorithm: '{algorithm}' .*zero_stage 0.*got {stage}$"):
        packages.check_divided(algorithm, config, world)


@pytest.mark.parametrize(
    ("algorithm", "module", "told"),
    [("came", "pytorch_optimizer", "optimizers"), ("adafactor", "transformers.optimization", "transformers")],
)
def test_a_missing_package_is_named(monkeypatch: Any, algorithm: Any, module: str, told: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"'{algorithm}' needs the package .*pip install 'ldm\[{told}\]'"):
        replace(PLAIN, algorithm=algorithm).build([nn.Parameter(torch.zeros(2, 2))])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"algorithm": "prodigy", "lr": 1e-4}, "lr: 0.0001 with algorithm 'prodigy'.*write 1"),
        ({"algorithm": "adamw_schedule_free", "decay": "cosine"}, "decay: 'cosine' with algorithm"),
        ({"algorithm": "adamw_schedule_free", "betas": (0.0, 0.9)}, "betas: the first must be above 0"),
        ({"algorithm": "adafactor", "warmup": 5, "adafactor": packages.AdafactorConfig(relative_step=True)},
         "adafactor.relative_step: true makes the rate itself"),
    ],
)  # fmt: skip
def test_rates_that_an_algorithm_does_not_have_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Optim(**settings)
