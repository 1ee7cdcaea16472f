"""Pictures from prompts with random miniature models: guidance, seeds, sizes, and DDIM as diffusers runs it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion.prediction import V
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Discrete
from ldm.models.text import TextConfig, TextTower
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.latents import LatentCodec
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.models import usable
from ldm.rng import Rng
from ldm.sampling import sample
from ldm.sampling.guidance import projected
from tests import miniature

PROMPTS = ["a red dot", "", "a blue bar", "a green cross", "white"]


@pytest.fixture(scope="module")
def pipeline() -> TextToImage:
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in miniature.UNET.items()}))
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tower = TextTower(TextConfig(width=16, heads=2, layers=2, context_length=12, vocab_size=4096, bpe="emoji"))
    codec = LatentCodec.of(Autoencoder(miniature.VAE).eval())
    return TextToImage(unet.eval().requires_grad_(False), codec, [tower], Process(prediction=V()))


def draw(pipeline: TextToImage, prompts: list[str] = PROMPTS, **settings: Any) -> Tensor:
    return pipeline.sample(prompts, settings=Settings(**{"steps": 3, "guidance": 2.0} | settings))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_a_picture_does_not_depend_on_its_batch(pipeline: TextToImage, sampler: str) -> None:
    all_at_once = draw(pipeline, sampler=sampler)
    for batch in (1, 2):
        torch.testing.assert_close(draw(pipeline, sampler=sampler, batch=batch), all_at_once, rtol=0, atol=2e-5)
    again = draw(pipeline, sampler=sampler)
    assert torch.equal(again, all_at_once)
    assert (draw(pipeline, sampler=sampler, seed=1) - all_at_once).abs().flatten(1).amax(1).min() > 0.01


def test_pictures_of_one_prompt_differ_and_indices_name_them(pipeline: TextToImage) -> None:
    settings = Settings(steps=2)
    pictures = pipeline.sample(["a red dot"] * 3, settings=settings)
    assert (pictures[0] - pictures[1]).abs().max() > 0.01
    third = pipeline.sample(["a red dot"], settings=settings, indices=[2])
    torch.testing.assert_close(third[0], pictures[2], rtol=0, atol=2e-5)


def by_diffusers(pipeline: TextToImage, prompts: list[str], settings: Settings, **scheduler: Any) -> Tensor:
    """Latents by diffusers' DDIMScheduler and the U-Net, two calls a step with guidance, one without."""
    import diffusers

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ddim = diffusers.DDIMScheduler(**betas, prediction_type="v_prediction", clip_sample=False, **scheduler)
    ddim.set_timesteps(settings.steps)
    x = Rng(settings.seed, tuple(range(len(prompts)))).normal("start", (4, 8, 8))
    cond, uncond = pipeline.encode_text(prompts), pipeline.encode_text([settings.negative] * len(prompts))
    with torch.no_grad():
        for t in ddim.timesteps:
            when = t.repeat(len(prompts))
            out = pipeline.unet(x, when, cond)
            if settings.guidance != 1:
                free = pipeline.unet(x, when, uncond)
                out = free + settings.guidance * (out - free)
            x = ddim.step(out, t, x, eta=0.0).prev_sample
    return x


