"""Folders of the transformers' families: diffusers' pipelines draw with what we write; theirs are read here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoint.convert import Components, load_diffusers, open_model, save_diffusers
from ldm.checkpoint.single_transformer import usual_scheduler
from ldm.models.text import encode_texts
from tests.families import make

torch.set_num_threads(1)
KINDS = ("sd3", "sd3_no_t5", "flux", "flux_schnell", "pixart", "pixart_alpha", "zimage")
PIPELINES = {
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "pixart": "PixArtSigmaPipeline",
    "zimage": "ZImagePipeline",
}


def save(parts: Components, folder: Path, **options: Any) -> Path:
    save_diffusers(
        folder, network=parts.network, autoencoder=parts.autoencoder, text=parts.text, scheduler=parts.scheduler,
        **options,
    )  # fmt: skip
    return folder


def their_pipeline(kind: str, folder: Path) -> Any:
    import diffusers

    name = "PixArtAlphaPipeline" if kind == "pixart_alpha" else PIPELINES[kind.partition("_")[0]]
    index = json.loads((folder / "model_index.json").read_text())
    left = {k: None for k, v in index.items() if v == [None, None]}  # as that pipeline wants it said
    pipe = getattr(diffusers, name).from_pretrained(folder, **left)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(kind: str, pipe: Any, noise: Tensor) -> Tensor:
    """Their picture in [0, 1] after four steps, of guidance 4, which Z-Image's pipeline counts from 0."""
    scale = 3.0 if kind == "zimage" else 4.0
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": scale, "output_type": "pt"}
    if kind.startswith("flux"):
        noise = pipe._pack_latents(noise, 1, 4, *noise.shape[2:])
        settings["max_sequence_length"] = 256 if kind == "flux_schnell" else 512
    if kind.startswith("pixart"):
        settings |= {"clean_caption": False, "use_resolution_binning": False}
    return pipe("a red apple", latents=noise, height=16, width=16, **settings).images


@torch.no_grad()
def ours(kind: str, parts: Components, noise: Tensor, scheduler: Any) -> Tensor:
    """The same with our parts and their scheduler's steps."""
    sigmas = torch.linspace(1, 1 / 4, 4).tolist() if kind.startswith(("flux", "zimage")) else None
    scheduler.set_timesteps(4, **({"sigmas": sigmas} if sigmas else {}))
    texts = ["a red apple"] if kind.startswith("flux") else ["", "a red apple"]
    cond, x = encode_texts(parts.text, texts), noise
    if kind == "flux":
        cond["guidance"] = torch.tensor([4.0])
    for t in scheduler.timesteps:
        out = parts.network(x.expand(len(texts), -1, -1, -1), t.reshape(1), cond)[:, : noise.shape[1]]
        if len(texts) == 2:
            out = out[:1] + 4 * (out[1:] - out[:1])
        x = scheduler.step(out, t, x).prev_sample
    return (parts.codec.decode(x) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_their_pipeline_gives_our_picture(kind: str, tmp_path: Path) -> None:
    parts = make(kind, tmp_path / "t5")
    pipe = their_pipeline(kind, save(parts, tmp_path / "ours"))
    noise = torch.randn(1, 4, 8, 8)
    wanted = theirs(kind, pipe, noise)
    own = ours(kind, parts, noise, type(pipe.scheduler).from_config(pipe.scheduler.config))
    assert wanted.std() > 0.01
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-4)
    again = load_diffusers(tmp_path / "ours")
    assert [t.config.kind for t in again.text] == [t.config.kind for t in parts.text]
    assert torch.equal(ours(kind, again, noise, type(pipe.scheduler).from_config(pipe.scheduler.config)), own)


