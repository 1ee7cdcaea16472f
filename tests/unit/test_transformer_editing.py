"""Editing with transformers: hands on joint attention and on PixArt's, prompt-to-prompt, maps, inversion on flows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.convert import save_diffusers
from ldm.diffusion import Flow, Process, Velocity
from ldm.editing import Change, attention_maps, edit, encode, invert, redraw
from ldm.models.attention import using
from ldm.models.control import attention_layers, controlled, looks_at_text
from ldm.models.networks import build
from ldm.pipeline import Settings, TextToImage
from ldm.pipeline.places import Places
from ldm.rng import Rng
from ldm.sampling import prompt_to_prompt as p2p
from ldm.sampling import sample
from ldm.sampling.editing import invert as invert_latents
from tests.families import make, network_config, scrambled

torch.set_num_threads(1)
KINDS = ("sd3", "flux", "pixart")
STEPS = Settings(sampler="euler", steps=2, guidance=2.0, size=(16, 24), seed=1)
TOKENS, CLIP = 4 * 6, 16
"""Image tokens of that size (2 x 2 latent pixels of 2 x 2 pixels), and text tokens of the small CLIP towers."""


@pytest.fixture(scope="module", params=KINDS)
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    folder = tmp_path_factory.mktemp(request.param)
    parts = make(request.param, folder / "t5")
    save_diffusers(
        folder / "m", network=parts.network, autoencoder=parts.autoencoder, text=parts.text, scheduler=parts.scheduler
    )
    return TextToImage.load(folder / "m")


def kind_of(pipe: TextToImage) -> str:
    return pipe.network.config.kind


def latents(pipe: TextToImage, prompts: list[str], **more: Any) -> Tensor:
    x = Rng(1, (0,)).normal("start", pipe.latent_shape(STEPS.size)).expand(len(prompts), -1, -1, -1)
    return pipe.latents(prompts, STEPS, Rng(1, tuple([0] * len(prompts))), x=x, **more)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_a_hand_sees_rows_that_sum_to_one_and_changes_nothing(pipe: TextToImage) -> None:
    """Each layer's queries are the picture's; cross weights go to as many keys as there are text tokens."""
    plain, seen = latents(pipe, ["a red apple"]), dict[str, list[Tensor]]()
    text = {"sd3": CLIP + 256, "flux": 512, "pixart": 300}[kind_of(pipe)]

    def hand(name: str, weights: Tensor) -> Tensor:
        assert weights.shape[2:] == (TOKENS, text if looks_at_text(name) else TOKENS), name
        seen.setdefault(name, []).append(weights)
        return weights

    with controlled(pipe.network, hand):
        held = latents(pipe, ["a red apple"])
    assert relative(held, plain) < 1e-5
    with controlled(pipe.network, hand), using("cpu", "reference"):
        held = latents(pipe, ["a red apple"])
    with using("cpu", "reference"):
        assert torch.equal(held, latents(pipe, ["a red apple"])), "bit for bit"
    one = torch.ones(())
    for name, found in seen.items():
        if name.endswith(".cross"):
            assert f"{name[:-6]}.own" in seen
        alone = not name.endswith((".attn.cross", ".attn.own"))
        for i, weights in enumerate(found):
            other = seen[name.replace(".attn.cross", ".attn.own")][i]
            total = weights.sum(-1) if alone else weights.sum(-1) + other.sum(-1)
            assert alone or name.endswith("own") or torch.allclose(total, one, atol=1e-5), name
            assert not alone or torch.allclose(total, one, atol=1e-5), name
    layers = attention_layers(pipe.network)
    assert {n.removesuffix(".cross").removesuffix(".own") for n in seen} == set(layers)
    assert all(layer.control is None for layer in layers.values())
    assert torch.equal(latents(pipe, ["a red apple"]), plain)


def test_the_source_is_left_as_it_is_and_the_same_prompt_gives_it(pipe: TextToImage) -> None:
    length = sum(part.length for part in Places.of(pipe.network, pipe.text).parts)
    plain = latents(pipe, ["a red apple", "a red apple"])
    control = p2p.PromptToPrompt([p2p.unchanged(length)], steps=STEPS.steps, cross=1, own=1, own_pixels=None)
    with controlled(pipe.network, control):
        got = latents(pipe, ["a red apple", "a red apple"], progress=control.progress)
    assert relative(got, plain) < 1e-5
    assert relative(got[1], got[0]) < 1e-5


def test_replaced_maps_are_the_source_s_and_a_weight_is_a_factor(pipe: TextToImage) -> None:
    """After the hand: every token of the swapped prompt has the source's map, one of them three times it."""
    places = Places.of(pipe.network, pipe.text)
    before, after, word = "a red apple", "a green apple", "green"
    made = places.edit(before, after)
    own = places.word(after, word)
    tripled = p2p.reweight(made, dict.fromkeys(own, 3.0))
    told: dict[str, Tensor] = {}
    for name, change in (("as it is", made), ("tripled", tripled)):
        control = p2p.PromptToPrompt([change], steps=STEPS.steps, cross=1, own=1, own_pixels=None)

        def hand(layer: str, weights: Tensor, control: Any = control, name: str = name) -> Tensor:
            out = control(layer, weights)
            if looks_at_text(layer):
                told.setdefault(name, out[-2:])
            return out

        with controlled(pipe.network, hand):
            latents(pipe, [before, after], progress=control.progress)
    source, edited = told["as it is"]
    assert torch.allclose(edited, source @ made.mapping, atol=1e-6)
    rest = [i for i in range(edited.shape[-1]) if i not in own]
    assert torch.allclose(told["tripled"][1][..., own], 3 * edited[..., own], atol=1e-6)
    assert torch.equal(told["tripled"][1][..., rest], edited[..., rest])
    assert float(edited[..., own].sum()) > 0


