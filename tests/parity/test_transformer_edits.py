"""img2img and inpainting of SD3 and FLUX.1: `ldm.editing` gives what diffusers' pipelines give."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.convert import convert, save_diffusers
from ldm.editing import img2img, inpaint
from ldm.models import networks
from ldm.models.vae.autoencoder import Autoencoder
from ldm.pipeline import Settings, TextToImage
from ldm.rng import Rng
from tests.families import make, scrambled

torch.set_num_threads(1)
DYNAMIC = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 4,
    "max_image_seq_len": 64,
}  # fmt: skip
STEPS, PROMPT, NEGATIVE = 7, "a red apple", "a green apple"
MODULES = {
    "sd3": "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "flux": "diffusers.pipelines.flux.pipeline_flux",
}
CLASSES = {"sd3": "StableDiffusion3", "flux": "Flux"}


@pytest.fixture(scope="module", params=["sd3", "flux"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A folder of 16 latent channels, which their SD3 pipeline asks for before it blends; FLUX.1's shift is dynamic."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    parts = make(kind, folder / "t5")
    channels = 16 if kind == "sd3" else 64
    torch.manual_seed(1)
    network = scrambled(networks.build(replace(parts.network.config, in_channels=channels, out_channels=channels)), 0.2)
    autoencoder = scrambled(Autoencoder(replace(parts.autoencoder.config, latent_channels=16)), 0.1)
    scheduler = parts.scheduler if kind == "sd3" else DYNAMIC
    save_diffusers(folder / "m", network=network, autoencoder=autoencoder, text=parts.text, scheduler=scheduler)
    return kind, folder / "m"


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def theirs(
    kind: str,
    what: str,
    folder: Path,
    noise: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    **told: Any,
) -> tuple[Tensor, int]:
    """Their latents (1, Z, h, w), with this noise and the mean of their posterior, and how many steps they took."""
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    index = json.loads((folder / "model_index.json").read_text())
    left = {k: None for k, v in index.items() if v == [None, None]}
    pipe: Any = getattr(diffusers, f"{CLASSES[kind]}{what}Pipeline").from_pretrained(folder, **left)
    pipe.set_progress_bar_config(disable=True)
    module = importlib.import_module(f"{MODULES[kind]}_{what.lower()}")
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: noise.reshape(shape))
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    told |= {"negative_prompt": NEGATIVE} if kind == "sd3" else {}
    done: list[int] = []
    found = pipe(
        PROMPT, height=size[0], width=size[1], num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kept: done.append(i) or kept, **told,
    ).images  # fmt: skip
    if kind == "flux":
        found = pipe._unpack_latents(found, size[0], size[1], pipe.vae_scale_factor)
    return found, len(done)


def ours(pipe: TextToImage, call: Any) -> Tensor:
    """The latents that the call's pictures are drawn of."""
    seen: list[Tensor] = []
    draw = pipe.decode

    def decode(latents: Tensor, settings: Settings) -> Tensor:
        seen.append(latents)
        return draw(latents, settings)

    pipe.decode = decode  # type: ignore[method-assign]
    call(pipe)
    return seen[0]


def settings_of(kind: str) -> Settings:
    negative = NEGATIVE if kind == "sd3" else ""
    return Settings(sampler="euler", steps=STEPS, guidance=4.0, negative=negative, seed=3)


