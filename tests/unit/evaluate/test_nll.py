"""`ldm evaluate nll` on a tiny random model, against the bound put together here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.cli.__main__ import main
from ldm.diffusion import Discrete, V, posterior
from ldm.evaluate import measure
from ldm.models.presets import AUTOENCODERS, TEXTS, UNETS
from ldm.models.text import TextTower
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder
from ldm.pipeline import TextToImage
from ldm.rng import Rng
from tests.unit.evaluate.models import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), Discrete(zero_terminal_snr=True), V())


def test_the_verb_gives_the_bound(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new U-Net answers 0, that is x_0 = alpha x for v: each term is written out here."""
    out = tmp_path / "figures.json"
    argv = ["evaluate", "nll", "--model", str(model), "--count", "3", "--steps", "4", "--out", str(out)]
    found = []
    for batch in ("2", "3"):
        assert main([*argv, "--batch", batch]) == 0
        found.append(json.loads(out.read_text())["result"])
    for name in ("steps", "decoder", "prior"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)
    assert found[0]["bits_per_dim"] == pytest.approx(found[1]["bits_per_dim"], rel=1e-4)
    assert "bits a latent dimension" in capsys.readouterr().out
    pipeline = TextToImage.load(model)
    drawn = measure.draw("emoji", "heldout", 3)
    with torch.no_grad():
        x0 = pipeline.codec.encode(measure.real_pictures("emoji", "heldout", drawn.ids, 8 * pipeline.codec.factor))
    schedule, times = Discrete(zero_terminal_snr=True), [0, 333, 666, 999]
    total, size = x0.new_zeros(3), x0[0].numel()
    for i, t in enumerate(times):
        alpha, sigma = schedule.at(t)
        x = alpha * x0 + sigma * Rng(0, (0, 1, 2)).normal(f"time {i}", x0.shape[1:])
        q = posterior(alpha, sigma, *(schedule.at(times[i - 1]) if i else (1.0, 0.0)))
        error = (q.on_x0 * (alpha * x - x0)).square()
        term = (
            error / q.large
            + math.log(q.large)
            + (q.small / q.large - 1 - math.log(q.small) if i else math.log(2 * math.pi))
        )
        total += 0.5 * term.flatten(1).sum(1)
    want = float(total.mean()) / size / math.log(2)  # no prior term: all signal is gone
    assert found[0]["bits_per_dim"]["mean"] == pytest.approx(want, rel=1e-3)
    assert found[0]["prior"] == pytest.approx(0, abs=1e-6)
    assert found[0]["dimensions"] == size


def test_learned_variance(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new U-Net of twice the channels answers 0: each variance is the geometric mean of its two ends."""
    torch.manual_seed(2)
    save_diffusers(
        tmp_path / "learned",
        network=UNet(replace(UNETS["tiny"], out_channels=2 * UNETS["tiny"].out_channels)),
        autoencoder=Autoencoder(AUTOENCODERS["tiny"]),
        text=[TextTower(TEXTS["tiny"][0])],
        scheduler=scheduler_to_diffusers(Discrete(zero_terminal_snr=True), V(), variance="learned"),
    )
    out = tmp_path / "figures.json"
    argv = ["evaluate", "nll", "--count", "2", "--steps", "4", "--variance", "learned", "--out", str(out)]
    assert main([*argv, "--model", str(tmp_path / "learned")]) == 0
    found = json.loads(out.read_text())
    assert found["protocol"]["variance"] == "learned"
    pipeline = TextToImage.load(tmp_path / "learned")
    drawn = measure.draw("emoji", "heldout", 2)
    with torch.no_grad():
        x0 = pipeline.codec.encode(measure.real_pictures("emoji", "heldout", drawn.ids, 8 * pipeline.codec.factor))
    schedule, times = Discrete(zero_terminal_snr=True), [0, 333, 666, 999]
    total = x0.new_zeros(2)
    for i, t in enumerate(times):
        alpha, sigma = schedule.at(t)
        x = alpha * x0 + sigma * Rng(0, (0, 1)).normal(f"time {i}", x0.shape[1:])
        q = posterior(alpha, sigma, *(schedule.at(times[i - 1]) if i else (1.0, 0.0)))
        small = q.small if i else posterior(*schedule.at(333), *schedule.at(0)).small
        variance = math.sqrt(small * q.large)
        error = (q.on_x0 * (alpha * x - x0)).square()
        rest = small / variance - 1 - math.log(small) if i else math.log(2 * math.pi)
        total += 0.5 * (error / variance + math.log(variance) + rest).flatten(1).sum(1)
    want = float(total.mean()) / x0[0].numel() / math.log(2)
    assert found["result"]["bits_per_dim"]["mean"] == pytest.approx(want, rel=1e-3)
    capsys.readouterr()
    assert main([*argv, "--model", str(model)]) == 2
    assert "variance 'learned' needs" in capsys.readouterr().err


def test_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["evaluate", "nll", "--model", str(model), "--count", "2"]
    assert main([*argv, "--steps", "0"]) == 2
    assert "steps must be a whole number of at least 1, got 0" in capsys.readouterr().err
    assert main([*argv, "--batch", "0"]) == 2
    assert "batch must be at least 1" in capsys.readouterr().err
