"""Levers of the denoising loss: another sample's target, assigned noise, a ramp of dropped texts, repeats."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.config.load import decode
from ldm.diffusion import PREDICTIONS, Discrete, Epsilon, Flow, Importance, MinSNR, Process, V, Velocity
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives import partners, repeats
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.rng import Rng
from ldm.types import Cond
from tests.unit.objectives.test_denoise import Probe

VAE = AutoencoderConfig(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2)
SEED = 3
EVERYTHING: dict[str, Any] = {
    "drop": 0.5, "drop_warmup": 4, "contrastive": 0.1, "assign": "optimal", "assign_among": 2, "repeats": 3,
    "offset_noise": 0.1, "input_perturbation": 0.1,
}  # fmt: skip


class Answers(nn.Module):
    """Gives whatever it has learned, a value for each row."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.values


def encode_text(texts: Any) -> Cond:
    rows = torch.stack([torch.full((3, 2), float(len(t))) + torch.arange(2) for t in texts])
    return {"text": rows}


def objective(process: Process, network: nn.Module | None = None, **options: Any) -> DenoiseObjective:
    chosen: dict[str, Any] = {"drop": 0.0} | options
    codec = LatentCodec.of(Autoencoder(VAE))
    return DenoiseObjective(network or Probe(), process, codec, encode_text, DenoiseOptions(**chosen))


def batch_of(positions: list[int]) -> dict[str, Any]:
    """Moments of almost no spread, so that the latents are the means times `scaling_factor`, known to float32."""
    mean = Rng.of(7, positions).normal("mean", (4, 2, 2))
    return {
        "moments": torch.cat([mean, torch.full_like(mean, -60.0)], 1),
        "caption": ["x" * (1 + p % 5) for p in positions],
        "position": torch.tensor(positions),
        "weight": torch.tensor([1.0 + p % 3 for p in positions]),
    }


def clean(batch: dict[str, Any]) -> np.ndarray:
    return VAE.scaling_factor * batch["moments"][:, :4].double().numpy()


def run(built: DenoiseObjective, positions: list[int]) -> Tensor:
    return built(batch_of(positions), Rng.of(SEED, positions))[0]


def seen(built: DenoiseObjective) -> dict[str, Any]:
    assert isinstance(built.trained, Probe)
    return built.trained.seen