def close(own: Tensor, wanted: Tensor) -> None:
    assert wanted.std() > 0.1
    error = float((own - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-3, error


@pytest.mark.parametrize("strength", [0.3, 0.55, 0.9])
@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_img2img(
    model: tuple[str, Path], size: tuple[int, int], strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same latents with the same noise, and as many steps at every strength."""
    kind, folder = model
    pipe, image = TextToImage.load(folder), picture(*size)
    noise = Rng(3, (0,)).normal("start", pipe.latent_shape(size))
    wanted, steps = theirs(kind, "Img2Img", folder, noise, monkeypatch, size, image=image, strength=strength)
    counted: list[int] = []
    count = lambda done, total: counted.append(total)  # noqa: E731
    own = ours(pipe, lambda p: img2img(p, image, PROMPT, strength=strength, settings=settings_of(kind), progress=count))
    assert set(counted) == {steps}
    close(own, wanted)


@pytest.mark.parametrize("strength", [0.55, 1.0])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_inpainting(
    model: tuple[str, Path], size: tuple[int, int], strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their blend of x_t after each step and ours of the estimates of x_0 are one algorithm for Euler's method."""
    kind, folder = model
    pipe, image = TextToImage.load(folder), picture(*size)
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (4, 2, 12, 12))
    noise = Rng(3, (0,)).normal("start", pipe.latent_shape(size))
    told = {"image": image, "mask_image": mask, "strength": strength}
    wanted, _ = theirs(kind, "Inpaint", folder, noise, monkeypatch, size, **told)
    own = ours(pipe, lambda p: inpaint(p, image, mask, PROMPT, strength=strength, settings=settings_of(kind)))
    close(own, wanted)
    other = ours(
        TextToImage.load(folder),
        lambda p: img2img(p, image, PROMPT, strength=min(strength, 0.99), settings=settings_of(kind)),
    )
    assert (other - own).abs().max() > 0.1, "the mask matters"


@pytest.fixture(scope="module")
def fill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 Fill as it is published, with fewer channels a mask pixel since the autoencoder shrinks by 2."""
    folder = tmp_path_factory.mktemp("fill")
    parts = make("flux", folder / "t5")
    torch.manual_seed(1)
    config = replace(parts.network.config, in_channels=4 * (16 + 16 + 4), out_channels=64)
    network = scrambled(networks.build(config), 0.2)
    autoencoder = scrambled(Autoencoder(replace(parts.autoencoder.config, latent_channels=16)), 0.1)
    save_diffusers(folder / "m", network=network, autoencoder=autoencoder, text=parts.text, scheduler=DYNAMIC)
    assert json.loads((folder / "m" / "model_index.json").read_text())["_class_name"] == "FluxFillPipeline"
    return folder / "m"


@pytest.mark.parametrize(("strength", "size"), [(1.0, (16, 24)), (0.55, (24, 16))])
def test_fill(fill: Path, size: tuple[int, int], strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """FluxFillPipeline's latents, at a mask whose edge lies within a latent pixel; all of them are drawn."""
    pipe, image = TextToImage.load(fill), picture(*size)
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (3, 2, 12, 13))
    noise = Rng(3, (0,)).normal("start", pipe.latent_shape(size))
    told = {"image": image, "mask_image": mask, "strength": strength}
    wanted, _ = theirs("flux", "Fill", fill, noise, monkeypatch, size, **told)
    drawn: list[Image.Image] = []
    settings = settings_of("flux")
    own = ours(pipe, lambda p: drawn.extend(inpaint(p, image, mask, PROMPT, strength=strength, settings=settings)))
    close(own, wanted)
    outside = np.asarray(mask) == 0
    assert (np.asarray(drawn[0])[outside] == np.asarray(image)[outside]).all()
    mask.paste(255, (3, 2, 13, 13))  # one column more, within the same latent pixels
    other = ours(
        TextToImage.load(fill), lambda p: inpaint(p, image, mask, PROMPT, strength=strength, settings=settings)
    )
    assert (other - own).abs().max() > 0.01, "every pixel of the mask is told"


def test_fill_is_told_apart(fill: Path, tmp_path: Path) -> None:
    """It keeps its kind through a single file, draws as its guide says, and draws nothing from text alone."""
    pipe = TextToImage.load(fill)
    assert pipe.habit == ("euler", 50, 30.0)
    with pytest.raises(ValueError, match="is told a picture and a mask here: use `ldm edit inpaint`"):
        pipe.sample([PROMPT], settings=replace(settings_of("flux"), size=(16, 16)))
    convert(fill, tmp_path / "fill.safetensors", "single")
    convert(tmp_path / "fill.safetensors", tmp_path / "again", "diffusers")
    again = TextToImage.load(tmp_path / "again")
    for key, value in pipe.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[key])
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == "FluxFillPipeline"