def test_joint_rows_still_sum_to_one() -> None:
    """Of a stretched, a reversed and an overflowing word; the text's rows are not touched."""
    from ldm.models.control import _joint

    torch.manual_seed(0)
    weights = torch.randn(2, 3, 9, 9, dtype=torch.float64).softmax(-1)  # 4 text tokens, 5 of the picture
    for factor in (2.0, -1.0, 1000.0):

        def hand(name: str, part: Tensor, factor: float = factor) -> Tensor:
            return torch.cat([part[..., :1] * factor, part[..., 1:]], -1) if name.endswith("cross") else part

        out = _joint(hand, "layer", weights, 5, True, True)
        assert torch.allclose(out.sum(-1), torch.ones((), dtype=torch.float64), atol=1e-12)
        assert torch.equal(out[:, :, :4], weights[:, :, :4])
        words = torch.cat([factor * weights[:, :, 4:, :1], weights[:, :, 4:, 1:4]], dim=-1)
        full = words.sum(-1, keepdim=True) > 1
        assert bool(full.any()) == (factor > 1)
        assert torch.allclose(out[:, :, 4:, :4], torch.where(full, words / words.sum(-1, keepdim=True), words))
        scale = out[:, :, 4:, 4:] / weights[:, :, 4:, 4:]
        assert torch.allclose(scale, scale[..., :1].expand_as(scale))


def test_words_stand_where_each_encoder_puts_them(pipe: TextToImage) -> None:
    """Against the encoders' own ids: CLIP's first, with a start token; T5's after them, without."""
    places = Places.of(pipe.network, pipe.text)
    found = places.word("a red apple", "apple")
    rows: list[int] = []
    if kind_of(pipe) == "sd3":
        rows += pipe.text[0].tokenizer(["a red apple"])[0].tolist()
    rows += pipe.text[-1].tokenizer(["a red apple"])[0].tolist()
    wanted = [*pipe.text[0].tokenizer.encode("apple"), *pipe.text[-1].tokenizer.encode("apple")]
    wanted = wanted if kind_of(pipe) == "sd3" else pipe.text[-1].tokenizer.encode("apple")
    assert [rows[i] for i in found] == wanted
    with pytest.raises(ValueError, match="word 'dog' is not in the prompt 'a red apple'"):
        places.word("a red apple", "dog")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.int64)


def test_edits_and_maps_of_whole_pictures(pipe: TextToImage) -> None:
    one, two = edit(pipe, "a red apple", "a red apple", change=Change(cross=1, own=1), settings=STEPS)
    assert np.abs(pixels(one) - pixels(two)).max() <= 1
    free = Change(cross=0.0, own=0.0)
    _, other = edit(pipe, "a red apple", "a green apple", change=free, settings=STEPS)
    alone, _ = edit(pipe, "a green apple", "a red apple", change=free, settings=STEPS)
    assert np.abs(pixels(other) - pixels(alone)).max() <= 1
    _, held = edit(pipe, "a red apple", "a green apple", change=Change(local=("red", "green")), settings=STEPS)
    assert held.size == (24, 16)
    picture, words = attention_maps(pipe, "a red apple", settings=STEPS)
    assert list(words) == ["a", "red", "apple"]
    assert {w.size for w in words.values()} == {picture.size} == {(24, 16)}


@pytest.mark.parametrize("kind", ["sd3", "flux_schnell"])
def test_inversion_on_flows_in_float64(kind: str) -> None:
    """From data to noise and back by Euler's method: refined until it stands still the round trip is exact."""
    torch.manual_seed(0)
    network = scrambled(build(network_config(kind)), 0.1).double()
    config = network.config
    cond = {
        "text": torch.randn(1, 5, config.joint_attention_dim, dtype=torch.float64),
        "pooled": torch.randn(1, config.pooled_projection_dim, dtype=torch.float64),
    }
    schedule = Flow(shift=3.0)
    denoise = Process(schedule=schedule, prediction=Velocity()).denoiser(network)
    x0 = torch.randn(1, network.latent_channels, 8, 12, dtype=torch.float64)
    errors = []
    for refine in (0, 3, 40):
        up = invert_latents(denoise, x0, cond, schedule=schedule, steps=8, refine=refine)
        back = sample("euler", denoise, up, cond, schedule=schedule, steps=8, noise=lambda i: x0)
        errors.append(relative(back, x0))
    assert (up - x0).abs().max() > 0.1
    assert errors[1] < errors[0] / 3
    assert errors[2] < 1e-12, errors


def test_a_picture_comes_back_from_its_noise(pipe: TextToImage) -> None:
    """Over the model's own times, whatever the settings' sampler is called."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    steps, bound = (50, 0.2) if kind_of(pipe) == "pixart" else (20, 0.1)  # without `refine` PixArt's is 0.36
    how = replace(STEPS, steps=steps, guidance=1.0, size=None, sampler="ddim")
    with torch.no_grad():
        noise = invert(pipe, image, "a red apple", settings=how, refine=4)
        decoded = pipe.decode(encode(pipe, image), how)
    back = pixels(redraw(pipe, noise, "a red apple", settings=how, size=image.size)[0])
    wanted = (decoded[0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(back - wanted).mean() < bound * np.abs(wanted - wanted.mean()).mean()


def test_a_network_without_words_says_so() -> None:
    from ldm.models.network import Network

    class Plain(Network):
        title = "plain network"
        forward = blocks = enable_gradient_checkpointing = correctable = lambda *_: None  # type: ignore[assignment]

    with (
        pytest.raises(ValueError, match="the plain network has no attention layers that can be watched or edited"),
        controlled(Plain(), lambda name, weights: weights),
    ):
        pass
