"""Muon's arithmetic against singular values in float64, torch's own Muon and AdamW; what is hidden; what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.lora import LoraAdapter, LoraConfig
from ldm.models.network import hidden
from ldm.models.unet import UNet
from ldm.plan.memory import Layout, Sizes, resting
from ldm.train.muon import Muon, MuonConfig, orthogonalize
from ldm.train.optim import Optim, kinds_of, read_state, write_state
from tests.distributed import tiny


def exact(x: Tensor, steps: int = 5) -> Tensor:
    """The quintic on singular values, in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s.unsqueeze(-2)) @ v


@pytest.mark.parametrize("shape", [(2, 24, 24), (1, 16, 20), (3, 8, 50), (2, 64, 12), (1, 1, 7), (1, 7, 1)])
@pytest.mark.parametrize("steps", [1, 5, 7, 12])
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape: tuple[int, int, int], steps: int) -> None:
    """Wide matrices in products of their Gram matrix, others directly."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    torch.testing.assert_close(orthogonalize(x.double(), steps), exact(x, steps), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        orthogonalize(x, steps).double(), exact(x, steps), rtol=0, atol=1e-3 if steps > 5 else 1e-4
    )


@pytest.mark.parametrize("shape", [(32, 32), (16, 100), (100, 16)])
def test_the_update_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """Singular values over two decades come out near 1, with the vectors as they were: what the iteration is for."""
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    out = orthogonalize(((u * torch.logspace(0, -2, min(shape))) @ v)[None], 5)[0]
    kept = (u.mT @ out @ v.mT).diagonal()
    assert 0.65 < float(kept.min()) < float(kept.max()) < 1.25
    assert float((out - (u * kept) @ v).abs().max()) < 1e-3


def test_matrices_of_low_rank_stay_bounded() -> None:
    """With more steps than one Gram matrix bears; the other directions are rounding, which so many steps bring up."""
    torch.manual_seed(2)
    x = torch.randn(1, 40, 3) @ torch.randn(1, 3, 200)
    s = torch.linalg.svdvals(orthogonalize(x, 20)[0])
    assert 0.6 < float(s[2]) < float(s[0]) < 1.3
    assert float(orthogonalize(torch.zeros(1, 4, 9), 5).abs().max()) == 0


def test_half_precision_is_close() -> None:
    torch.manual_seed(3)
    for shape in ((2, 24, 24), (1, 16, 64), (1, 64, 16)):
        x = torch.randn(shape)
        off = orthogonalize(x.bfloat16(), 5).double() - exact(x.bfloat16())
        assert float(off.norm() / exact(x).norm()) < 0.03


@pytest.mark.parametrize("scale", ["rms", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_the_papers(scale: Any, nesterov: bool) -> None:
    """In the sums of the papers, which normalisation makes the same as averages: float64, a convolution flattened."""
    torch.manual_seed(4)
    first = {"square": torch.randn(6, 6), "tall": torch.randn(20, 5), "conv": torch.randn(8, 4, 3, 3)}
    weights = {n: nn.Parameter(w.double()) for n, w in first.items()}
    bias, same = nn.Parameter(torch.randn(5)), nn.Parameter(torch.zeros(5))
    same.data.copy_(bias.data)
    config = MuonConfig(momentum=0.9, nesterov=nesterov, scale=scale, lr=0.02)
    optim = Optim(algorithm="muon", lr=0.01, weight_decay=0.1, muon=config)
    muon = optim.build([*weights.values(), bias], weights.values())
    adam = torch.optim.AdamW([same], lr=0.01, weight_decay=0.0, fused=True)
    expected = {n: w.double() for n, w in first.items()}
    sums = {n: torch.zeros_like(w) for n, w in expected.items()}
    for step in range(4):
        for group in (*muon.param_groups, *adam.param_groups):
            group["lr"] = 0.01 / (step + 1)  # what a schedule does
        for n, p in weights.items():
            p.grad = torch.randn_like(p)
            sums[n] = 0.9 * sums[n] + p.grad
            direction = p.grad + 0.9 * sums[n] if nesterov else sums[n]
            rows, columns = len(p), p[0].numel()
            size = 0.2 * math.sqrt(max(rows, columns)) if scale == "rms" else math.sqrt(max(1, rows / columns))
            update = size * exact(direction.view(rows, columns)).view(p.shape)
            expected[n] = expected[n] - 0.02 / (step + 1) * (update + 0.1 * expected[n])
        bias.grad = torch.randn(5)
        same.grad = bias.grad.clone()
        muon.step()
        adam.step()
    for n, p in weights.items():
        torch.testing.assert_close(p.detach(), expected[n], rtol=0, atol=1e-9)
    assert torch.equal(bias, same)


@pytest.mark.parametrize("scale", ["rms", "original"])
def test_it_is_torchs_muon(scale: Any) -> None:
    """Which computes in bfloat16 everywhere: to its rounding."""
    theirs_of = getattr(torch.optim, "Muon", None)
    if theirs_of is None:
        pytest.skip("torch < 2.9")
    torch.manual_seed(5)
    start = [torch.randn(16, 16), torch.randn(48, 16), torch.randn(16, 64)]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    rest = nn.Parameter(torch.zeros(3))
    muon = Muon(ours, [{"params": [rest]}], MuonConfig(scale=scale, lr=0.02), weight_decay=0.3, lr=0.02)
    kind = {"rms": "match_rms_adamw", "original": "original"}[scale]
    other = theirs_of(theirs, lr=0.02, weight_decay=0.3, momentum=0.95, adjust_lr_fn=kind)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step()
        other.step()
    for p, q, w in zip(ours, theirs, start, strict=True):
        assert float((p - q).detach().norm() / (q - w).detach().norm()) < 0.02


def test_what_is_hidden() -> None:
    """Layers between the first and the last; tables and norms of blocks are no matrices."""
    unet = UNet(tiny.UNET)
    those = {id(p) for p in hidden(unet)}
    rest = {n for n, p in unet.named_parameters() if p.ndim > 1 and id(p) not in those}
    times = {f"time_embedding.linear_{i}.weight" for i in (1, 2)}
    assert rest == {"conv_in.weight", "conv_out.weight", *times}
    assert all(p.ndim > 1 for p in hidden(unet))
    assert len(those) == len(hidden(unet))


def test_state_of_matrices_and_of_the_rest() -> None:
    """A checkpoint has one moment of matrices and two of the rest, and gives the next step bit by bit."""
    torch.manual_seed(6)
    a = [nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(9))]
    optim = Optim(algorithm="muon", lr=0.01)
    first = optim.build(a, a[:1])
    b = [nn.Parameter(p.detach().clone()) for p in a]
    second = optim.build(b, b[:1])
    for _ in range(3):
        for p in a:
            p.grad = torch.randn_like(p)
        first.step()
    kinds = sorted({kind for p in a for kind in read_state(first, p)})
    assert [kinds_of(second, p, kinds) for p in b] == [["momentum_buffer"], ["exp_avg", "exp_avg_sq"]]
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p.data)
        assert sorted(read_state(first, p)) == kinds_of(second, q, kinds)
        write_state(second, q, {kind: v.clone() for kind, v in read_state(first, p).items()}, 3.0)
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    first.step()
    second.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert "step" not in second.state[b[0]]


def test_planned_memory_is_that_of_the_state() -> None:
    unet = UNet(tiny.UNET)
    muon = Optim(algorithm="muon").build(unet.parameters(), hidden(unet))
    for p in unet.parameters():
        p.grad = torch.zeros_like(p)
    muon.step()
    held = sum(v.numel() for s in muon.state.values() for v in s.values() if isinstance(v, Tensor) and v.ndim)
    layout = Layout(stage=0, world=1, copies=0, hidden_moments=1.0)
    assert resting(Sizes.of(unet), layout) == 4 * (held + sum(p.numel() for p in unet.parameters()))
    with pytest.raises(ValueError, match=r"train.optim.algorithm: 'muon' is for a denoising network"):
        resting(Sizes.of(nn.Linear(2, 2)), layout)


def test_corrections_and_other_models_are_refused_in_one_line() -> None:
    for trained in (LoraAdapter(LoraConfig()).attach(UNet(tiny.UNET), []), nn.Linear(2, 2)):
        with pytest.raises(
            ValueError, match=r"^train.optim.algorithm: 'muon' is for a denoising network[^\n]*adamw"
        ) as said:
            Optim(algorithm="muon").build(trained.parameters(), hidden(trained))
        assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"momentum": 1.0}, "momentum must be in"),
        ({"ns_steps": 0}, "ns_steps must be in"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"scale": "original"}, "lr: scale 'original' needs a rate of its own"),
    ],
)
def test_bad_values_are_refused_by_name(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MuonConfig(**bad)