@pytest.mark.parametrize("guidance", [1.0, 0.0, 4.0])
@pytest.mark.parametrize("negative", ["", "a cross"])
def test_ddim_is_that_of_diffusers(pipeline: TextToImage, guidance: float, negative: str) -> None:
    """Guidance 1 is the conditional network alone, 0 the unconditional one."""
    settings = Settings(sampler="ddim", steps=10, guidance=guidance, negative=negative, spacing="trailing")
    ours = pipeline.latents(PROMPTS, settings, Rng(0, tuple(range(5))))
    theirs = by_diffusers(pipeline, PROMPTS, settings, timestep_spacing="trailing", set_alpha_to_one=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    images = pipeline.sample(PROMPTS, settings=settings)
    with torch.no_grad():
        decoded = pipeline.codec.autoencoder.decode(theirs / 0.9).clamp(-1, 1)
    torch.testing.assert_close(images, decoded, rtol=0, atol=1e-3)


def test_a_loaded_model_samples_as_its_scheduler_config_says(pipeline: TextToImage, tmp_path: Any) -> None:
    """Stable Diffusion's own config: leading spacing, an offset of 1, and a last step to the first noise level."""
    from ldm.checkpoint.convert import save_diffusers
    from ldm.checkpoint.schedulers import scheduler_to_diffusers

    scheduler = scheduler_to_diffusers(Discrete(), V())
    parts = {"network": pipeline.unet, "autoencoder": pipeline.codec.autoencoder, "text": pipeline.text}
    save_diffusers(tmp_path / "model", **parts, scheduler=scheduler)  # type: ignore[arg-type]
    loaded = TextToImage.load(tmp_path / "model")
    settings = Settings(sampler="ddim", steps=10, guidance=3.0)
    ours = loaded.latents(PROMPTS, settings, Rng(0, tuple(range(5))))
    theirs = by_diffusers(
        pipeline, PROMPTS, settings, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_guidance_of_one_never_asks_for_the_unconditional_half(pipeline: TextToImage) -> None:
    rows: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    draw(pipeline, guidance=1.0)
    draw(pipeline, guidance=3.0)
    hook.remove()
    assert rows == [5, 5, 5, 10, 10, 10]


@pytest.mark.parametrize(("size", "shape"), [(None, (4, 8, 8)), (32, (4, 16, 16)), ((16, 24), (4, 8, 12))])
def test_sizes(pipeline: TextToImage, size: Any, shape: tuple[int, ...]) -> None:
    assert pipeline.latent_shape(size) == shape
    picture = draw(pipeline, ["a red dot"], size=size, steps=1)
    assert picture.shape == (1, 3, 2 * shape[1], 2 * shape[2])


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (0, "size: 0 is not a multiple of 8 pixels from 8 on"),
        (-8, "size: -8 is not a multiple of 8 pixels from 8 on"),
        (20, "size: 20 is not a multiple of 8 pixels; the nearest are 16 and 24"),
        ((16, 1081), "size: 1081 is not a multiple of 8 pixels; the nearest are 1080 and 1088"),
        (16.0, "size: expected whole numbers of pixels, got 16.0"),
        (8_000_000, "size 8000000 x 8000000: one picture takes at least .* GiB of memory, there are .* --vae-tile"),
    ],
)
def test_sizes_that_cannot_be_made_are_refused(pipeline: TextToImage, size: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        draw(pipeline, size=size)


@pytest.mark.parametrize("size", [8, (24, 40), (8, 32), (40, 8)])
def test_odd_latents_are_drawn_down_to_one_pixel_of_8(size: Any) -> None:
    """Three halvings of 12 x 20 latent pixels, and of 4: where sides are odd, the way up is told the size."""
    deep: dict[str, Any] = {
        "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 16, "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 4, "up_block_types": ("CrossAttnUpBlock2D",) * 4,
        "attention_head_dim": 2, "sample_size": 8,
    }  # fmt: skip
    vae = Autoencoder(miniature.VAE).eval()
    tower = TextTower(TextConfig(width=16, heads=2, layers=2, context_length=12, vocab_size=4096, bpe="emoji"))
    pipe = TextToImage(UNet(UNetConfig(**deep)).eval(), LatentCodec.of(vae), [tower], Process(prediction=V()))
    settings = Settings(steps=1, guidance=2.0, size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert pipe.decode(pipe.latents(["x"], settings, Rng(0, (0,))), settings).shape == (1, 3, height, width)


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (24, 24), (16, 24)])
def test_sizes_near_the_models_own_say_nothing(pipeline: TextToImage, size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if size[0] * size[1] > 2 * 16 * 16:
            with pytest.warns(UserWarning, match="size 24 x 24 is far from the model's own 16 x 16"):
                pipeline.check(["a red dot"], Settings(size=size))
        else:
            pipeline.check(["a red dot"], Settings(size=size))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"size": 64}, "size 64 x 64 is far from the model's own 16 x 16: things may come twice"),
        ({"size": (8, 16)}, "size 8 x 16 is far from the model's own 16 x 16: little may be recognised"),
        ({"size": (8, 40)}, "size 8 x 40 is far from the model's own 16 x 16: things may come twice"),
        ({"guidance": 0.0}, "guidance 0 ignores the prompt.* 1 is the prompt alone"),
        ({"guidance": 0.5}, "guidance 0.5 is below 1: it weakens the prompt"),
        ({"guidance": 1.0, "negative": "blue"}, "the negative prompt has no effect: guidance 1 is none"),
        ({"negative": "(blue:1.2)"}, r"'\(blue:1.2\)' is read as words"),
        ({"negative": "blue <lora:x:1>", "weights": True}, "'<lora:x:1>': names in prompts load nothing"),
    ],
)
def test_what_may_surprise_is_said_once(pipeline: TextToImage, settings: dict[str, Any], says: str) -> None:
    with pytest.warns(UserWarning, match=says) as caught:
        pipeline.sample(["a red dot"] * 3, settings=Settings(**{"steps": 1, "guidance": 2.0, "batch": 2} | settings))
    assert len([w for w in caught if issubclass(w.category, UserWarning)]) == 1


