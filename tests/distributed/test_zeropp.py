"""ZeRO++ on 4 ranks, 2 nodes of 2: losses, counted bytes, averages, checkpoints; against stage 3 and one process."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm import dist
from ldm.objectives import Objective
from ldm.plan.links import ZeroPP
from ldm.plan.links import wire as planned_wire
from ldm.rng import Rng
from ldm.train import state, zeropp
from ldm.train.ema import Ema, EmaConfig
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from ldm.types import Batch, Metrics
from tests import ranks
from tests.distributed import kernels, tiny
from tests.distributed.test_volume import OPTIM, Wire

BATCH, STEPS, HALF, CLIP, NODE, WORLD = 8, 5, 3, 0.05, 2, 4
WIDTHS = (128, 101)
"""Of layers that stage 3 divides (above 10,000 weights), and of one whose weights 4 ranks do not divide evenly."""
EVEN = (128, 144)
"""Of layers whose weights 4 ranks divide into multiples of 8, and vectors not all."""
PSI = sum(w * w for w in WIDTHS)
EMA = EmaConfig(decay=0.6)


class Layers(Objective):
    """Layers of each width beside each other."""

    def __init__(self, seed: int = 3, widths: tuple[int, ...] = WIDTHS) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.ModuleList(nn.Sequential(nn.Linear(w, w), nn.Tanh()) for w in widths))

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        parts = [layer(batch[f"x{i}"]) - batch[f"x{i}"].roll(1, 1) for i, layer in enumerate(self.trained.children())]
        return torch.cat(parts, 1).square().mean(), {}


def rows(step: int, first: int, count: int, widths: tuple[int, ...] = WIDTHS) -> Batch:
    positions = [step * BATCH + first + i for i in range(count)]
    drawn = {f"x{i}": Rng.of(4, positions).normal(f"x{i}", (w,)) for i, w in enumerate(widths)}
    return {**drawn, "position": torch.tensor(positions)}


class Training:
    """An engine with an average; `sent` are the bytes of the last step by call and size of group."""

    def __init__(
        self,
        config: EngineConfig,
        accumulate: int = 1,
        seed: int = 3,
        wire: Wire | None = None,
        widths: tuple[int, ...] = WIDTHS,
    ) -> None:
        self.objective, self.accumulate, self.wire, self.widths = Layers(seed, widths), accumulate, wire, widths
        self.micro = BATCH // (dist.world_size() * accumulate)
        optimizer = OPTIM.build(self.objective.parameters())
        self.engine = Engine(self.objective, optimizer, config, micro_batch=self.micro, accumulate=accumulate)
        self.engine.set_lr(OPTIM.lr)
        self.ema = Ema(EMA, self.engine.masters)
        self.sent: dict[tuple[str, int], int] = {}
        self.norms: list[float] = []
        self.second = 0

    def step(self, step: int) -> float:
        total = 0.0
        if self.wire is not None:
            self.wire.read()
        for i in range(self.accumulate):
            batch = rows(step, (i * dist.world_size() + dist.rank()) * self.micro, self.micro, self.widths)
            loss, _ = self.engine.forward(batch, Rng.of(0, batch["position"]))
            self.second = self.copies()
            self.engine.backward_step(loss)
            if self.wire is not None and i + 1 == self.accumulate:
                self.sent = self.wire.read_sizes()
            total += float(loss.detach()) / self.accumulate
        self.ema.update(self.engine.masters, step + 1)
        self.norms.append(self.engine.grad_norm)
        return float(dist.mean(torch.tensor(total)))

    def copies(self) -> int:
        """Bytes of hpZ's copies of divided weights."""
        copies = [p.ds_secondary_tensor for p in self.objective.parameters() if not p.ds_persist]  # type: ignore
        return sum(t.nbytes for t in copies if t is not None)

    @torch.no_grad()
    def loss(self, step: int) -> float:
        batch = rows(step, dist.rank() * (BATCH // dist.world_size()), BATCH // dist.world_size())
        return float(dist.mean(self.engine.forward(batch, Rng.of(0, batch["position"]))[0]))

    def whole(self, shards: list[Tensor] | None = None) -> dict[str, Tensor]:
        return dict(self.engine.full(self.engine.masters if shards is None else shards))


def config(hpz: int = 1, live: int = 0, **options: Any) -> EngineConfig:
    return EngineConfig(
        zero_stage=3, precision="fp32", clip=CLIP, bucket=50_000, live=live, hpz_partition=hpz, **options
    )


def plain() -> tuple[list[float], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Losses, weights after each step and averages by PyTorch alone."""
    objective = Layers()
    groups = [
        {"params": [p for p in objective.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in objective.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=OPTIM.lr, eps=OPTIM.eps, foreach=False)
    losses, weights, averages = [], [], []
    ema = {n: p.detach().clone() for n, p in objective.named_parameters()}
    for step in range(STEPS):
        batch = rows(step, 0, BATCH)
        loss, _ = objective(batch, Rng.of(0, batch["position"]))
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), CLIP)
        adam.step()
        decay = min(EMA.decay, (1 + step) / (10 + step))
        ema = {n: decay * ema[n] + (1 - decay) * p.detach() for n, p in objective.named_parameters()}
        losses.append(loss.item())
        weights.append({n: p.detach().clone() for n, p in objective.named_parameters()})
        averages.append(ema)
    return losses, weights, averages


def tell(folder: str) -> dict[str, Any]:
    """Stage 3 without and with hpZ: a training that is saved, evaluated with its average, and goes on."""
    warnings.simplefilter("ignore")
    wire, found = Wire(), {}
    for name, hpz, accumulate in (("stage 3", 1, 1), ("hpz", 2, 1), ("stage 3 x 2", 1, 2), ("hpz x 2", 2, 2)):
        training = Training(config(hpz), accumulate, wire=wire)
        losses = [training.step(i) for i in range(HALF)]
        before = training.loss(8)
        with training.engine.applied(training.ema.shards):
            inside = training.loss(8)
            repeated = training.loss(8)  # the copies are those of the average now
        after = training.loss(8)
        if name == "hpz":
            state.save(Path(folder), HALF, training.engine, training.ema, {}, keep=0)
        losses += [training.step(i) for i in range(HALF, STEPS)]
        found[name] = {
            "losses": losses,
            "sent": training.sent,
            "swap": (before, inside, repeated, after),
            "copies": (training.second, training.copies()),
            "weights": training.whole(),
            "ema": training.whole(training.ema.shards),
        }
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("hpz")
    found = ranks.run(tell, WORLD, str(folder))
    for other in found[1:]:
        assert all(other[name]["losses"] == found[0][name]["losses"] for name in other)
    return found[0], folder / f"step-{HALF}"


@pytest.mark.parametrize("name", ["hpz", "hpz x 2"])
def test_hpz_trains_as_stage_3_and_as_one_process(told: Any, name: str) -> None:
    found, base = told[0][name], told[0][name.replace("hpz", "stage 3")]
    losses, weights, averages = plain()
    assert found["losses"] == pytest.approx(losses, rel=1e-6)
    assert found["losses"] == pytest.approx(base["losses"], rel=1e-6)
    assert tiny.worst(found["weights"], base["weights"]) < 1e-6
    assert tiny.worst(found["weights"], weights[-1]) < 1e-4
    assert tiny.worst(found["ema"], averages[-1]) < 1e-4


@pytest.mark.parametrize("name", ["hpz", "hpz x 2"])
def test_only_the_first_gather_of_a_step_leaves_the_node(told: Any, name: str) -> None:
    """In units of 4 psi bytes: weights are gathered once over all ranks; for the backward pass, and for the forward of
    other micro-batches, within nodes. Vectors are whole on every rank, and gathered after the step.
    """
    sent, base = told[0][name]["sent"], told[0][name.replace("hpz", "stage 3")]["sent"]
    gathered, accumulate = "all_gather_into_tensor", 2 if "x" in name else 1
    assert base[gathered, WORLD] / (4 * PSI) == pytest.approx(2 * accumulate, abs=0.02)
    assert (gathered, NODE) not in base
    assert sent[gathered, WORLD] / (4 * PSI) == pytest.approx(1, abs=0.02)
    assert sent[gathered, NODE] / (4 * PSI) == pytest.approx(2 * accumulate - 1, abs=0.02)
    assert {k: v for k, v in sent.items() if k[0] != gathered} == {k: v for k, v in base.items() if k[0] != gathered}
    planned = planned_wire(PSI, 3, WORLD, micro_steps=accumulate, live=0, zeropp=ZeroPP(part=NODE), node=NODE)
    over_all = sent[gathered, WORLD] + sent["reduce_scatter_tensor", WORLD]
    assert planned.hidden == pytest.approx(over_all * (WORLD - 1) / WORLD, rel=0.02)
    assert planned.inside == pytest.approx(sent[gathered, NODE] * (NODE - 1) / NODE, rel=0.01)


@pytest.mark.parametrize(("name", "accumulate"), [("hpz", 1), ("hpz x 2", 2)])
def test_the_copy_is_there_from_forward_to_step(told: Any, name: str, accumulate: int) -> None:
    """A group's share of the weights, as planned; nothing between steps."""
    in_forward, between_steps = told[0][name]["copies"]
    planned, _ = ZeroPP(part=NODE).copy(PSI, WORLD, element=4, live=0, accumulate=accumulate)
    assert in_forward == pytest.approx(planned, rel=1e-3)
    assert between_steps == 0
    assert told[0][name.replace("hpz", "stage 3")]["copies"] == (0, 0)


@pytest.mark.parametrize("name", ["hpz", "hpz x 2"])
def test_evaluating_with_the_average_uses_no_copy_of_other_weights(told: Any, name: str) -> None:
    before, inside, repeated, after = told[0][name]["swap"]
    _, weights, averages = plain()
    for value, state_dict in ((before, weights[HALF - 1]), (inside, averages[HALF - 1])):
        objective = Layers()
        objective.load_state_dict(state_dict)
        with torch.no_grad():
            loss, _ = objective(rows(8, 0, BATCH), Rng.of(0, list(range(BATCH))))
        assert value == pytest.approx(float(loss), rel=1e-6)
    assert abs(inside - before) > 1e-3 * before
    assert (repeated, after) == (inside, before)


def go_on(folder: str, hpz: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    training = Training(config(hpz), seed=4)
    before = training.loss(8)  # leaves copies of weights that the checkpoint replaces
    state.load(Path(folder), training.engine, training.ema)
    losses = [training.step(i) for i in range(HALF, STEPS)]
    return {
        "before": before,
        "losses": losses,
        "weights": training.whole(),
        "part": training.engine.config.hpz_partition,
    }


@pytest.mark.parametrize("world", [WORLD, NODE])
def test_resuming_goes_on_on_any_number_of_ranks(told: Any, world: int) -> None:
    """Bit by bit on as many; on one node of 2, where hpZ has nothing to do, within rounding."""
    found, base = ranks.run(go_on, world, str(told[1]), NODE)[0], told[0]["hpz"]
    assert found["part"] == (NODE if world == WORLD else 1)
    assert found["before"] != pytest.approx(base["swap"][0], rel=1e-3)
    if world == WORLD:
        assert found["losses"] == base["losses"][HALF:]
        assert tiny.worst(found["weights"], base["weights"]) == 0
    assert found["losses"] == pytest.approx(base["losses"][HALF:], rel=1e-6)
    assert tiny.worst(found["weights"], base["weights"]) < 1e-5


def other_settings() -> dict[str, Any]:
    """hpZ with weights that stay whole, offloaded, in bf16, and refused."""
    warnings.simplefilter("ignore")
    wire, found = Wire(), {}
    for name, settings in (
        ("whole", config(2, 10**9)),
        ("offloaded", config(2, offload_parameters=True, offload_optimizer=True)),
        ("bf16", replace(config(2), precision="bf16")),
        ("bf16, stage 3", replace(config(), precision="bf16")),
    ):
        training = Training(settings, wire=wire)
        found[name] = {"losses": [training.step(i) for i in range(2)], "sent": training.sent}
    for name, settings in (("3", config(3)), ("weights", config(quantized_weights=True))):
        try:
            Training(settings)
        except ValueError as error:
            found[name] = str(error)
    return found


def test_hpz_with_other_settings() -> None:
    found = ranks.run(other_settings, WORLD)[0]
    losses, _, _ = plain()
    for name in ("whole", "offloaded"):
        assert found[name]["losses"] == pytest.approx(losses[:2], rel=1e-6)
    assert found["bf16"]["losses"] == found["bf16, stage 3"]["losses"]
    assert ("all_gather_into_tensor", NODE) not in found["whole"]["sent"]  # nothing is gathered twice
    assert found["offloaded"]["sent"]["all_gather_into_tensor", NODE] / (4 * PSI) == pytest.approx(1, abs=0.02)
    assert found["3"] == (
        "train.engine.hpz_partition: 3 does not divide 4 processes; allowed are 1, 2 (1 is off), and a node has 4"
    )
    assert found["weights"] == (
        "train.engine.quantized_weights: DeepSpeed quantises on GPUs alone; false is allowed on the CPU"
    )


QUANTISED: dict[str, dict[str, Any]] = {
    "exact": {},
    "weights": {"quantized_weights": True},
    "gradients": {"quantized_gradients": True},
    "all": {"quantized_weights": True, "quantized_gradients": True, "hpz": NODE},
}


def quantised() -> dict[str, Any]:
    """Each way on 2 nodes of 2 with DeepSpeed's kernels in PyTorch."""
    warnings.simplefilter("ignore")
    os.environ["LOCAL_SIZE"] = str(NODE)  # where DeepSpeed's CPU backend reads how many ranks a node has
    kernels.install()
    wire, found = Wire(), {}
    for name, settings in QUANTISED.items():
        training = Training(config(**settings), wire=wire, widths=EVEN)
        losses = [training.step(0)]
        inner = training.engine.inner
        first = training.whole([inner.state[m]["exp_avg"].clone() for m in training.engine.masters])
        losses.append(training.step(1))
        sent = training.sent
        before = training.whole()
        bad = rows(0, dist.rank() * 2, 2, EVEN)
        bad["x0"] *= float("nan") if dist.rank() == 1 else 1.0
        updated = training.engine.backward_step(training.engine.forward(bad, Rng.of(0, bad["position"]))[0])
        kept = tiny.worst(training.whole(), before) == 0
        again = training.step(2)  # gathers all again: the skipped step left nothing whole
        found[name] = {"losses": [*losses, again], "first": first, "sent": sent, "norms": training.norms}
        found[name] |= {"updated": updated, "kept": kept}
    try:
        Training(config(quantized_weights=True))
    except ValueError as error:
        found["uneven"] = str(error)
    return found | {"reduced": reductions()}


def reductions() -> dict[str, tuple[Tensor, Tensor]]:
    """This rank's shard of gradients by `Reduce`, and of their mean."""
    from deepspeed.runtime.comm import coalesced_collectives as theirs
    from deepspeed.utils import groups

    reduce = zeropp.Reduce(theirs.all_to_all_quant_reduce, theirs.reduce_scatter_coalesced, NODE, WORLD)
    made = groups._get_local_all_to_all_group()
    value = Rng.of(7, [dist.rank()]).normal("g", (128 * 128,))[0].view(128, 128)
    given = {f"{size:g}": value * size for size in (1.0, 1e-12, 1e12)}
    given |= {"vector": value.reshape(-1), "uneven": value[:126, :62], "zero": value * 0}
    given["infinite"] = torch.where(value == value.max(), torch.inf, value) if dist.rank() == 2 else value
    expected = {k: dist.mean(v).reshape(-1).chunk(WORLD)[dist.rank()] for k, v in given.items()}
    found = reduce([v.clone().contiguous() for v in given.values()], made)
    return {k: (g.reshape(-1), expected[k]) for k, g in zip(given, found, strict=True)}


@pytest.fixture(scope="module")
def wired() -> list[dict[str, Any]]:
    return ranks.run(quantised, WORLD)


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def test_quantised_collectives_train_almost_alike(wired: Any) -> None:
    """Losses within 0.05 % (weights in 8 bits) and 0.5 % (gradients in 4); a step's gradient within 1 % and 20 %."""
    exact = wired[0]["exact"]
    for name, loss, gradient in (("weights", 5e-4, 0.01), ("gradients", 5e-3, 0.2), ("all", 5e-3, 0.2)):
        found = wired[0][name]
        assert found["losses"] == pytest.approx(exact["losses"], rel=loss)
        assert found["losses"][1:] != exact["losses"][1:]
        assert found["norms"] == pytest.approx(exact["norms"], rel=0.02)  # also of a clipped step the whole scale
        for n, value in exact["first"].items():
            assert off(found["first"][n], value) < gradient, (name, n)


def test_quantised_collectives_send_less(wired: Any) -> None:
    """In units of 4 psi bytes (without vectors, and 32 bits of scale for each group of values)."""
    psi, sent = 4 * sum(w * w for w in EVEN), {n: wired[0][n]["sent"] for n in QUANTISED}
    vectors = 4 * sum(EVEN) / psi  # which are exact
    gather, scatter, exchange = "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"
    assert sent["exact"][gather, WORLD] / psi == pytest.approx(2 + vectors, abs=1e-6)
    assert sent["exact"][scatter, WORLD] / psi == pytest.approx(1 + vectors, abs=1e-6)
    assert sent["weights"][gather, WORLD] / psi == pytest.approx(2 / 4 + vectors, abs=0.002)  # 8 bits of 32
    assert sent["gradients"][gather, WORLD] == sent["exact"][gather, WORLD]
    assert sent["gradients"][scatter, WORLD] / psi == pytest.approx(vectors, abs=1e-6)
    within, between = 4 / 32, 4 / 32 / NODE  # 4 bits of all values, and of this rank's share of the node
    groups = sum(zeropp.rows(w * w, WORLD) for w in EVEN) * 4 / psi
    assert sent["gradients"][exchange, NODE] / psi == pytest.approx(
        within + between + groups * (1 + 1 / NODE), abs=1e-6
    )
    assert sent["all"][gather, WORLD] / psi == pytest.approx(1 / 4 + vectors, abs=0.002)
    assert sent["all"][gather, NODE] / psi == pytest.approx(1 / 4, abs=0.002)
    assert sent["all"][exchange, NODE] == sent["gradients"][exchange, NODE]
    for name, saved in (("weights", ZeroPP(weights=True)), ("all", ZeroPP(part=NODE, weights=True, gradients=True))):
        planned = planned_wire(psi // 4, 3, WORLD, live=0, zeropp=saved, node=NODE)
        counted = (WORLD - 1) / WORLD * (sent[name][gather, WORLD] + sent[name][scatter, WORLD])
        assert planned.hidden == pytest.approx(counted - 1.5 * vectors * psi, rel=0.01)
        exchanged = (sent[name].get((gather, NODE), 0) + sent[name].get((exchange, NODE), 0)) / NODE
        assert planned.inside + planned.ports == pytest.approx(exchanged, rel=0.06)  # scales, of 128 values here


def test_a_gradient_that_is_not_finite_on_one_rank_updates_nothing(wired: Any) -> None:
    for found in wired:
        for name in QUANTISED:
            assert not found[name]["updated"]
            assert found[name]["kept"], name


def test_reduced_gradients_are_the_mean_at_any_scale(wired: Any) -> None:
    for found in wired:
        reduced = found["reduced"]
        for key in ("1", "1e-12", "1e+12"):
            assert off(*reduced[key]) < 0.2, key
        for key in ("vector", "uneven", "zero"):
            assert torch.allclose(*reduced[key], rtol=1e-6, atol=1e-7), key
        assert reduced["infinite"][0].isnan().all()


def test_weights_that_cannot_be_quantised_are_named(wired: Any) -> None:
    assert wired[0]["uneven"] == (
        "train.engine.quantized_weights: trained.1.0.weight has 10,201 values, which 4 processes do not divide into"
        " multiples of 8; use another number of processes, or false"
    )
