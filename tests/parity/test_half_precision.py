"""Models held in half precision: half the bytes, and pictures no further from float32 than diffusers' are.

Pictures are compared as latents, before an autoencoder, which here computes in float32 and in theirs as the rest.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoint.convert import save_diffusers
from ldm.pipeline import Settings, TextToImage
from ldm.rng import Rng
from tests import families
from tests.parity import test_diffusers_folder as unets

PROMPTS, STEPS, SIZE = [f"a {colour} apple" for colour in ("red", "green", "blue", "dark", "pale", "grey")], 8, (16, 24)
GUIDANCE = {"flux": 3.5, "sd1": 5.0, "sdxl": 5.0, "sd3": 5.0, "pixart": 4.5, "zimage": 3.0}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def folder_of(kind: str, at: Path) -> Path:
    torch.manual_seed(2)
    parts = unets.make(kind) if kind in ("sd1", "sdxl") else families.make(kind, at / "t5")
    save_diffusers(
        at / "model", network=parts.network, autoencoder=parts.autoencoder, text=parts.text, scheduler=parts.scheduler
    )
    return at / "model"


def noise_of(pipe: TextToImage) -> Tensor:
    shape = (len(PROMPTS), *pipe.latent_shape(SIZE))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ours(folder: Path, kind: str, precision: str) -> Tensor:
    pipe = TextToImage.load(folder, precision=precision)
    sampler = "ddim" if kind in ("sd1", "sdxl") else pipe.habit[0]
    chosen = Settings(steps=STEPS, size=SIZE, sampler=sampler, guidance=GUIDANCE[kind], negative="")
    return pipe.latents(PROMPTS, chosen, Rng(0, tuple(range(len(PROMPTS)))), x=noise_of(pipe))


def theirs(folder: Path, kind: str, noise: Tensor, dtype: torch.dtype) -> Tensor:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    told: dict[str, Any] = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": STEPS, "output_type": "latent"}
    if kind == "flux":  # its latents are packed
        pack = noise.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        out = pipe([*PROMPTS], latents=pack.to(dtype), guidance_scale=GUIDANCE[kind], **told).images
        b, c, h, w = noise.shape
        return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)
    if kind == "pixart":
        told["use_resolution_binning"] = False
    if kind == "zimage":  # counts its scale from 0, and wants its latents in float32
        told |= {"guidance_scale": GUIDANCE[kind] - 1, "negative_prompt": [""] * len(PROMPTS)}
        return pipe([*PROMPTS], latents=noise, **told).images
    return pipe([*PROMPTS], latents=noise.to(dtype), guidance_scale=GUIDANCE[kind], **told).images


def held(*modules: nn.Module) -> int:
    tensors = itertools.chain.from_iterable(itertools.chain(m.parameters(), m.buffers()) for m in modules)
    return sum(t.numel() * t.element_size() for t in tensors)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("precision", list(DTYPES))
@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3", "flux", "pixart", "zimage"])
def test_as_near_to_float32_as_diffusers(kind: str, precision: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    exact = ours(folder, kind, "fp32")
    noise = noise_of(TextToImage.load(folder))
    assert apart(theirs(folder, kind, noise, torch.float32), exact) < 1e-3
    half, other = ours(folder, kind, precision), theirs(folder, kind, noise, DTYPES[precision])
    print(kind, precision, apart(half, exact), apart(other, exact), apart(half, other))
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    assert 0 < apart(half, exact) < 1.15 * apart(other, exact)
    assert apart(half, other) < 2 * apart(other, exact)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_half_the_bytes_are_held(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    wide, half = TextToImage.load(folder), TextToImage.load(folder, precision="bf16")
    for whole, part in ((wide.network, half.network), *zip(wide.text, half.text, strict=True)):
        assert held(part) <= 0.52 * held(whole)
    assert held(half.codec.autoencoder) == held(wide.codec.autoencoder)
    assert half.dtype == torch.bfloat16
