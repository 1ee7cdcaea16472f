"""The second term of a LoRA's loss: computed by hand from the network with and without its corrections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.adapters.lora import LoraAdapter, LoraConfig
from ldm.diffusion.process import Process
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.objectives.preserve import Preserve, PreservingObjective
from ldm.rng import Rng
from tests.unit.adapters.test_lora import filled, model

SEEN: list[list[str]] = []


def encode_text(texts: Sequence[str]) -> dict[str, Tensor]:
    SEEN.append(list(texts))
    rows = [torch.randn(12, 16, generator=torch.Generator().manual_seed(sum(map(ord, t)))) for t in texts]
    return {"text": torch.stack(rows)}


def made(preserve: Preserve, **options: Any) -> tuple[PreservingObjective, DenoiseObjective, Any]:
    unet, tower = model()
    net = filled(LoraAdapter(LoraConfig(rank=2)).attach(unet, [tower]))
    vae = Autoencoder(AutoencoderConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, sample_size=8))
    process = Process()
    denoise = DenoiseObjective(
        net, process, LatentCodec.of(vae), encode_text, DenoiseOptions(drop=0.0, **options), below=unet
    )
    return PreservingObjective(denoise, preserve, net.disabled, encode_text), denoise, net


def batch() -> dict[str, Any]:
    moments = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    captions = ["a sks dog", "sks dog in snow", "a sks dog"]
    return {"moments": moments, "caption": captions, "weight": torch.tensor([1.0, 0.5, 2.0]), "key": list("abc")}


@pytest.mark.parametrize("kind", ["class", "blank"])
def test_the_term_is_the_squared_difference_to_the_model_without_its_corrections(kind: Any) -> None:
    config = Preserve(kind=kind, weight=0.7) if kind == "blank" else Preserve(word="dog", trigger="sks dog", weight=0.7)
    objective, denoise, net = made(config)
    rng = Rng.of(5, [0, 1, 2])
    loss, metrics = objective(batch(), rng)
    plain, _ = denoise(batch(), rng)
    texts = [""] * 3 if kind == "blank" else ["a dog", "dog in snow", "a dog"]
    process = denoise.process
    latents = denoise.latents(batch(), rng)
    t = process.times(rng.uniform("time"))
    noised = process.add_noise(latents, rng.normal("noise", (4, 8, 8)), t)
    other, _ = model()
    with torch.no_grad():
        target = other(noised, t, encode_text(texts))
        answer = net(noised, t, encode_text(texts))
    term = ((answer - target).square().mean((1, 2, 3)) * torch.tensor([1.0, 0.5, 2.0])).mean()
    assert term > 1e-6
    assert float(metrics["loss_preserved"]) == pytest.approx(float(term), rel=1e-4)
    assert float(loss) == pytest.approx(float(plain) + 0.7 * float(term), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_validation_is_of_the_captions_alone_and_texts_are_encoded_once() -> None:
    objective, denoise, _ = made(Preserve(word="dog", trigger="sks dog"))
    rng = Rng.of(5, [0, 1, 2])
    with torch.no_grad():
        assert float(objective(batch(), rng)[0]) == float(denoise(batch(), rng)[0])
    SEEN.clear()
    for _ in range(3):
        objective(batch(), rng)
    assert [s for s in SEEN if "a dog" in s] == [["a dog", "dog in snow"]]


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"task.preserve: with task.options.repeats"):
        made(Preserve(word="dog", trigger="sks"), repeats=2)
    with pytest.raises(ValueError, match="weight must be above 0"):
        Preserve(weight=0)
    with pytest.raises(ValueError, match="word and trigger are of kind class"):
        Preserve(kind="blank", word="dog")
