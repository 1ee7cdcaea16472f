"""Single files of SD3, FLUX.1 and PixArt: written, read by diffusers' loaders, and read as strangers lay them out."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoint import maps
from ldm.checkpoint.convert import Components, convert, load_model, open_model, save_single
from ldm.checkpoint.families import FILES
from ldm.checkpoint.opened import shapes_of
from ldm.checkpoint.pairs import to_authors
from ldm.checkpoint.schedulers import scheduler_from_diffusers
from ldm.checkpoint.single_transformer import usual_scheduler
from ldm.cli import convert as cli
from ldm.diffusion.schedule import Flow
from ldm.models.transformers import presets
from tests.families import make
from tests.parity.test_transformer_folders import save

torch.set_num_threads(1)
KINDS = ("sd3", "sd3_no_t5", "sd3_clip", "flux", "flux_schnell", "pixart", "zimage")
NETWORK = "model.diffusion_model."


def single(parts: Components, path: Path, **options: Any) -> Path:
    save_single(
        path, network=parts.network, autoencoder=parts.autoencoder, text=parts.text, scheduler=parts.scheduler,
        **options,
    )  # fmt: skip
    return path


def states(parts: Components) -> list[dict[str, Tensor]]:
    return [m.state_dict() for m in (parts.network, parts.autoencoder, *(t.model for t in parts.text))]


def same(one: Components, other: Components) -> None:
    for own, found in zip(states(one), states(other), strict=True):
        assert set(own) == set(found)
        assert all(torch.equal(found[k], v) for k, v in own.items())


def stranger(path: Path, parts: dict[str, Tensor]) -> Path:
    """A file without our metadata."""
    save_file({k: v.contiguous() for k, v in parts.items()}, path)
    return path


def one_line(source: Path, told: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        open_model(source, **options)
    assert told in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_come_back_whole(kind: str, tmp_path: Path) -> None:
    parts = make(kind, tmp_path / "t5")
    again = load_model(single(parts, tmp_path / "model.safetensors"))
    same(parts, again)
    assert again.network.config == parts.network.config
    assert [t.config for t in again.text] == [t.config for t in parts.text]
    assert again.scheduler == parts.scheduler


def test_diffusers_loads_the_file_of_an_sd3(tmp_path: Path) -> None:
    """Network, autoencoder and a CLIP tower by `from_single_file`, with the folder's settings."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_sd3_t5_checkpoint_to_diffusers

    parts = make("sd3", tmp_path / "t5")
    folder, file = save(parts, tmp_path / "folder"), single(parts, tmp_path / "model.safetensors")
    network = SD3Transformer2DModel.from_single_file(str(file), config=str(folder), subfolder="transformer")
    vae = AutoencoderKL.from_single_file(str(file), config=str(folder), subfolder="vae")
    for own, theirs in ((parts.network, network), (parts.autoencoder, vae)):
        found = theirs.state_dict()
        assert all(torch.equal(found[k], v) for k, v in own.state_dict().items())
    stored = load_file(file)
    for place, name in ((0, "clip_l"), (1, "clip_g")):
        read = convert_ldm_clip_checkpoint(stored, remove_prefix=f"text_encoders.{name}.transformer.")
        wanted = load_file(folder / ("text_encoder_2" if place else "text_encoder") / "model.safetensors")
        assert {k: v for k, v in read.items() if k in wanted}.keys() == wanted.keys()
        assert all(torch.equal(read[k], v) for k, v in wanted.items())
    t5 = convert_sd3_t5_checkpoint_to_diffusers(stored)
    assert t5.keys() == parts.text[2].model.state_dict().keys()


def sd3_stranger(parts: Components, path: Path, *, encoders: tuple[str, ...] = ()) -> Path:
    """As Stability's files: no metadata, `encoders` inside; without the autoencoder, which is not of the usual size."""
    stored = load_file(single(parts, path))
    kept = {k: v for k, v in stored.items() if k.startswith(NETWORK) or k.split(".")[1] in encoders}
    return stranger(path, kept)


def wide_sd3(folder: Path) -> Components:
    """With heads of 64 channels, as all published ones have, and 16 latent channels."""
    from ldm.models import networks
    from ldm.models.vae.autoencoder import Autoencoder
    from tests.families import scrambled

    parts = make("sd3", folder)
    config = replace(
        parts.network.config, attention_head_dim=64, num_attention_heads=2, caption_projection_dim=128, in_channels=16,
        out_channels=16, sample_size=128,
    )  # fmt: skip
    vae = replace(parts.autoencoder.config, latent_channels=16)
    return replace(parts, network=scrambled(networks.build(config)), autoencoder=scrambled(Autoencoder(vae)))


