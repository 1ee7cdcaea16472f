"""The demo draws its own model by the process and the parts that it was trained with, not by the shipped model's."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.cli.__main__ import main
from ldm.config.schema import load_run
from ldm.demo import models
from ldm.diffusion import Flow
from ldm.models.shipped import ASSETS
from ldm.pipeline import Settings
from ldm.recipes import assemble
from ldm.recipes.text_to_image import SampleHook

SMALL = ("task.cache=null", "task.network.block_out_channels=[32, 32, 32]", "task.network.attention_head_dim=[1, 1, 1]")


def test_before_training_it_is_the_model_that_training_starts_from() -> None:
    config = load_run(ASSETS / "demo.yaml", list(SMALL))
    built = assemble(config.task, config.data, config.train, config.seed, config.workers)
    own = next(hook.pipeline for hook in built.hooks if isinstance(hook, SampleHook))
    shown = models.untrained(config)
    for name, weight in own.network.state_dict().items():
        assert torch.equal(weight, shown.network.state_dict()[name])
    assert shown.process == own.process
    shown.dtype = torch.float32
    settings = Settings(sampler="dpmpp_2m", steps=2, guidance=3.0)
    assert torch.equal(shown.sample(["cat"], settings=settings), own.sample(["cat"], settings=settings))


def test_after_training_it_is_what_the_run_exported(tmp_path: Path) -> None:
    short = (f"out={tmp_path}", "train.steps=1", "train.batch=2", "train.engine.precision=fp32", "train.validate=null")
    assert main(["train", str(ASSETS / "demo.yaml"), *SMALL, *short]) == 0
    shown = models.trained(tmp_path)
    assert isinstance(shown.process.schedule, Flow)
    assert shown.size(None) == (64, 64)
