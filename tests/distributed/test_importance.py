"""Importance-sampled times on two ranks: one history, that of one process; and an exact resume of a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.cli.__main__ import main
from ldm.diffusion.density import Importance
from ldm.diffusion.prediction import V
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Discrete
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.pipeline import Settings, TextToImage
from ldm.rng import Rng
from tests import miniature, ranks
from tests.distributed import tiny


def story(rank: int | None, world: int) -> dict[str, Tensor]:
    """The history after four steps of one global batch, divided over ranks."""
    from ldm import dist

    torch.manual_seed(1)
    unet = tiny.build().trained
    vae = Autoencoder(AutoencoderConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, sample_size=4))
    density = Importance(history=1, floor=0.05)
    process = Process(schedule=Discrete(steps=3, beta_end=0.5), prediction=V(), density=density)
    objective = DenoiseObjective(unet, process, LatentCodec.of(vae), tiny.encode_text, DenoiseOptions())
    for step in range(4):
        for batch in tiny.micro_batches(step, dist.rank() if rank is None else rank, world, 2):
            objective(batch, Rng.of(5, batch["position"]))
        objective.after_step(step + 1)
    return objective.state()["tensors"]


def test_ranks_share_the_history_of_one_process() -> None:
    one = story(0, 1)
    two = ranks.run(story, 2, None, 2)
    assert int(one["counts"].min()) >= 1
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name])
        assert torch.allclose(two[0][name].double(), value.double(), rtol=1e-5)


def run(root: Path, out: str, *overrides: str) -> None:
    assert main(["train", str(root / "config.yaml"), f"out={root / out}", *overrides]) == 0


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_everything_resumes_exactly_and_draws_with_its_variance(tmp_path: Path) -> None:
    """Learned variance, importance, offset noise and perturbation by config; stopped half way, it goes on the same."""
    root = miniature.project(tmp_path)
    process: dict[str, Any] = {
        "schedule": {"kind": "discrete", "steps": 4, "beta_end": 0.5},
        "prediction": {"kind": "v"},
        "density": {"kind": "importance", "history": 1, "floor": 0.05},
        "variance": "learned",
    }
    options = {"offset_noise": 0.1, "input_perturbation": 0.1, "bound_weight": 0.01}
    config = miniature.text_to_image(root, process=process, options=options)
    config["task"]["network"] = miniature.UNET | {"out_channels": 8}
    config["task"]["samples"]["settings"] = {"steps": 2, "sampler": "ddpm_learned", "guidance": 2.0}
    config["train"] = miniature.train(steps=8, checkpoint={"every": 4, "keep": 0}, optim={"lr": 2.0e-3})
    miniature.write(config, root / "config.yaml")
    run(root, "whole")
    run(root, "parts", "train.steps=4")
    run(root, "parts")
    assert losses(root / "parts") == losses(root / "whole")
    ours, theirs = (load_file(next((root / o / "export" / "unet").glob("*.safetensors"))) for o in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    history = load_file(root / "whole" / "checkpoints" / "step-8" / "objective.safetensors")
    assert int(history["counts"].sum()) == 8 * 4
    scheduler = json.loads((root / "whole" / "export" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["variance_type"]) == ("DDPMScheduler", "learned_range")
    pipe = TextToImage.load(root / "whole")
    assert pipe.process.variance == "learned"
    drawn = {}
    for sampler in ("ddpm_learned", "ddpm", "ddpm_large", "ddim"):
        settings = Settings(sampler=sampler, steps=3, guidance=2.0)
        drawn[sampler] = pipe.sample(["a red dot"], settings=settings)
    assert not torch.equal(drawn["ddpm_learned"], drawn["ddpm"])
    assert not torch.equal(drawn["ddpm_learned"], drawn["ddpm_large"])


def test_channels_that_do_not_fit_the_variance_are_named(tmp_path: Path, capsys: Any) -> None:
    root = miniature.project(tmp_path)
    config = miniature.text_to_image(root, process={"prediction": {"kind": "v"}, "variance": "learned"})
    miniature.write(config, root / "config.yaml")
    assert main(["train", str(root / "config.yaml")]) == 2
    assert "network.out_channels: 4, but process.variance 'learned' needs 8" in capsys.readouterr().err