def test_a_strangers_sd3_with_parts_from_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = wide_sd3(tmp_path / "t5")
    folder = save(parts, tmp_path / "folder")
    bare = sd3_stranger(parts, tmp_path / "bare.safetensors")
    one_line(
        bare, "holds no autoencoder (--vae FOLDER or FILE gives it; vae= in Python) and no text encoder clip_l (CLIP)"
    )
    one_line(bare, "no text encoder clip_l (CLIP), clip_g (CLIP) (--text FOLDER gives them", vae=folder)
    found = load_model(bare, text=folder, vae=folder)
    same(parts, found)
    assert found.network.config == parts.network.config
    assert found.scheduler["shift"] == 3.0
    shutil.rmtree(folder / "text_encoder_3")
    with caplog.at_level(logging.WARNING):
        without = load_model(bare, text=folder, vae=folder / "vae")
    assert [t.config.kind for t in without.text] == ["clip", "clip", "none"]
    assert "holds no T5: zeros stand in its place" in caplog.text


def test_a_t5_in_a_file_needs_a_tokenizer(tmp_path: Path) -> None:
    parts = wide_sd3(tmp_path / "t5")
    folder = save(parts, tmp_path / "folder")
    file = sd3_stranger(parts, tmp_path / "model.safetensors", encoders=("t5xxl",))
    one_line(file, "holds a T5 and, as all single files, no tokenizer for it: --text FOLDER", vae=folder)
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other/text_encoder_3/model.safetensors").unlink()
    t5 = {k: v + 1 for k, v in parts.text[2].model.state_dict().items()}
    save_file(t5, tmp_path / "other/text_encoder_3/model.safetensors")
    same(parts, load_model(file, text=tmp_path / "other", vae=folder))  # its own weights, that folder's tokenizer


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", NETWORK])
def test_flux_in_the_authors_names(prefix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The network alone with heads of 128 channels, ae.safetensors beside it, as published, and in 8 bits."""
    from ldm.models import networks
    from ldm.models.vae.autoencoder import Autoencoder
    from tests.families import scrambled

    parts = make("flux", tmp_path / "t5")
    config = replace(
        presets.FLUX_DEV, num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=40,
        pooled_projection_dim=12,
    )  # fmt: skip
    vae = replace(parts.autoencoder.config, latent_channels=16)
    parts = replace(parts, network=scrambled(networks.build(config)), autoencoder=scrambled(Autoencoder(vae)))
    parts.network.to(dtype).float()
    stored = load_file(single(parts, tmp_path / "all.safetensors"))
    net = {prefix + k.removeprefix(NETWORK): v.to(dtype) for k, v in stored.items() if k.startswith(NETWORK)}
    file = stranger(tmp_path / "flux1-dev.safetensors", net)
    assert prefix + "double_blocks.0.img_attn.qkv.weight" in net
    folder = save(parts, tmp_path / "folder")
    found = load_model(file, text=folder, vae=folder)
    same(parts, found)
    assert found.network.config == config
    assert found.scheduler["use_dynamic_shifting"] is True
    ae = stranger(tmp_path / "ae.safetensors", {k[4:]: v for k, v in stored.items() if k.startswith("vae.")})
    assert "encoder.down.0.block.0.conv1.weight" in load_file(ae)
    one_line(file, "missing", text=folder, vae=ae)  # it is taken for the published size
    convert(file, tmp_path / "out", "diffusers", text=folder, vae=folder)
    same(parts, load_model(tmp_path / "out"))


def test_scaled_float8_is_multiplied_out(tmp_path: Path) -> None:
    """Both of ComfyUI's forms, in a whole file."""
    parts = wide_sd3(tmp_path / "t5")
    folder = save(parts, tmp_path / "folder")
    stored = {
        k: v for k, v in load_file(sd3_stranger(parts, tmp_path / "a.safetensors")).items() if k.startswith(NETWORK)
    }
    key = f"{NETWORK}joint_blocks.0.x_block.attn.qkv"
    factor = stored[f"{key}.weight"].abs().max() / 448
    wanted = (stored[f"{key}.weight"] / factor).to(torch.float8_e4m3fn).float() * factor
    eight = stored | {f"{key}.weight": (stored[f"{key}.weight"] / factor).to(torch.float8_e4m3fn)}
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    first = {f"{NETWORK}scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn), f"{key}.scale_weight": factor}
    second = {f"{key}.weight_scale": factor, f"{key}.input_scale": torch.ones(()), f"{key}.comfy_quant": note}
    for name, more in (("first", first), ("second", second)):
        file = stranger(tmp_path / f"{name}.safetensors", eight | more)
        state = load_model(file, text=folder, vae=folder).network.state_dict()
        joined = torch.cat([state[f"transformer_blocks.0.attn.to_{x}.weight"] for x in "qkv"])
        assert torch.equal(joined, wanted)
    four = stored | {f"{key}.weight": stored[f"{key}.weight"][:, :64].to(torch.uint8), f"{key}.weight_scale": factor}
    one_line(stranger(tmp_path / "four.safetensors", four), "is uint8 with factors of shape []: of scaled weights only")


def test_pixart_as_its_authors_store_it(tmp_path: Path) -> None:
    """A .pth with a table of positions and T5's states of the empty prompt, which tell size and generation."""
    from ldm.models import networks
    from tests.families import scrambled

    parts = make("pixart", tmp_path / "t5")
    base = replace(
        presets.PIXART_TINY, attention_head_dim=72, num_attention_heads=1, cross_attention_dim=72, out_channels=8
    )
    for tokens, side, scale in ((300, 32, 0.5), (300, 128, 2.0), (120, 64, None)):
        config = replace(base, caption_channels=40, sample_size=side, interpolation_scale=scale)
        parts = replace(parts, network=scrambled(networks.build(config)))
        plan = to_authors(FILES["pixart"].pairs(config))
        file = maps.carry_out(plan, parts.network.state_dict(), "network")
        file |= {"pos_embed": torch.zeros(1, (side // 2) ** 2, 72), "y_embedder.y_embedding": torch.zeros(tokens, 40)}
        torch.save({"state_dict": file}, tmp_path / "model.pth")
        folder = save(parts, tmp_path / f"folder{side}")
        found = load_model(tmp_path / "model.pth", text=folder, vae=folder)
        assert found.network.config == config
        same(parts, found)
        assert found.text[0].config.max_length == tokens


def flux_meta(**changes: Any) -> dict[str, Tensor]:
    config = replace(
        presets.FLUX_TINY, attention_head_dim=128, num_attention_heads=1, axes_dims_rope=(16, 56, 56), **changes
    )
    state = {k: torch.zeros(v) for k, v in shapes_of(config).items()}
    return maps.carry_out(to_authors(FILES["flux"].pairs(config)), state, "network")


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: flux_meta(in_channels=128, out_channels=64), "it is FLUX.1 Depth or Canny (FluxControlPipeline)"),
        (lambda: flux_meta() | {"double_stream_modulation_img.lin.weight": torch.zeros(1)}, "it is FLUX.2"),
        (lambda: flux_meta() | {"distilled_guidance_layer.in_proj.weight": torch.zeros(1)}, "it is Chroma"),
        (lambda: {"transformer_blocks.0.attn.add_q_proj.weight": torch.zeros(1)}, "it is a transformer in diffusers'"),
        (lambda: {"img_in.weight.absmax": torch.zeros(1)}, "it is a model of 4-bit weights (bitsandbytes)"),
        (lambda: {"head.3.w": torch.zeros(1), "body.x.y.z": torch.zeros(1)}, "its 2 tensors are body.x, head"),
        (lambda: {k: v for k, v in flux_meta().items() if "txt_in" not in k}, "not a whole FLUX.1: no tensor 'txt_in"),
        (lambda: {k: v for k, v in flux_meta().items() if "norm.query" not in k}, "FLUX transformer: missing"),
    ],
)  # fmt: skip
def test_files_that_are_not_read_say_why(made: Any, told: str, tmp_path: Path) -> None:
    one_line(stranger(tmp_path / "x.safetensors", made()), told)


def test_tensors_that_are_not_known(tmp_path: Path) -> None:
    parts = wide_sd3(tmp_path / "t5")
    folder = save(parts, tmp_path / "folder")
    file = sd3_stranger(parts, tmp_path / "m.safetensors")
    more = {f"{NETWORK}joint_blocks.0.extra.weight": torch.zeros(2), "text_encoders.clip_l.logit_scale": torch.zeros(1)}
    stranger(file, load_file(file) | more)
    one_line(file, "network: not known 1 key(s): joint_blocks.0.extra.weight; --lenient", vae=folder, text=folder)
    same(load_model(file, vae=folder, text=folder, lenient=True), parts)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = make("flux_schnell", tmp_path / "t5")
    folder = save(parts, tmp_path / "folder")
    assert cli.main([str(folder), str(tmp_path / "one.safetensors"), "--to", "single"]) == 0
    assert f"single, tensors: transformer {len(parts.network.state_dict())}, vae" in capsys.readouterr().out
    assert cli.main([str(tmp_path / "one.safetensors"), str(tmp_path / "again"), "--to", "diffusers"]) == 0
    same(parts, load_model(tmp_path / "again"))
    for options, told in (
        (["--to", "compvis"], "format 'compvis' is for U-Nets"),
        (["--to", "single", "--text", str(tmp_path / "none")], "--text '.*none': no such folder"),
        (["--to", "single", "--vae", str(folder)], "--vae: is for single files"),
    ):
        with pytest.raises(ValueError, match=told):
            cli.main([str(folder), str(tmp_path / "two.safetensors"), *options])
    with pytest.raises(ValueError, match="--ema is for files of U-Nets"):
        open_model(tmp_path / "one.safetensors", ema=True)


def test_schedulers_of_strangers_files() -> None:
    for config, shift in ((presets.SD3_MEDIUM, 3.0), (presets.FLUX_SCHNELL, 1.0), (presets.FLUX_DEV, 3.0)):
        schedule = scheduler_from_diffusers(usual_scheduler(config)).schedule
        assert isinstance(schedule, Flow)
        assert schedule.shift == shift
    assert scheduler_from_diffusers(usual_scheduler(presets.PIXART_SIGMA)).prediction.kind == "epsilon"
