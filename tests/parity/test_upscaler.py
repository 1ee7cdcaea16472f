"""Stable Diffusion's x4 upscaler: our pictures are those of diffusers' pipeline, from folders and files both ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.convert import Components, convert, open_model
from ldm.checkpoint.low_res import read
from ldm.checkpoint.settings import read_json
from ldm.diffusion.augmentation import NoiseAugmentation
from ldm.diffusion.prediction import Sample
from ldm.diffusion.schedule import Discrete
from ldm.editing import upscale
from ldm.editing.canvas import pixels
from ldm.models.presets import UNETS
from ldm.models.unet.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.models.vae.scaling import at_scale
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.concat import UPSCALERS
from ldm.rng import Rng
from tests.parity.test_diffusers_folder import SCHEDULER, make, save
from tests.parity.test_pipelines import theirs_of

PROMPT, NEGATIVE, BOUND = "a red apple", "a green cross", 1e-3


def parts(augmentation: NoiseAugmentation | None = None) -> Components:
    """v prediction, an autoencoder of factor 4 and the published scaling factor."""
    made = make("upscale")
    vae = AutoencoderConfig(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32,
                            scaling_factor=UPSCALERS)  # fmt: skip
    autoencoder = Autoencoder(vae).eval()
    with torch.no_grad():
        autoencoder.post_quant_conv.weight *= UPSCALERS  # type: ignore[union-attr]
        made.network.class_embedding.weight *= 20  # the level is to be seen in the picture
    scheduler = SCHEDULER | {"prediction_type": "v_prediction"}
    return replace(made, autoencoder=autoencoder, codec=LatentCodec.of(autoencoder), scheduler=scheduler,
                   augmentation=augmentation)  # fmt: skip


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(4).integers(0, 255, (8, 12, 3), dtype=np.uint8))


def ours(folder: Path, photo: Image.Image, noise: Tensor, level: int) -> Tensor:
    pipe = TextToImage.load(folder)
    settings = Settings(steps=8, guidance=5.0, negative=NEGATIVE, size=(32, 48))
    given = pipe.concat.small(pixels(photo), level, Rng(0, (0,)).normal("low resolution", (3, 8, 12)))
    return pipe.decode(pipe.latents([PROMPT], settings, Rng(0, (0,)), x=noise, given=given), settings)


@pytest.mark.parametrize("level", [0, 20, 300])
def test_pictures_are_theirs(
    level: int, photo: Image.Image, noise: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small picture with noise of a level, which is told; attention to the text alone at the fine level."""
    import diffusers

    save(parts(), tmp_path / "ours")
    pipe = theirs_of(tmp_path / "ours")
    assert type(pipe).__name__ == "StableDiffusionUpscalePipeline"
    assert pipe.config.max_noise_level == 350
    low = pipe.low_res_scheduler.config
    assert (low.beta_schedule, low.beta_start, low.beta_end) == ("scaled_linear", 0.0001, 0.02)
    drawn = lambda shape, **_: Rng(0, (0,)).normal("low resolution", shape[1:])  # noqa: E731
    monkeypatch.setattr(diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale, "randn_tensor", drawn)
    how: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 5.0, "output_type": "pt", "latents": noise}
    expected = pipe(PROMPT, image=photo, noise_level=level, negative_prompt=NEGATIVE, **how).images * 2 - 1
    assert expected.shape == (1, 3, 32, 48)
    assert expected.std() > 0.01
    found = ours(tmp_path / "ours", photo, noise, level)
    assert (found - expected).abs().max() < BOUND
    pipe.save_pretrained(tmp_path / "theirs")
    assert (ours(tmp_path / "theirs", photo, noise, level) - expected).abs().max() < BOUND
    assert (ours(tmp_path / "ours", photo, noise, level + 40) - expected).abs().max() > BOUND  # the level is seen


def test_folders_and_single_files_keep_the_noise_on_the_small_picture(tmp_path: Path) -> None:
    told = NoiseAugmentation(schedule=Discrete(betas="linear", beta_start=0.001, beta_end=0.01, steps=500), levels=100)
    made = parts(told)
    save(made, tmp_path / "ours")
    assert TextToImage.load(tmp_path / "ours").augmentation == told
    convert(tmp_path / "ours", tmp_path / "one.safetensors", "single")
    convert(tmp_path / "one.safetensors", tmp_path / "back", "diffusers")
    back = TextToImage.load(tmp_path / "back")
    assert back.augmentation == told
    assert all(torch.equal(back.network.state_dict()[k], v) for k, v in made.network.state_dict().items())
    index = read_json(tmp_path / "ours" / "model_index.json")
    assert read(tmp_path / "ours", {k: v for k, v in index.items() if k != "max_noise_level"}).levels == 350


