"""Scheduler configs mean the same here and in diffusers: alpha_bar, prediction, and back."""

from __future__ import annotations

import diffusers
import pytest
import torch

from ldm.checkpoint.schedulers import scheduler_from_diffusers, scheduler_to_diffusers
from ldm.diffusion.prediction import Epsilon, Sample, V, Velocity
from ldm.diffusion.schedule import Discrete, Flow


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (Discrete(), Epsilon()),
        (Discrete(betas="linear", beta_start=1e-4, beta_end=0.02), Sample()),
        (Discrete(betas="cosine", steps=100), V()),
        (Discrete(zero_terminal_snr=True), V()),
    ],
)
def test_round_trip_and_tables(schedule: Discrete, prediction: Epsilon | V | Sample) -> None:
    config = scheduler_to_diffusers(schedule, prediction)
    theirs = diffusers.DDIMScheduler.from_config(config)
    assert torch.allclose(theirs.alphas_cumprod.double(), schedule.alpha_bar(), rtol=2e-4, atol=1e-6)
    settings = scheduler_from_diffusers(dict(theirs.config))
    assert (settings.schedule, settings.prediction) == (schedule, prediction)
    assert settings.spacing == ("trailing" if schedule.zero_terminal_snr else "leading")
    assert (settings.offset, settings.last_alpha_one) == (0 if schedule.zero_terminal_snr else 1, False)


def test_flow() -> None:
    config = scheduler_to_diffusers(Flow(shift=3.0), Velocity())
    settings = scheduler_from_diffusers(config)
    assert settings.schedule == Flow(shift=3.0)
    assert settings.prediction == Velocity()


def test_learned_variance() -> None:
    """Only DDPM takes it; what diffusers reads back is a learned range, and so do we."""
    config = scheduler_to_diffusers(Discrete(), Epsilon(), variance="learned")
    assert config["_class_name"] == "DDPMScheduler"
    theirs = diffusers.DDPMScheduler.from_config(config)
    assert theirs.config["variance_type"] == "learned_range"
    assert scheduler_from_diffusers(dict(theirs.config)).variance == "learned"
    assert scheduler_from_diffusers(scheduler_to_diffusers(Discrete(), Epsilon())).variance == "fixed"
    with pytest.raises(ValueError, match="variance_type 'learned' is not supported"):
        scheduler_from_diffusers({**config, "variance_type": "learned"})


def test_messages() -> None:
    with pytest.raises(ValueError, match="velocity"):
        scheduler_to_diffusers(Discrete(), Velocity())
    with pytest.raises(ValueError, match="beta_schedule 'odd'"):
        scheduler_from_diffusers({"beta_schedule": "odd"})
    with pytest.raises(ValueError, match="prediction_type 'odd'"):
        scheduler_from_diffusers({"prediction_type": "odd"})