def test_memory_that_a_size_does_not_get_is_explained(pipeline: TextToImage, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(pipeline.codec, "draw", full)
    with pytest.raises(ValueError, match="size 16 x 16, 5 at a time: not enough memory; take a smaller size or batch"):
        draw(pipeline)


@pytest.mark.parametrize("settings", [{}, {"sampler": "euler_ancestral"}, {"weights": True, "negative": "(blue:1.2)"}])
def test_one_of_a_batch_is_drawn_again_to_the_last_bit(pipeline: TextToImage, settings: dict[str, Any]) -> None:
    """Its batch is drawn whole, or another of its shape: what the other rows hold changes no bit."""
    chosen = Settings(**{"steps": 3, "guidance": 2.0, "batch": 3} | settings)
    every = pipeline.sample(PROMPTS, settings=chosen)
    ((places, images),) = pipeline.drawn(PROMPTS, settings=chosen, only=[4])
    assert places == [4]
    assert torch.equal(images[0], every[4])
    ((places, images),) = pipeline.drawn([PROMPTS[2]] * 3, settings=replace(chosen, batch=3), indices=[2] * 3, only=[2])
    assert torch.equal(images[0], every[2])


def test_batches_come_as_they_are_drawn(pipeline: TextToImage) -> None:
    settings = Settings(steps=1, guidance=2.0, batch=2)
    every, found = pipeline.sample(PROMPTS, settings=settings), []
    for places, images in pipeline.drawn(PROMPTS, settings=settings):
        assert all(torch.equal(image, every[i]) for i, image in zip(places, images, strict=True))
        found.append(places)
    assert found == [[0, 1], [2, 3], [4]]


def test_a_long_prompt_does_not_change_a_short_one_beside_it(pipeline: TextToImage) -> None:
    """Empty chunks of text would be looked at: a short prompt is drawn without them, whatever stands beside it."""
    settings = Settings(steps=2, guidance=2.0, long=True)
    long = "red dot green cross blue bar white " * 3
    assert pipeline.batches(["red", long, "dot"], settings) == [[0, 2], [1]]
    together = pipeline.sample(["red", long, "dot"], settings=settings)
    for i, prompt in enumerate(["red", long, "dot"]):
        alone = pipeline.sample([prompt], settings=settings, indices=[i])
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=2e-5)
    assert pipeline.batches(["red", "dot"], replace(settings, negative=long)) == [[0, 1]]
    assert pipeline.sample([long, "red"], settings=replace(settings, negative=long)).isfinite().all()


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 5, 10**25])
def test_any_seed_draws(pipeline: TextToImage, seed: int) -> None:
    first = draw(pipeline, ["a red dot"], seed=seed, sampler="ddpm")
    assert torch.equal(first, draw(pipeline, ["a red dot"], seed=seed, sampler="ddpm"))
    with pytest.raises(ValueError, match=r"seed must be a whole number, got 1\.5"):
        Settings(seed=1.5)  # type: ignore[arg-type]


