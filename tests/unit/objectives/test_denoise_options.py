"""Offset noise, input perturbation, learned variance and importance-sampled times, asked for by config."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ldm.diffusion import Discrete, Epsilon, Flow, Importance, Process, V
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.rng import Rng
from ldm.types import Cond

VAE = AutoencoderConfig(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, scaling_factor=0.7)


class Heads(nn.Module):
    """A mean and, if asked for, a variance fraction, each of its own weights; remembers its input."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.mean, self.fraction = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.2))
        self.learned, self.seen = learned, {}

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.seen: dict[str, Tensor] = {"x": x, "t": t}
        parts = [self.mean * x, torch.tanh(self.fraction * x)]
        return torch.cat(parts if self.learned else parts[:1], 1)


def objective(process: Process, **options: Any) -> tuple[DenoiseObjective, Heads]:
    heads = Heads(process.variance == "learned")

    def encode(texts: Any) -> Cond:
        return {"text": torch.zeros(len(texts), 3, 2)}

    codec = LatentCodec.of(Autoencoder(VAE))
    return DenoiseObjective(heads, process, codec, encode, DenoiseOptions(drop=0.0, **options)), heads


def batch_of(positions: list[int]) -> dict[str, Any]:
    made = Rng.of(7, positions)
    return {
        "moments": made.normal("moments", (8, 4, 4)).clamp(-1, 1),
        "caption": ["x"] * len(positions),
        "position": torch.tensor(positions),
        "weight": torch.ones(len(positions)),
    }


def levels(schedule: Discrete, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma (B, 1, 1, 1), float64, from the betas' definition."""
    betas = torch.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.steps, dtype=torch.float64) ** 2
    bar = torch.cumprod(1 - betas, 0)[t.long()].view(-1, 1, 1, 1)
    return bar.sqrt(), (1 - bar).sqrt()


def test_offset_noise_shifts_whole_channels_of_input_and_target() -> None:
    built, heads = objective(Process(prediction=Epsilon()), offset_noise=0.5)
    batch = batch_of(list(range(6)))
    rng = Rng.of(2, batch["position"])
    loss, _ = built(batch, rng)
    alpha, sigma = levels(Discrete(), heads.seen["t"])
    noise = rng.normal("noise", (4, 4, 4)).double() + 0.5 * rng.normal("offset", (4,)).double()[:, :, None, None]
    x = alpha * built.latents(batch, rng).double() + sigma * noise
    assert torch.allclose(heads.seen["x"].double(), x, atol=1e-5)
    assert loss.item() == pytest.approx(float((0.3 * x - noise).square().mean()), rel=1e-5)
    means = rng.normal("noise", (4, 4, 4)).mean((2, 3)), noise.mean((2, 3))
    assert means[1].var() > 2 * means[0].var(), "the means spread, which plain noise's hardly do"


def test_input_perturbation_changes_the_input_alone() -> None:
    built, heads = objective(Process(prediction=V()), input_perturbation=0.3)
    batch = batch_of(list(range(6)))
    rng = Rng.of(2, batch["position"])
    loss, _ = built(batch, rng)
    alpha, sigma = levels(Discrete(), heads.seen["t"])
    x0, noise = built.latents(batch, rng).double(), rng.normal("noise", (4, 4, 4)).double()
    x = alpha * x0 + sigma * (noise + 0.3 * rng.normal("perturbation", (4, 4, 4)).double())
    assert torch.allclose(heads.seen["x"].double(), x, atol=1e-5)
    assert loss.item() == pytest.approx(float((0.3 * x - (alpha * noise - sigma * x0)).square().mean()), rel=1e-5)


@pytest.mark.parametrize("perturbation", [0.0, 0.2])
def test_learned_variance_is_the_simple_loss_and_the_bound(perturbation: float) -> None:
    """The bound's term by torch's KL of two normals, in float64 (improved DDPM, eqs. 15 and 16)."""
    schedule, weight = Discrete(steps=50, beta_end=0.2), 0.01
    process = Process(schedule=schedule, prediction=Epsilon(), variance="learned")
    built, heads = objective(process, bound_weight=weight, input_perturbation=perturbation)
    positions = [p for p in range(40) if Rng.of(2, [p]).uniform("time") > 0.02]  # L_0 is another term
    batch = batch_of(positions)
    rng = Rng.of(2, positions)
    loss, _ = built(batch, rng)
    x, t = heads.seen["x"].double(), heads.seen["t"]
    x0, noise = built.latents(batch, rng).double(), rng.normal("noise", (4, 4, 4)).double()
    (alpha, sigma), (alpha_s, sigma_s) = levels(schedule, t), levels(schedule, t - 1)
    step = alpha / alpha_s
    beta = 1 - step**2
    small = beta * sigma_s**2 / sigma**2

    def mean(clean: Tensor) -> Tensor:
        return (step * sigma_s**2 * x + alpha_s * beta * clean) / sigma**2

    out, fraction = 0.3 * x, torch.tanh(0.2 * x)
    part = (fraction + 1) / 2
    spread = torch.exp(0.5 * (part * beta.log() + (1 - part) * small.log()))
    ours = Normal(mean((x - sigma * out) / alpha), spread)
    nats = kl_divergence(Normal(mean(x0), small.sqrt().expand_as(x0)), ours).mean((1, 2, 3))
    expected = (out - noise).square().mean((1, 2, 3)) + weight * 50 * nats / math.log(2)
    assert loss.item() == pytest.approx(float(expected.mean()), rel=1e-4)


