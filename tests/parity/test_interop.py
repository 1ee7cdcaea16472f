"""Settings that were read from diffusers' scripts, against diffusers: rates, weights and times of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import nn

from ldm.config.schema import RunConfig, load_run
from ldm.diffusion.prediction import Velocity
from ldm.interop import diffusers
from ldm.interop.sheet import Converted
from ldm.interop.words import Call
from ldm.recipes.dreambooth import DreamboothTask


def read(script: str, given: dict[str, Any]) -> tuple[Converted, RunConfig]:
    found = diffusers.convert(Call(script, {"pretrained_model_name_or_path": "org/model"} | given, {}))
    return found, load_run(found.tree)


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_rates_are_those_of_their_schedule(name: str, tmp_path: Path) -> None:
    """Against diffusers.optimization, after the warm-up (in which theirs is one step behind)."""
    given = {"train_data_dir": str(tmp_path), "max_train_steps": "60", "lr_scheduler": name, "lr_warmup_steps": "10",
             "learning_rate": "2e-4"}  # fmt: skip
    optim = read("train_text_to_image_lora.py", given)[1].train.optim
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
    schedule = get_scheduler(name, theirs, num_warmup_steps=10, num_training_steps=60, num_cycles=1, power=1.0)
    for step in range(60):
        if step >= 10:
            assert optim.lr_at(step, 60) == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-12), step
        theirs.step()
        schedule.step()


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"])
@pytest.mark.parametrize("precondition", [0, 1])
def test_the_weights_and_times_of_sd3(scheme: str, precondition: int, tmp_path: Path) -> None:
    """Against diffusers.training_utils: the share of times below t, and the weight of the velocity's error."""
    given = {"instance_data_dir": str(tmp_path), "instance_prompt": "sks dog", "weighting_scheme": scheme,
             "precondition_outputs": str(precondition), "logit_mean": "0.4", "logit_std": "0.8",
             "max_train_steps": "9"}  # fmt: skip
    found, run = read("train_dreambooth_lora_sd3.py", given)
    assert found.refused == []
    task = run.task
    assert isinstance(task, DreamboothTask)
    sigma = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    theirs = compute_loss_weighting_for_sd3(scheme, sigma)
    expected = theirs * sigma**2 if precondition else theirs  # the error of x_0 is sigma times that of the velocity
    weight = task.weighting.weight(1 - sigma, sigma, Velocity())
    torch.testing.assert_close(weight, expected.double(), atol=1e-6, rtol=1e-6)
    torch.manual_seed(0)
    drawn = compute_density_for_timestep_sampling(scheme, 200_000, 0.4, 0.8, 1.29, device="cpu")
    times = 1 - drawn.double()  # their u counts from the noise
    density: Any = task.density
    ours = density.warp(torch.rand(200_000, dtype=torch.float64))
    points = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    torch.testing.assert_close(torch.quantile(ours, points), torch.quantile(times, points), atol=0.01, rtol=0)