def levels(process: Process, t: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma of SD's betas or of a straight path, from their definitions."""
    if isinstance(process.schedule, Flow):
        sigma = t.double().numpy() / 1000
        return (1 - sigma)[:, None, None, None], sigma[:, None, None, None]
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bar = np.cumprod(1 - betas)[t.long().numpy()]
    return np.sqrt(bar)[:, None, None, None], np.sqrt(1 - bar)[:, None, None, None]


def targets(kind: str, x0: np.ndarray, noise: np.ndarray, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    named = {"epsilon": noise, "sample": x0, "velocity": noise - x0, "v": alpha * noise - sigma * x0}
    return named[kind]


@pytest.mark.parametrize("kind", sorted(PREDICTIONS))
def test_contrastive_is_the_papers_loss(kind: str) -> None:
    """|v - u|^2 - 0.05 |v - u~|^2 with u~ of the pair's other sample at this one's time (arXiv 2506.05350)."""
    process = Process(schedule=Flow() if kind == "velocity" else Discrete(), prediction=PREDICTIONS[kind])
    built, positions = objective(process, contrastive=0.05), [4, 9, 2, 7]
    batch = batch_of(positions)
    loss, metrics = built(batch, Rng.of(SEED, positions))
    told = seen(built)
    alpha, sigma = levels(process, told["t"])
    x0, noise = clean(batch), Rng.of(SEED, positions).normal("noise", (4, 2, 2)).double().numpy()
    text = np.array([len(c) + 0.5 for c in batch["caption"]])[:, None, None, None]
    out = 0.3 * (alpha * x0 + sigma * noise) + 0.01 * text
    other = [1, 0, 3, 2]
    near = ((out - targets(kind, x0, noise, alpha, sigma)) ** 2).mean((1, 2, 3))
    far = ((out - targets(kind, x0[other], noise[other], alpha, sigma)) ** 2).mean((1, 2, 3))
    assert loss.item() == pytest.approx(((near - 0.05 * far) * batch["weight"].numpy()).mean(), rel=1e-5)
    assert metrics["loss_contrastive"].item() == pytest.approx(far.mean(), rel=1e-5)


def test_contrastive_has_the_minimum_of_its_closed_form() -> None:
    """(u - lambda u~) / (1 - lambda), where the gradient of a free answer vanishes."""
    positions, share = [0, 1, 2, 3], 0.3
    batch = batch_of(positions)
    u = Rng.of(SEED, positions).normal("noise", (4, 2, 2)) - torch.from_numpy(clean(batch)).float()
    built = objective(
        Process(schedule=Flow(), prediction=Velocity()),
        Answers((u - share * u[[1, 0, 3, 2]]) / (1 - share)),
        contrastive=share,
    )
    run(built, positions).backward()
    assert isinstance(built.trained, Answers)
    assert built.trained.values.grad is not None
    assert float(built.trained.values.grad.abs().max()) < 1e-6


def test_assignment_is_the_best_of_all_permutations() -> None:
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(12, 3, 2, 2, generator=g) for _ in range(2))
    rows = partners.assigned(x0, noise, 6)
    moved = 0
    for first in (0, 6):
        own = rows[first : first + 6]
        assert sorted(own.tolist()) == list(range(first, first + 6)), "each noise once, within its group"

        apart = (x0[first : first + 6, None] - noise[None, first : first + 6]).double().square().sum((2, 3, 4)).tolist()
        every = {p: sum(apart[i][j] for i, j in enumerate(p)) for p in itertools.permutations(range(6))}
        assert tuple((own - first).tolist()) == min(every, key=every.__getitem__)
        moved += int((own != torch.arange(first, first + 6)).sum())
    assert moved > 0


def noises(built: DenoiseObjective, positions: list[int]) -> np.ndarray:
    """What a forward pass added, from what the network saw of known latents."""
    run(built, positions)
    told = seen(built)
    count = len(told["t"]) // len(positions)
    alpha, sigma = levels(built.process, told["t"])
    return (told["x"].double().numpy() - alpha * np.tile(clean(batch_of(positions)), (count, 1, 1, 1))) / sigma


def test_assigned_noise_is_the_same_noise() -> None:
    """Every draw once, so noise alone stays normal; each group's are nearer to its samples than as drawn."""
    process, positions = Process(schedule=Flow(), prediction=Velocity()), list(range(64))
    drawn = noises(objective(process), positions)
    given = noises(objective(process, assign="optimal", assign_among=8), positions)
    x0 = clean(batch_of(positions))
    assert not np.allclose(given, drawn, atol=1e-2)
    for first in range(0, 64, 8):
        part = slice(first, first + 8)
        apart = np.abs(given[part, None] - drawn[None, part]).max((2, 3, 4))
        found = apart.argmin(1)
        assert sorted(found) == list(range(8))
        assert apart[range(8), found].max() < 2e-3  # small sigmas divide the rounding of x
        assert ((x0[part] - given[part]) ** 2).sum() <= ((x0[part] - drawn[part]) ** 2).sum() + 1e-2


def test_a_sample_that_is_not_finite_shows_in_the_loss() -> None:
    built = objective(Process(prediction=V()), assign="optimal", assign_among=2, contrastive=0.1)
    batch = batch_of([0, 1])
    batch["moments"][1] = math.nan
    assert bool(built(batch, Rng.of(SEED, [0, 1]))[0].isnan())


@pytest.mark.parametrize("live", [False, True])
def test_dropped_texts_rise_over_the_first_steps(live: bool) -> None:
    """At step s of N the samples whose draw is below drop x s / N: those of the step before, and more."""
    positions = list(range(400))
    options = DenoiseOptions(drop=0.4, drop_each=(0.5,), drop_warmup=8)
    built = DenoiseObjective(Probe(), Process(), LatentCodec.of(Autoencoder(VAE)), encode_text, options, live=live)
    rng = Rng.of(SEED, positions)
    whole, alone = rng.uniform("drop").double(), rng.uniform("drop 0").double()
    for step in (None, 0, 1, 5, 8, 100):
        if step is not None:  # before the first step a trainer says 0, or where it resumes
            built.after_step(step)
        part = min(1.0, (step or 0) / 8)
        run(built, positions)
        gone = seen(built)["text"].flatten(1).mean(1) == 0.5
        assert torch.equal(gone, (whole < part * 0.4) | (alone < part * 0.5)), step
    built.after_step(0)
    with torch.no_grad():
        run(built, positions)
    gone = seen(built)["text"].flatten(1).mean(1) == 0.5
    assert torch.equal(gone, (whole < 0.4) | (alone < 0.5)), "validation drops as ever"


def test_repeats_share_latents_and_text_alone() -> None:
    """Times in their thirds, noises of their own that are normal, the loss their mean; text is encoded once."""
    from scipy import stats

    process, positions = Process(schedule=Flow(), prediction=Velocity()), list(range(300))
    batch, calls = batch_of(positions), []

    def encode(texts: Any) -> Cond:
        calls.append(list(texts))
        return encode_text(texts)

    once, codec = objective(process), LatentCodec.of(Autoencoder(VAE))
    thrice = DenoiseObjective(Probe(), process, codec, encode, DenoiseOptions(drop=0.0, repeats=3))
    calls.clear()
    loss = thrice(batch, Rng.of(SEED, positions))[0]
    assert calls == [batch["caption"]]
    told = seen(thrice)
    added = noises(thrice, positions)
    assert np.allclose(added[:300], noises(once, positions), atol=2e-3), "the first noises are those without repeats"
    flat = [torch.from_numpy(part).flatten() for part in np.split(added, 3)]
    for part in flat:
        assert stats.kstest(part.numpy(), "norm").pvalue > 0.01
    assert float(torch.corrcoef(torch.stack(flat)).fill_diagonal_(0).abs().max()) < 4 / len(flat[0]) ** 0.5
    for i, u in enumerate((told["t"].double() / 1000).view(3, 300)):
        assert stats.kstest(u.numpy(), stats.uniform(i / 3, 1 / 3).cdf).pvalue > 0.01
    alpha, sigma = levels(process, told["t"])
    x0 = np.tile(clean(batch), (3, 1, 1, 1))
    text = np.tile([len(c) + 0.5 for c in batch["caption"]], 3)[:, None, None, None]
    error = (0.3 * (alpha * x0 + sigma * added) + 0.01 * text - (added - x0)) ** 2
    weight = np.tile(batch["weight"].numpy(), 3)
    assert loss.item() == pytest.approx((error.mean((1, 2, 3)) * weight).mean(), rel=1e-4)


def test_repeats_estimate_the_same_loss_with_less_spread() -> None:
    """Of one sample, by 100 positions: the same mean, and less than a quarter of the variance for four strata."""
    process, count = Process(schedule=Flow(), prediction=Velocity()), 100
    batch = batch_of([0])
    found = {}
    for times in (1, 4):
        built = objective(process, repeats=times)
        found[times] = np.array([built(batch, Rng.of(SEED, [p]))[0].item() for p in range(count)])
    spread = (found[1].var() / count + found[4].var() / count) ** 0.5
    assert abs(found[1].mean() - found[4].mean()) < 4 * spread
    assert found[4].var() < found[1].var() / 4


def test_strata_stay_below_one() -> None:
    u = torch.full((8,), 1 - 2**-24)
    assert float(repeats.stratified(u, 4).max()) < 1
    assert torch.equal(repeats.stratified(u, 1), u)


def test_repeats_enter_the_history_of_importance_in_the_order_of_positions() -> None:
    """One process or two that take turns: the same history, of each sample as often as it is used."""
    schedule = Discrete(steps=6, beta_start=0.01, beta_end=0.5)
    process = Process(schedule=schedule, prediction=Epsilon(), density=Importance(history=2, floor=0.01))
    whole, divided = objective(process, repeats=2), objective(process, repeats=2)
    for step in range(6):
        rows = list(range(8 * step, 8 * step + 8))
        run(whole, rows)
        for part in (rows[4:], rows[:4]):
            run(divided, part)
        whole.after_step(step + 1)
        divided.after_step(step + 1)
    ours, theirs = whole.state()["tensors"], divided.state()["tensors"]
    assert int(ours["counts"].sum()) == 6 * 8 * 2
    for name in ours:
        assert torch.allclose(ours[name].double(), theirs[name].double(), rtol=1e-5)


def test_losses_do_not_depend_on_how_a_batch_is_divided() -> None:
    """All levers at once, in micro-batches of 8, 4 and 2 of a batch's consecutive samples."""
    process = Process(schedule=Flow(), prediction=Velocity())
    built, losses = objective(process, **EVERYTHING), []
    built.after_step(3)
    for size in (8, 4, 2):
        parts = [run(built, list(range(first, first + size))).item() for first in range(0, 8, size)]
        losses.append(sum(parts) / len(parts))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
    assert losses[0] != pytest.approx(run(objective(process), list(range(8))).item(), rel=1e-3)


def test_validation_is_the_plain_loss() -> None:
    process, positions = Process(prediction=V(), weighting=MinSNR()), [0, 1, 2]  # no pairs, no groups
    levers = {k: v for k, v in EVERYTHING.items() if k not in ("offset_noise", "input_perturbation")}
    with torch.no_grad():
        assert (
            run(objective(process, **levers), positions).item() == run(objective(process, drop=0.5), positions).item()
        )


def test_a_compiled_network_gives_the_same_loss_and_gradient() -> None:
    process, found = Process(schedule=Flow(), prediction=Velocity()), []
    for compiled in (False, True):
        built = objective(process, **EVERYTHING)
        if compiled:
            built.trained.compile(backend="eager")
        loss = run(built, [0, 1, 2, 3])
        loss.backward()
        assert isinstance(built.trained, Probe)
        assert built.trained.scale.grad is not None
        found.append((loss.item(), built.trained.scale.grad.item()))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_options_are_read() -> None:
    tree = {"contrastive": 0.05, "assign": "optimal", "assign_among": 8, "repeats": 2, "drop_warmup": 100}
    assert decode(DenoiseOptions, tree) == DenoiseOptions(**tree)  # type: ignore[arg-type]


def learned() -> DenoiseObjective:
    return objective(Process(variance="learned"), contrastive=0.05)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DenoiseOptions(contrastive=1.0), r"contrastive must be in \[0, 1\), got 1\.0"),
        (lambda: DenoiseOptions(contrastive=math.nan), r"contrastive must be in \[0, 1\), got nan"),
        (lambda: DenoiseOptions(assign="best"), "assign must be 'none' or 'optimal', got 'best'"),  # type: ignore[arg-type]
        (lambda: DenoiseOptions(assign_among=1), "assign_among must be at least 2 samples, got 1"),
        (lambda: DenoiseOptions(repeats=0), r"repeats must be in \[1, 256\], got 0"),
        (lambda: DenoiseOptions(drop_warmup=-1), "drop_warmup must be at least 0 steps, got -1"),
        (lambda: DenoiseOptions(contrastive=0.1).check(3), "options.contrastive: 0.1 takes samples in pairs"),
        (lambda: DenoiseOptions(assign="optimal").check(24), "options.assign_among: 16 must divide a micro-batch"),
        (lambda: run(objective(Process(), contrastive=0.1), [0]), "takes samples in pairs"),
        (learned, "options.contrastive: 0.05 has no meaning with process.variance 'learned'"),
    ],
)
def test_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_a_missing_scipy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(
        ValueError, match=r"options.assign: 'optimal' needs the package scipy: pip install 'ldm\[eval\]'"
    ):
        DenoiseOptions(assign="optimal", assign_among=4).check(8)