def test_the_bound_does_not_touch_the_mean() -> None:
    """Stop-gradient: the mean's weights see the simple loss alone, whatever the bound weighs; the variance's see it."""
    grads = {}
    for weight in (0.0, 0.001, 1000.0):
        process = Process(prediction=V(), variance="learned")
        built, heads = objective(process, bound_weight=weight)
        built(batch_of([1, 2, 3, 4]), Rng.of(2, [1, 2, 3, 4]))[0].backward()
        grads[weight] = heads.mean.grad, heads.fraction.grad
    plain, heads = objective(Process(prediction=V()))
    plain(batch_of([1, 2, 3, 4]), Rng.of(2, [1, 2, 3, 4]))[0].backward()
    assert all(torch.equal(mean, heads.mean.grad) for mean, _ in grads.values())  # type: ignore[arg-type]
    assert float(grads[0.0][1]) == 0  # type: ignore[arg-type]
    assert float(grads[1000.0][1]) == pytest.approx(1e6 * float(grads[0.001][1]), rel=1e-4)  # type: ignore[arg-type]
    assert float(grads[0.001][1]) != 0  # type: ignore[arg-type]


def important(steps: int = 8, history: int = 2) -> tuple[DenoiseObjective, Heads]:
    density = Importance(history=history, floor=0.01)
    schedule = Discrete(steps=steps, beta_start=0.01, beta_end=0.5)
    return objective(Process(schedule=schedule, prediction=Epsilon(), density=density))


def train(built: DenoiseObjective, steps: range, batch: int = 16, parts: int = 1) -> list[float]:
    """Losses of forward passes over consecutive positions; the weights stay as they are."""
    losses = []
    for step in steps:
        positions = list(range(step * batch, (step + 1) * batch))
        rows = [positions[m::parts] for m in range(parts)]  # striped, as ranks divide a batch
        losses.append(sum(built(batch_of(r), Rng.of(3, r))[0].item() for r in rows) / parts)
        built.after_step(step + 1)
    return losses


def test_importance_follows_the_losses_and_stays_unbiased() -> None:
    built, heads = important()
    train(built, range(20))
    history = built._history
    assert history is not None
    assert int(history.times.counts.min()) >= 2
    p = history.times.probabilities()
    rms = history.times.losses.square().mean(1).sqrt()
    assert torch.allclose(p, 0.99 * rms / rms.sum() + 0.01 / 8)
    positions = list(range(10_000, 10_400))
    drawn: list[Tensor] = []
    loss, _ = built(batch_of(positions), Rng.of(3, positions))
    drawn.append(heads.seen["t"])
    share = torch.bincount(drawn[0].long(), minlength=8) / len(positions)
    assert torch.allclose(share.double(), p, atol=4 * float((p * (1 - p)).max() / len(positions)) ** 0.5)
    with torch.no_grad():  # as in validation: every time as often, no weights
        even, _ = built(batch_of(positions), Rng.of(3, positions))
    assert torch.equal(heads.seen["t"].long(), (Rng.of(3, positions).uniform("time").double() * 8).long())
    assert loss.item() == pytest.approx(even.item(), rel=0.1), "the weights undo the density"
    assert len(history._seen) == 1, "validation leaves no trace"


def test_importance_resumes_exactly() -> None:
    whole, _ = important()
    losses = train(whole, range(20))
    first, _ = important()
    train(first, range(11))
    second, _ = important()
    second.load_state({"tensors": {k: v.clone() for k, v in first.state()["tensors"].items()}})
    assert train(second, range(11, 20)) == losses[11:]
    assert all(torch.equal(a, b) for a, b in zip(second.state()["tensors"].values(), whole.state()["tensors"].values()))


def test_importance_does_not_depend_on_how_a_batch_is_divided() -> None:
    whole, divided = important()[0], important()[0]
    for a, b in zip(train(whole, range(12)), train(divided, range(12), parts=4)):
        assert a == pytest.approx(b, rel=1e-5)
    for a, b in zip(whole.state()["tensors"].values(), divided.state()["tensors"].values()):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5)


def test_losses_that_are_not_finite_are_not_remembered() -> None:
    built, _ = important()
    batch = batch_of([0, 1])
    batch["moments"][0] = math.nan
    built(batch, Rng.of(3, [0, 1]))
    built.after_step(1)
    assert built._history is not None
    assert int(built._history.times.counts.sum()) == 1
    assert bool(built._history.times.losses.isfinite().all())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DenoiseOptions(offset_noise=-0.1), "offset_noise must be at least 0, got -0.1"),
        (lambda: DenoiseOptions(input_perturbation=math.nan), "input_perturbation must be at least 0, got nan"),
        (lambda: DenoiseOptions(bound_weight=-1), "bound_weight must be at least 0"),
        (lambda: Importance(history=0), "history must be at least 1"),
        (lambda: Importance(floor=1.0), r"floor in \[0, 1\)"),
        (lambda: Process(variance="guessed"), "variance must be 'fixed' or 'learned', got 'guessed'"),  # type: ignore[arg-type]
        (lambda: Process(schedule=Flow(), prediction=V(), variance="learned"), "needs a discrete schedule"),
        (lambda: Process(schedule=Flow(), prediction=V(), density=Importance()), "needs a discrete schedule"),
        (lambda: Process(density=Importance()).times(torch.zeros(1)), "keeps no history"),
    ],
)
def test_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
