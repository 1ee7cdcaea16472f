"""Our pipeline draws what diffusers' pipelines draw from the same folder and noise, whoever wrote the folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.prediction import Sample, Velocity
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Flow
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.text_to_image import scheduler_for
from ldm.rng import Rng
from tests.parity.test_diffusers_folder import make, save

PROMPT, NEGATIVE, BOUND = "a red apple", "a green cross", 1e-3
STEPS = {"num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "pt", "height": 16, "width": 24}


def theirs_of(folder: Path) -> Any:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours_of(folder: Path, noise: Tensor, *, given: Any = None, prompt: str = PROMPT, **changes: Any) -> Tensor:
    pipe = TextToImage.load(folder)
    settings = Settings(**{"steps": 10, "guidance": 5.0, "size": (16, 24), "negative": NEGATIVE} | changes)
    latents = pipe.latents([prompt], settings, Rng(0, (0,)), x=noise, given=given(pipe) if given else None)
    return pipe.decode(latents, settings)


def compare(folder: Path, expected: Tensor, pipe: Any, noise: Tensor, **how: Any) -> None:
    """Our picture from our folder, and from the one that their pipeline saves."""
    assert expected.std() > 0.01
    assert (ours_of(folder, noise, **how) - expected).abs().max() < BOUND
    again = folder.with_name("theirs")
    pipe.save_pretrained(again)
    assert (ours_of(again, noise, **how) - expected).abs().max() < BOUND


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_sdxl(negative: str, noise: Tensor, tmp_path: Path) -> None:
    """Two towers, the pooled state of the second, sizes and crop in their order; zeros for an empty negative prompt."""
    parts = make("sdxl")
    with torch.no_grad():  # sizes are to be seen in the picture
        for p in parts.network.add_embedding.parameters():  # type: ignore[union-attr]
            p *= 10
    save(parts, tmp_path / "ours")
    pipe = theirs_of(tmp_path / "ours")
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    told = {"original_size": (40, 32), "crops_coords_top_left": (3, 5), "target_size": (16, 24)}
    own = {f"negative_{k}": v for k, v in told.items()} if negative else {}
    expected = pipe(PROMPT, negative_prompt=negative or None, latents=noise, **told, **own, **STEPS).images * 2 - 1
    how = {"original": (40, 32), "crop": (3, 5), "target": (16, 24), "negative": negative}
    compare(tmp_path / "ours", expected, pipe, noise, **how)
    swapped = ours_of(tmp_path / "ours", noise, **how | {"original": (32, 40)})
    assert (swapped - expected).abs().max() > BOUND  # the order is seen


def test_inpainting(noise: Tensor, tmp_path: Path) -> None:
    parts = make("inpainting")
    with torch.no_grad():  # they draw from the posterior of the masked picture: make it one point
        parts.autoencoder.quant_conv.weight[4:] = 0  # type: ignore[union-attr]
        parts.autoencoder.quant_conv.bias[4:] = -60  # type: ignore[union-attr,index]
    save(parts, tmp_path / "ours")
    pipe = theirs_of(tmp_path / "ours")
    assert type(pipe).__name__ == "StableDiffusionInpaintPipeline"
    g = np.random.default_rng(2)
    colours = g.integers(0, 255, (16, 24, 3), dtype=np.uint8)
    pixels = torch.from_numpy(colours).permute(2, 0, 1)[None] / 127.5 - 1
    inside = np.zeros((16, 24), dtype=np.uint8)
    inside[4:12, 6:20] = 255
    mask = Image.fromarray(inside)
    expected = (
        pipe(PROMPT, Image.fromarray(colours), mask, negative_prompt=NEGATIVE, latents=noise, **STEPS).images * 2 - 1
    )

    def given(ours: TextToImage) -> Any:
        return ours.concat.inpainting(pixels, torch.from_numpy(inside / 255.0)[None, None].float())

    compare(tmp_path / "ours", expected, pipe, noise, given=given)
    with pytest.raises(ValueError, match="is told a picture and a mask here"):
        ours_of(tmp_path / "ours", noise)


def test_latent_consistency(noise: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance told to the U-Net as w, four steps with new noise after each."""
    import diffusers

    save(make("lcm"), tmp_path / "ours")
    pipe = theirs_of(tmp_path / "ours")
    assert type(pipe).__name__ == "LatentConsistencyModelPipeline"
    rng, step = Rng(0, (0,)), iter(range(10))
    noises = lambda *_, **__: rng.normal(f"step {next(step)}", (4, 8, 12))  # noqa: E731
    monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", noises)
    how = STEPS | {"num_inference_steps": 4, "guidance_scale": 7.0}
    expected = pipe(PROMPT, latents=noise, **how).images * 2 - 1
    compare(tmp_path / "ours", expected, pipe, noise, sampler="lcm", steps=4, guidance=7.0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_of_a_unet_is_drawn_by_stable_diffusions_pipeline(shift: float, noise: Tensor, tmp_path: Path) -> None:
    """What a U-Net trained on a flow exports names a scheduler that their pipeline takes."""
    parts = make("sd1")
    process = Process(schedule=Flow(shift=shift), prediction=Velocity())
    parts = replace(parts, scheduler=scheduler_for(process, parts.network))
    save(parts, tmp_path / "ours")
    pipe = theirs_of(tmp_path / "ours")
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    expected = pipe(PROMPT, negative_prompt=NEGATIVE, latents=noise, **STEPS).images * 2 - 1
    compare(tmp_path / "ours", expected, pipe, noise)
    assert TextToImage.load(tmp_path / "ours").process == process


def test_a_flow_of_a_unet_that_predicts_otherwise_is_refused() -> None:
    """diffusers' solvers on flow sigmas would read the network's answer as a velocity."""
    with pytest.raises(ValueError, match="prediction 'sample': diffusers' flow scheduler takes 'velocity' only"):
        scheduler_for(Process(schedule=Flow(), prediction=Sample()), make("sd1").network)


def test_long_prompts_are_those_of_their_chunks_joined(tmp_path: Path, noise: Tensor) -> None:
    """Their pipeline is given the states of both chunks; both negative chunks are empty."""
    parts = make("sd1")
    save(parts, tmp_path / "ours")
    pipe = theirs_of(tmp_path / "ours")
    words = [f"a red apple number {i}" for i in range(8)]
    ids = pipe.tokenizer(" ".join(words), add_special_tokens=False).input_ids
    assert 14 < len(ids) <= 3 * 14

    def states(own: list[int]) -> Tensor:
        tok = pipe.tokenizer
        row = [tok.bos_token_id, *own, tok.eos_token_id]
        return pipe.text_encoder(torch.tensor([row + [tok.pad_token_id] * (16 - len(row))]))[0]

    chunks = -(-len(ids) // 14)
    with torch.no_grad():
        long = torch.cat([states(ids[14 * i : 14 * (i + 1)]) for i in range(chunks)], dim=1)
        empty = torch.cat([states([])] * chunks, dim=1)
    expected = pipe(prompt_embeds=long, negative_prompt_embeds=empty, latents=noise, **STEPS).images * 2 - 1
    how = {"prompt": " ".join(words), "negative": "", "long": True}
    compare(tmp_path / "ours", expected, pipe, noise, **how)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_any_multiple_of_8_is_drawn_as_theirs(family: str, tmp_path: Path) -> None:
    """72 x 104 pixels are 9 x 13 latent pixels under an autoencoder of factor 8: no side halves, not even once."""
    parts = make(family)
    torch.manual_seed(4)
    vae = AutoencoderConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64)
    parts = replace(parts, autoencoder=Autoencoder(vae).eval())
    parts = replace(parts, codec=LatentCodec.of(parts.autoencoder))  # type: ignore[arg-type]
    save(parts, tmp_path / "ours")
    pipe = theirs_of(tmp_path / "ours")
    noise = torch.randn(1, 4, 9, 13, generator=torch.Generator().manual_seed(1))
    how: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 72, "width": 104}
    theirs = pipe(PROMPT, negative_prompt=NEGATIVE, latents=noise, output_type="latent", **how).images
    settings = Settings(steps=4, guidance=5.0, size=(72, 104), negative=NEGATIVE)
    ours = TextToImage.load(tmp_path / "ours").latents([PROMPT], settings, Rng(0, (0,)), x=noise)
    assert ours.shape == theirs.shape == (1, 4, 9, 13)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_weights_of_sdxl_are_their_states_times_the_weight(noise: Tensor, tmp_path: Path) -> None:
    """Penultimate states of both towers; the pooled vector knows no weights."""
    parts = make("sdxl")
    with torch.no_grad():  # words are to be seen in the picture
        for name, p in parts.network.named_parameters():
            p *= 6 if "attn2.to_v" in name or "attn2.to_out" in name else 1
    save(parts, tmp_path / "ours")
    pipe = theirs_of(tmp_path / "ours")
    with torch.no_grad():
        found = pipe.encode_prompt("a red apple", do_classifier_free_guidance=True, negative_prompt="a green cross")
    words, negative, pooled, negative_pooled = found
    ids = [pipe.tokenizer(word, add_special_tokens=False).input_ids for word in ("a", "red", "apple")]
    factors = torch.ones(words.shape[1])
    first = 1 + len(ids[0])
    factors[first : first + len(ids[1])] = 1.5
    factors[first + len(ids[1]) : first + len(ids[1]) + len(ids[2])] = -0.5
    embeds = {"prompt_embeds": words * factors[:, None], "pooled_prompt_embeds": pooled}
    embeds |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
    expected = pipe(latents=noise, **embeds, **STEPS).images * 2 - 1
    compare(tmp_path / "ours", expected, pipe, noise, prompt="a (red:1.5) (apple:-0.5)", weights=True)
    plain = ours_of(tmp_path / "ours", noise, prompt="a red apple")
    assert (plain - expected).abs().max() > BOUND