@pytest.mark.parametrize("kind", ["sd3", "sd3_no_t5", "flux", "pixart", "zimage"])
def test_their_folder_is_read_and_comes_back(kind: str, tmp_path: Path) -> None:
    """Written by their `save_pretrained`, whose settings have all keys."""
    parts = make(kind, tmp_path / "t5")
    pipe = their_pipeline(kind, save(parts, tmp_path / "ours"))
    pipe.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs/transformer").glob("*.safetensors"))) > 1
    read = load_diffusers(tmp_path / "theirs")
    for own, other in [
        (parts.network, read.network),
        (parts.autoencoder, read.autoencoder),
        *((a.model, b.model) for a, b in zip(parts.text, read.text, strict=True)),
    ]:
        state, found = own.state_dict(), other.state_dict()
        assert set(state) == set(found)
        assert all(torch.equal(found[k], v) for k, v in state.items())
    assert read.network.config == parts.network.config
    assert encode_texts(read.text, ["green"]).keys() == encode_texts(parts.text, ["green"]).keys()
    for key, value in encode_texts(parts.text, ["a green apple"]).items():
        assert torch.equal(encode_texts(read.text, ["a green apple"])[key], value), key


def test_the_published_scheduler_of_flux_dev_comes_back(tmp_path: Path) -> None:
    parts = make("flux", tmp_path / "t5")
    parts = replace(parts, scheduler=usual_scheduler(parts.network.config))
    folder = save(parts, tmp_path / "ours")
    theirs = their_pipeline("flux", folder).scheduler
    assert theirs.config.use_dynamic_shifting is True
    assert (theirs.config.base_shift, theirs.config.max_shift) == (0.5, 1.15)
    assert load_diffusers(folder).scheduler == parts.scheduler


def test_a_single_clip_tower_conditions_an_sd3_network(tmp_path: Path) -> None:
    parts = make("sd3_clip", tmp_path)
    folder = save(parts, tmp_path / "ours")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder_2"] == index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    again = load_diffusers(folder)
    assert [t.config for t in again.text] == [t.config for t in parts.text], "its last layer, not the one before it"
    for key, value in encode_texts(parts.text, ["an apple"]).items():
        assert torch.equal(encode_texts(again.text, ["an apple"])[key], value)
    assert type(their_pipeline("sd3", folder).transformer).__name__ == "SD3Transformer2DModel"


def test_variants_halves_and_leftovers(tmp_path: Path) -> None:
    parts = make("flux", tmp_path / "t5")
    folder = save(parts, tmp_path / "ours", dtype=torch.float16)
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder_2", "model")):
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
        (folder / part / "flax_model.msgpack").write_bytes(b"leftover")
    (folder / "image_encoder").mkdir()
    read = open_model(folder, variant=None)
    assert read.network["x_embedder.weight"].dtype == torch.float16
    torch.testing.assert_close(
        read.load().network.state_dict()["x_embedder.weight"], parts.network.state_dict()["x_embedder.weight"],
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "lost", "told"),
    [
        ("flux", ["text_encoder_2", "tokenizer_2"], "has no text_encoder_2 (T5), which FLUX.1 needs"),
        ("flux", ["text_encoder", "tokenizer"], "has no text_encoder (CLIP), which FLUX.1 needs"),
        ("pixart", ["text_encoder", "tokenizer"], "has no text_encoder (T5), which PixArt needs"),
        ("zimage", ["text_encoder", "tokenizer"], "has no text_encoder (Qwen3), which Z-Image needs"),
        ("sd3", ["text_encoder", "tokenizer"], "has no text_encoder (CLIP), which Stable Diffusion 3 needs"),
    ],
)
@pytest.mark.parametrize("nulls", [True, False])
def test_a_missing_encoder_is_named(kind: str, lost: list[str], told: str, nulls: bool, tmp_path: Path) -> None:
    import shutil

    folder = save(make(kind, tmp_path / "t5"), tmp_path / "ours")
    index = json.loads((folder / "model_index.json").read_text())
    for part in lost:
        shutil.rmtree(folder / part)
        index.pop(part)
        index |= {part: [None, None]} if nulls else {}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        load_diffusers(folder)
    assert str(error.value).endswith(told)


@pytest.mark.parametrize(
    ("kind", "take", "told"),
    [
        ("flux", [0], "FLUX.1 in diffusers' layout"),
        ("sd3", [0, 1], "may be 'none'"),
        ("pixart", [], "PixArt in"),
        ("zimage", [], "Z-Image in"),
    ],
)
def test_encoders_that_a_folder_cannot_hold(kind: str, take: list[int], told: str, tmp_path: Path) -> None:
    parts = make(kind, tmp_path / "t5")
    parts = replace(parts, text=[parts.text[i] for i in take])
    with pytest.raises(ValueError, match=told):
        save(parts, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
