"""A short training on the embedded pictures ends with the loss that it ends with on the CPU in float32."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.data.loader import DataConfig, Loader
from ldm.diffusion.prediction import V
from ldm.diffusion.process import Process
from ldm.models.presets import UNETS
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.rng import Rng
from ldm.train.optim import Optim
from tests.distributed import tiny

BATCH, STEPS, LAST, SEED = 16, 200, 50, 7
OPTIM = Optim(lr=1e-3, warmup=20)
NETWORK = replace(
    UNETS["emoji"], in_channels=3, out_channels=3, block_out_channels=(32, 48, 64), attention_head_dim=(2, 3, 4),
    norm_num_groups=8, cross_attention_dim=6,
)  # fmt: skip
CPU: dict[str, Any] = {"first": [0.78714, 0.69061, 0.72155, 0.71611, 0.76999, 0.74784], "last": 0.18954}
"""In float32 on a CPU: losses of the first steps, and the mean of the last 50 (`python -m tests.gpu.test_emoji`)."""


def losses(device: str, steps: int, precision: torch.dtype = torch.float32) -> Tensor:
    """Of a training from nothing on pictures of 16 pixels; batches, noise and weights at the start are the same."""
    torch.manual_seed(SEED)
    network = UNet(NETWORK).to(device).train()
    codec = LatentCodec(Autoencoder(tiny_vae()), 1.0)  # pixels are trained on: the loader's pictures are its latents
    process = Process(prediction=V())
    objective = DenoiseObjective(network, process, codec, tiny.encode_text, DenoiseOptions(drop=0.1))
    optimizer = OPTIM.build(objective.parameters())
    loader = Loader(DataConfig(path="emoji", size=16), seed=SEED, micro_batch=BATCH)
    found = []
    for step, batch in enumerate(loader.batches(0, steps)):
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.lr_at(step, steps)
        pixels = batch.pop("image")
        given: Any = {**batch, "moments": torch.cat([pixels, torch.full_like(pixels, -30.0)], dim=1)}
        half = precision != torch.float32
        with torch.autocast(device, dtype=precision) if half else nullcontext():
            loss, _ = objective(given, Rng.of(SEED, batch["position"]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).double().cpu()


def tiny_vae() -> Any:
    """Settings of an autoencoder that is not called."""
    from ldm.models.presets import AUTOENCODERS

    return AUTOENCODERS["tiny"]


def test_the_first_steps_on_the_cpu() -> None:
    """What the figures above were made by still makes them."""
    found = losses("cpu", len(CPU["first"]))
    assert found.tolist() == pytest.approx(CPU["first"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "first"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)], ids=str)
def test_a_training_on_a_card_reaches_the_loss_of_the_cpu(precision: torch.dtype, first: float) -> None:
    found = losses("cuda", STEPS, precision)
    assert found[: len(CPU["first"])].tolist() == pytest.approx(CPU["first"], rel=first)
    assert float(found[-LAST:].mean()) == pytest.approx(CPU["last"], rel=0.02)


if __name__ == "__main__":
    measured = losses("cpu", STEPS)
    print({"first": [round(x, 5) for x in measured[:6].tolist()], "last": round(float(measured[-LAST:].mean()), 5)})
    print([round(float(part.mean()), 4) for part in measured.split(25)])
    half = losses("cpu", STEPS, torch.bfloat16)
    print("bfloat16", round(float(half[-LAST:].mean()), 5), [round(x, 4) for x in half[:6].tolist()])