def test_the_call_gives_pictures_prompt_by_prompt(pipeline: TextToImage) -> None:
    pictures = pipeline(["a red dot", "a blue bar"], count=2, steps=2, guidance=2.0)
    expected = draw(pipeline, ["a red dot", "a red dot", "a blue bar", "a blue bar"], steps=2)
    for picture, tensor in zip(pictures, expected, strict=True):
        levels = ((tensor + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
        assert np.abs(np.asarray(picture, dtype=float) - levels).max() <= 1
    with pytest.raises(ValueError, match="guidence"):
        pipeline("a red dot", guidence=2.0)
    with pytest.raises(ValueError, match="count"):
        pipeline("a red dot", count=0)


def test_progress_counts_the_steps_of_all_batches(pipeline: TextToImage) -> None:
    seen: list[tuple[int, int]] = []
    pipeline.sample(PROMPTS, settings=Settings(steps=3, batch=2), progress=lambda i, n: seen.append((i, n)))
    assert seen == [(i, 9) for i in range(1, 10)]


def test_a_long_prompt_is_said(pipeline: TextToImage) -> None:
    with pytest.warns(UserWarning, match=r"longer than 10.*blue"):
        draw(pipeline, ["red " * 10 + "blue"], steps=1)


def test_perpendicular_guidance_is_the_plain_one_where_the_negative_says_nothing_else(pipeline: TextToImage) -> None:
    """No negative prompt, or the prompt itself: nothing is left beside it to push away."""
    plain = draw(pipeline, ["a red dot"], guidance=3.0)
    for negative in ("", "a red dot"):
        found = draw(pipeline, ["a red dot"], guidance=3.0, guide="perpendicular", negative=negative)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)
    assert (
        draw(pipeline, ["a red dot"], guidance=3.0, guide="perpendicular", negative="blue") - plain
    ).abs().max() > 1e-3


def test_projected_guidance_is_that_of_the_function(pipeline: TextToImage) -> None:
    settings = Settings(steps=3, guidance=3.0, guide="projected")
    rng, denoise = Rng(0, (0,)), pipeline.process.denoiser(pipeline.unet)
    guided = projected(denoise, pipeline.encode_text([""]), 3.0)
    x, cond = rng.normal("start", pipeline.latent_shape(None)), pipeline.encode_text(["a red dot"])
    with torch.no_grad():
        wanted = sample("ddim", guided, x, cond, schedule=Discrete(), steps=3, noise=lambda i: x)
    torch.testing.assert_close(pipeline.latents(["a red dot"], settings, rng), wanted, rtol=0, atol=1e-4)


def test_outside_the_interval_nothing_guides(pipeline: TextToImage) -> None:
    free, guided = draw(pipeline, guidance=1.0), draw(pipeline, guidance=3.0)
    torch.testing.assert_close(draw(pipeline, guidance=3.0, interval=(0.0, 0.0)), free, rtol=0, atol=1e-4)
    torch.testing.assert_close(draw(pipeline, guidance=3.0, interval=(0.0, 1.0)), guided, rtol=0, atol=1e-4)
    some = draw(pipeline, guidance=3.0, interval=(0.5, 1.0))
    assert min(float((some - other).abs().max()) for other in (free, guided)) > 1e-3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"guide": "odd"}, r"guide must be one of \['cfg', 'projected', 'perpendicular'\], got 'odd'"),
        ({"guide": "projected", "rescale": 0.5}, "rescale: guide 'projected' has none, got 0.5"),
        ({"interval": (0.6, 0.5)}, r"interval must be two shares of T, 0 <= low <= high <= 1, got \(0.6, 0.5\)"),
    ],
)
def test_guidance_that_does_not_exist_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Settings(**settings)


def test_a_shipped_part_that_does_not_draw_says_what_it_is() -> None:
    name, told = "clip_emoji", "is .*; shipped models that draw: emoji, emoji_lcm, emoji_128, emoji_128_lcm$"
    with pytest.raises(ValueError, match=f"model '{name}' {told}"):
        TextToImage.load(name)
    with pytest.raises(ValueError, match=f"--base '{name}' {told}"):
        usable(name, "--base")
    assert usable(name, "task.vae") == name
