"""Editing with a tiny random model: what must stay stays exactly, and what must come back comes back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.grid import to_pil
from ldm.diffusion import Discrete, Process, V
from ldm.editing import Change, attention_maps, clip_guide, edit, encode, img2img, inpaint, invert, redraw
from ldm.models.presets import AUTOENCODERS, CLIPS, TEXTS, UNETS
from ldm.models.text import TextTower, build_clip
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.latents import LatentCodec
from ldm.pipeline import Settings, TextToImage
from ldm.rng import Rng

SETTINGS = Settings(sampler="ddim", steps=4, guidance=2.0)


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    torch.manual_seed(0)
    unet = UNet(UNETS["tiny"]).eval().requires_grad_(False)
    codec = LatentCodec.of(Autoencoder(AUTOENCODERS["tiny"]).eval().requires_grad_(False))
    process = Process(schedule=Discrete(zero_terminal_snr=True), prediction=V())
    return TextToImage(unet, codec, [TextTower(TEXTS["tiny"][0])], process, spacing="trailing")


@pytest.fixture
def picture(pipe: TextToImage) -> Image.Image:
    side = pipe.latent_shape(None)[1] * pipe.codec.factor
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.int64)


def test_img2img_is_the_sampler_from_the_noised_picture(pipe: TextToImage, picture) -> None:
    """Written out: the last half of the times, from alpha x_0 + sigma noise at the first of them."""
    drawn = img2img(pipe, picture, "a cat", strength=0.5, settings=SETTINGS)[0]
    x0, noise = encode(pipe, picture), Rng(0, (0,)).normal("start", pipe.latent_shape(None))
    denoise, cond, schedule = pipe.denoiser(SETTINGS), pipe.encode_text(["a cat"]), pipe.process.schedule
    alpha, sigma = schedule.at(499)
    x = alpha * x0 + sigma * noise
    for now, after in ((499, 249), (249, None)):
        (a, s), (b, c) = schedule.at(now), (1.0, 0.0) if after is None else schedule.at(after)
        clean = denoise(x, torch.full((1,), float(now)), cond)
        x = b * clean + c * (x - a * clean) / s
    assert np.abs(pixels(drawn) - pixels(to_pil(pipe.codec.decode(x).clamp(-1, 1))[0])).max() <= 1


@pytest.mark.parametrize("strength", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_strengths_that_are_none_are_refused(pipe: TextToImage, picture, strength: float) -> None:
    with pytest.raises(ValueError, match=f"strength must lie strictly between 0 .* and 1 .*, got {strength}"):
        img2img(pipe, picture, "a cat", strength=strength, settings=SETTINGS)


def test_inpainting_keeps_every_pixel_outside_the_mask(pipe: TextToImage, picture) -> None:
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (0, 0, picture.width // 2, picture.height))
    two = inpaint(pipe, picture, mask, "a cat", settings=SETTINGS, count=2)
    inside = np.asarray(mask) > 0
    for drawn in two:
        assert (pixels(drawn)[~inside] == pixels(picture)[~inside]).all()
        assert (pixels(drawn)[inside] != pixels(picture)[inside]).mean() > 0.5
    assert (pixels(two[0])[inside] != pixels(two[1])[inside]).any()
    with pytest.raises(ValueError, match=r"mask: 4 x 4 pixels, the picture has 32 x 32"):
        inpaint(pipe, picture, mask.resize((4, 4)), "a cat", settings=SETTINGS)


def test_a_nine_channel_model_is_told_the_mask_and_the_rest(pipe: TextToImage, picture) -> None:
    """The network's own input: noisy latents, mask, latents of the picture without its white; guidance doubles it."""
    torch.manual_seed(1)
    nine = UNet(replace(UNETS["tiny"], in_channels=9)).eval().requires_grad_(False)
    painter = TextToImage(nine, pipe.codec, pipe.text, pipe.process, spacing="trailing")
    mask = Image.new("L", picture.size, 0)
    half = (0, 0, picture.width // 2, picture.height)
    mask.paste(255, half)
    seen = []
    hook = nine.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    drawn = inpaint(painter, picture, mask, "a cat", settings=SETTINGS)[0]
    hook.remove()
    without = picture.copy()
    without.paste((127, 127, 127), half)  # the middle of [-1, 1], to half a grey level
    rest = encode(pipe, without)
    assert len(seen) == SETTINGS.steps
    for given in seen:
        assert given.shape == (2, 9, *rest.shape[2:])
        left = given[:, 4, :, : rest.shape[3] // 2]
        assert bool((left == 1).all())
        assert float(given[:, 4].sum()) == left.numel()
        assert torch.allclose(given[:, 5:], rest.expand(2, -1, -1, -1), atol=0.02)
    outside = np.asarray(mask) == 0
    assert (pixels(drawn)[outside] == pixels(picture)[outside]).all()
    odd = UNet(replace(UNETS["tiny"], in_channels=5))
    with pytest.raises(ValueError, match="takes 5 channels, expected 4 or 9"):
        inpaint(TextToImage(odd, pipe.codec, pipe.text, pipe.process), picture, mask, "a cat", settings=SETTINGS)


def test_inversion_comes_back(pipe: TextToImage, picture) -> None:
    exact = replace(SETTINGS, guidance=1.0, steps=50)
    noise = invert(pipe, picture, "a cat", settings=exact, refine=3)
    back = pixels(redraw(pipe, noise, "a cat", settings=exact)[0])
    with torch.no_grad():
        expected = pixels(to_pil(pipe.codec.decode(encode(pipe, picture)))[0])
    assert np.abs(back - expected).mean() < 0.1 * np.abs(expected - expected.mean()).mean()


def test_editing_into_the_same_prompt_changes_nothing(pipe: TextToImage) -> None:
    before, after = edit(pipe, "a red cat", "a red cat", change=Change(cross=1.0, own=1.0), settings=SETTINGS)
    plain = to_pil(pipe.sample(["a red cat"], settings=SETTINGS))[0]
    assert np.abs(pixels(before) - pixels(after)).max() <= 1
    assert np.abs(pixels(before) - pixels(plain)).max() <= 1
    _, other = edit(pipe, "a red cat", "a blue cat", change=Change(cross=0.0, own=0.0), settings=SETTINGS)
    alone = to_pil(pipe.sample(["a blue cat"], settings=SETTINGS))[0]
    assert np.abs(pixels(other) - pixels(alone)).max() <= 1
    with pytest.raises(ValueError, match="word 'dog' is not in the prompt"):
        edit(pipe, "a cat", "a red cat", change=Change(weights={"dog": 2.0}), settings=SETTINGS)


def test_one_map_a_word(pipe: TextToImage) -> None:
    picture, words = attention_maps(pipe, "a red, red cat", settings=SETTINGS)
    assert list(words) == ["a", "red", "cat"]
    assert all(w.size == picture.size for w in words.values())


def test_clip_guidance_raises_the_similarity(pipe: TextToImage) -> None:
    config = CLIPS["tiny"]
    clip = build_clip(config).eval().requires_grad_(False)
    from ldm.models.text import build_tokenizer

    def likeness(scale: float) -> float:
        images = pipe.sample(["a cat"], settings=SETTINGS, guide=clip_guide(pipe, clip, config, scale))
        images = torch.nn.functional.interpolate(images, size=(config.image_size,) * 2, mode="bilinear")
        text = clip.encode_text(build_tokenizer(config)(["a cat"]), normalize=True)
        return float((clip.encode_image(images, normalize=True) * text).sum())

    assert likeness(20.0) > likeness(0.0)
