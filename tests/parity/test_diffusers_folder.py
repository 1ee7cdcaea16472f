"""Folders that we write load in diffusers, and theirs load here, with the same pictures; damaged ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import weights
from ldm.checkpoint.convert import Components, load_diffusers, save_diffusers
from ldm.models.text import TextConfig, TextTower, encode_texts
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec

torch.set_num_threads(1)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 32,
}
TEXT: dict[str, Any] = {"width": 32, "heads": 2, "layers": 3, "context_length": 16, "vocab_size": 4096, "bpe": "emoji"}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 44}


def tower(**changes: Any) -> TextTower:
    tower = TextTower(TextConfig(**TEXT | changes))
    torch.nn.init.normal_(tower.model.ln_final.bias)
    return tower


def make(family: str) -> Components:
    torch.manual_seed(0)
    unet = {
        "sd1": UNET,
        "sd2": UNET | {"use_linear_projection": True},
        "sdxl": UNET | XL | {"use_linear_projection": True, "cross_attention_dim": 64},
        "inpainting": UNET | {"in_channels": 9},
        "instruct": UNET | {"in_channels": 8},
        "instruct_xl": UNET | XL | {"use_linear_projection": True, "cross_attention_dim": 64, "in_channels": 8},
        "upscale": UNET | {"in_channels": 7, "num_class_embeds": 1000, "only_cross_attention": (True, False)},
        "lcm": UNET | {"time_cond_proj_dim": 16},
    }[family]
    text = {
        "sd1": [tower()],
        "sd2": [tower(activation="gelu", pad="zero", output="penultimate_norm", projection=16)],
        "sdxl": [
            tower(output="penultimate", zero_empty=True),
            tower(output="penultimate", projection=20, pad="zero", activation="gelu", zero_empty=True),
        ],
    }.get(family.removeprefix("instruct_").replace("xl", "sdxl") if "_" in family else family) or [tower()]
    model = UNet(UNetConfig(**unet))
    for parameter in model.parameters():  # nothing may start at zero
        torch.nn.init.normal_(parameter, std=0.05)
    vae = Autoencoder(
        AutoencoderConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=16)
    )
    return Components(model.eval(), vae.eval(), LatentCodec.of(vae), text, dict(SCHEDULER))


def save(parts: Components, folder: Path, **options: Any) -> None:
    save_diffusers(
        folder,
        network=parts.network,
        autoencoder=parts.autoencoder,
        text=parts.text,
        scheduler=parts.scheduler,
        augmentation=parts.augmentation,
        **options,
    )


@torch.no_grad()
def picture(parts: Components, noise: Tensor, scheduler: Any, extra: dict[str, Tensor] | None = None) -> Tensor:
    """Ten DDIM steps with guidance 5, one network call at a time; images (B, 3, H, W) in [-1, 1]."""
    scheduler.set_timesteps(10)
    cond, uncond = encode_texts(parts.text, ["a red apple"]), encode_texts(parts.text, [""])
    x = noise
    for t in scheduler.timesteps:
        outs = []
        for c in (uncond, cond):
            c = c | (extra or {})
            if parts.network.config.addition_embed_type:
                c = c | {"time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
            outs.append(parts.network(x, t.reshape(1), c))
        out = outs[0] + 5 * (outs[1] - outs[0])
        x = scheduler.step(out, t, x).prev_sample
    return parts.codec.decode(x)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_their_pipeline_gives_our_picture(family: str, tmp_path: Path) -> None:
    import diffusers

    parts = make(family)
    save(parts, tmp_path / "ours")
    cls = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipe = (
        cls.from_pretrained(tmp_path / "ours", add_watermarker=False)
        if family == "sdxl"
        else cls.from_pretrained(tmp_path / "ours")
    )
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8)
    settings: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "pt"}
    theirs = pipe("a red apple", latents=noise, height=16, width=16, **settings).images * 2 - 1
    ours = picture(parts, noise, diffusers.DDIMScheduler.from_config(SCHEDULER)).clamp(-1, 1)
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() < 1e-3

    pipe.save_pretrained(tmp_path / "theirs")  # transformers 5 writes tokenizer.json in place of two files
    again = load_diffusers(tmp_path / "theirs")
    assert (picture(again, noise, pipe.scheduler).clamp(-1, 1) - theirs).abs().max() < 1e-3
    back = load_diffusers(tmp_path / "ours")
    assert all(
        torch.equal(a, b) for a, b in zip(back.network.state_dict().values(), parts.network.state_dict().values())
    )


@pytest.mark.parametrize(
    ("family", "cls"), [("inpainting", "StableDiffusionInpaintPipeline"), ("lcm", "LatentConsistencyModelPipeline")]
)
def test_other_pipelines_load(family: str, cls: str, tmp_path: Path) -> None:
    import diffusers

    parts = make(family)
    save(parts, tmp_path / "ours")
    if family == "lcm":
        about = json.loads((tmp_path / "ours/scheduler/scheduler_config.json").read_text())
        (tmp_path / "ours/scheduler/scheduler_config.json").write_text(
            json.dumps(about | {"_class_name": "LCMScheduler"})
        )
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(pipe).__name__ == cls
    x, text = torch.randn(1, parts.network.config.in_channels, 8, 8), torch.randn(1, 5, 32)
    with torch.no_grad():
        theirs = pipe.unet(x, torch.tensor([7]), encoder_hidden_states=text).sample
        ours = parts.network(x, torch.tensor([7]), {"text": text})
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_half_precision_shards_and_variants(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    parts = make("sd1")
    save(parts, tmp_path / "half", dtype=torch.float16, shard_bytes=100_000)
    assert len(list((tmp_path / "half/unet").glob("*-of-*.safetensors"))) > 1
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "half/unet")
    ours = load_diffusers(tmp_path / "half").network
    for key, value in parts.network.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value.half().float())
        assert torch.equal(theirs.state_dict()[key], value.half().to(theirs.dtype))
    theirs.to(torch.float16).save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size="100KB")
    assert not (tmp_path / "variant/diffusion_pytorch_model.safetensors").exists()
    found = weights.open_folder(tmp_path / "variant", "diffusion_pytorch_model", "fp16")
    assert set(found) == set(ours.state_dict())
    assert set(weights.open_folder(tmp_path / "variant", "diffusion_pytorch_model")) == set(found)


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    parts = make("sd1")
    save(parts, tmp_path / "m")
    state = dict(parts.network.state_dict())
    state["conv_in.weight"] = torch.zeros(16, 5, 3, 3)
    state["more.weight"] = state.pop("conv_out.bias")
    weights.write_file(tmp_path / "m/unet/diffusion_pytorch_model.safetensors", weights.of_state(state))
    with pytest.raises(
        ValueError, match=r"missing 1 key.*conv_out\.bias; not known 1 key.*more\.weight; wrong shape 1"
    ) as e:
        load_diffusers(tmp_path / "m")
    assert "conv_in.weight [16, 5, 3, 3] instead of [16, 4, 3, 3]" in str(e.value)
    (tmp_path / "m/unet/diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "m/unet/diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin: refused"):
        load_diffusers(tmp_path / "m")
    with pytest.raises(ValueError, match="model_index"):
        load_diffusers(tmp_path)


def test_an_old_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    parts = make("sd1")
    save(parts, tmp_path / "m")
    before = (tmp_path / "m/unet/config.json").stat().st_ino
    broken = dict(SCHEDULER, betas={1})  # not JSON
    parts.scheduler = broken
    with pytest.raises(TypeError):
        save(parts, tmp_path / "m")
    assert (tmp_path / "m/unet/config.json").stat().st_ino == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