def test_the_published_network_is_theirs() -> None:
    """stabilityai/stable-diffusion-x4-upscaler's settings: names and shapes of its weights, on the meta device."""
    from diffusers import UNet2DConditionModel

    config = UNETS["x4_upscaler"]
    with torch.device("meta"):
        mine = {k: v.shape for k, v in UNet(config).state_dict().items()}
        theirs = UNet2DConditionModel(
            sample_size=128, in_channels=7, out_channels=4, block_out_channels=(256, 512, 512, 1024),
            down_block_types=config.down_block_types, up_block_types=config.up_block_types, attention_head_dim=8,
            cross_attention_dim=1024, only_cross_attention=[True, True, True, False], use_linear_projection=True,
            num_class_embeds=1000,
        )  # fmt: skip
    assert mine == {k: v.shape for k, v in theirs.state_dict().items()}


def test_the_python_call_and_what_it_refuses(photo: Image.Image, tmp_path: Path) -> None:
    save(parts(), tmp_path / "ours")
    pipe = TextToImage.load(tmp_path / "ours")
    settings = Settings(steps=2, guidance=3.0, seed=4)
    odd = photo.crop((0, 0, 11, 7))
    two = upscale(pipe, odd, PROMPT, settings=settings, count=2)
    assert [p.size for p in two] == [(44, 28)] * 2
    assert (np.asarray(two[0]) != np.asarray(two[1])).any()
    sized = upscale(pipe, odd, PROMPT, settings=replace(settings, size=(16, 24)))
    assert sized[0].size == (24, 16)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"level": 350}, r"must be in \[0, 349\], got 350"),
        ({"level": -1}, r"must be in \[0, 349\], got -1"),
        ({"tile": 4, "overlap": 4}, "overlap must be at least 1 and less than the tile's 4 pixels, got 4"),
    ]
    for how, line in cases:
        with pytest.raises(ValueError, match=line):
            upscale(pipe, odd, settings=settings, **how)
    with pytest.raises(ValueError, match="is told a small picture here: use `ldm edit upscale`"):
        pipe("a cat", steps=1)
    save(make("sd1"), tmp_path / "plain")
    with pytest.raises(ValueError, match="super-resolution: needs a U-Net with 7 channels and classes"):
        upscale(TextToImage.load(tmp_path / "plain"), photo, settings=settings)
    with pytest.raises(ValueError, match=r"levels must be in \[1, 1000\], the schedule's steps, got 0"):
        NoiseAugmentation(levels=0)


def test_an_autoencoder_at_another_scale_is_the_same() -> None:
    """Scaled latents and pictures, by a draw from the posterior too."""
    torch.manual_seed(1)
    config = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.7)
    plain = Autoencoder(config).eval()
    other = at_scale(plain, UPSCALERS)
    assert other.config.scaling_factor == UPSCALERS
    images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    a, b = LatentCodec.of(plain), LatentCodec.of(other)
    found, want = b.encode(images, noise), a.encode(images, noise)
    assert torch.allclose(found, want, atol=1e-5)
    assert (want - a.encode(images)).abs().max() > 0.01
    assert torch.allclose(b.decode(want), a.decode(want), atol=1e-5)
    with pytest.raises(ValueError, match=r"its scaling factor is 0\.7 and cannot become 0\.08333"):
        at_scale(Autoencoder(replace(config, use_quant_conv=False)), UPSCALERS)


def test_the_published_folder_s_index_is_read(tmp_path: Path) -> None:
    """As stabilityai's lists its parts, the watermarker and the safety checker left out."""
    save(parts(), tmp_path / "ours")
    index = read_json(tmp_path / "ours" / "model_index.json")
    assert index["_class_name"] == "StableDiffusionUpscalePipeline"
    assert index["low_res_scheduler"] == ["diffusers", "DDPMScheduler"]
    assert {"watermarker": [None, None], "safety_checker": [None, None]}.items() <= index.items()
    assert "requires_safety_checker" not in index
    assert open_model(tmp_path / "ours").augmentation == NoiseAugmentation()


def test_tiles_leave_no_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst case, a network that answers each tile's own mean: neighbours pass into each other over the overlap."""
    save(parts(), tmp_path / "ours")
    pipe = TextToImage.load(tmp_path / "ours")
    pipe.process, pipe.end = replace(pipe.process, prediction=Sample()), "data"
    sizes: set[tuple[int, ...]] = set()

    def mean(self: UNet, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        sizes.add(tuple(x.shape[2:]))
        return cond["concat"].mean((1, 2, 3), keepdim=True).expand_as(x)

    def larger(latents: Tensor, settings: Settings) -> Tensor:
        return latents[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3).clamp(-1, 1)

    monkeypatch.setattr(UNet, "forward", mean)
    monkeypatch.setattr(pipe, "decode", larger)
    ramp = np.broadcast_to(np.linspace(0, 255, 64)[None, :, None], (32, 64, 3)).astype(np.uint8)
    settings = Settings(steps=3, guidance=1.0, seed=4, spacing="trailing")
    drawn = upscale(pipe, Image.fromarray(ramp), settings=settings, level=0, tile=16, overlap=8)[0]
    assert sizes == {(16, 16)}
    found = np.asarray(drawn, int)
    assert found.shape == (128, 256, 3)
    apart = 8 / 63 * 255  # of neighbouring tiles' means
    profile = found.mean((0, 2))  # a little noise is left of the last step
    assert np.abs(np.diff(profile)).max() < 2 * apart / 9 + 2  # by a ramp; without: apart, 32
