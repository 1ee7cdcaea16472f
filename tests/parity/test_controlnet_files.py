"""ControlNets in files: diffusers' folders both ways, and the authors' names against diffusers' converter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

from ldm.checkpoint import weights
from ldm.checkpoint.control_files import (
    is_control,
    load_control,
    names,
    open_control,
    save_control,
    save_control_single,
    write_single,
)
from ldm.config.load import decode
from ldm.models import presets
from ldm.models.families import check_control
from ldm.models.unet import ControlNet, ControlNetConfig
from tests.parity.test_controlnet import CASES, PUBLISHED, inputs, pair

torch.set_num_threads(1)


def same(a: ControlNet, b: Any) -> bool:
    mine, its = a.state_dict(), b.state_dict()
    return set(mine) == set(its) and all(torch.equal(mine[k], its[k]) for k in mine)


@pytest.mark.parametrize("name", ["sd1", "sdxl small", "shuffle"])
def test_folders_both_ways(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours, theirs = pair(CASES[name])
    theirs.save_pretrained(tmp_path / "theirs" / "controlnet")
    found = load_control(tmp_path / "theirs")
    assert found.config == ours.config
    assert same(found, theirs)
    save_control(tmp_path / "ours", ours.config, ours.state_dict())
    again = ControlNetModel.from_pretrained(tmp_path / "ours")
    x, t, cond, other = inputs(ours.config)
    assert torch.allclose(again(x, t, **other).mid_block_res_sample, ours(x, t, cond).mid, atol=1e-5)
    save_control(tmp_path / "ours", found.config, found.state_dict())  # over an old one
    assert same(load_control(tmp_path / "ours"), theirs)


@pytest.mark.parametrize("name", ["control_v11p_sd15_canny", "like an early one of SD 2.1"])
def test_the_authors_names_are_those_diffusers_reads(name: str) -> None:
    """At the published shapes, tensor by tensor: a marked tensor comes out where its native name says."""
    config = decode(ControlNetConfig, PUBLISHED[name], "config.json")
    table = names(config)
    told = {f"control_model.{other}": torch.full((1,), float(i)) for i, other in enumerate(table.values())}
    wanted = convert_controlnet_checkpoint(told, {"layers_per_block": 2})
    assert {k: float(v) for k, v in wanted.items()} == {native: float(i) for i, native in enumerate(table)}
    assert len(told) == len(table)
    assert table["controlnet_cond_embedding.conv_out.weight"] == "input_hint_block.14.weight"
    assert table["controlnet_mid_block.bias"] == "middle_block_out.0.bias"


def on_disk(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    weights.write_file(path, weights.of_state(tensors))
    return path


def narrow(name: str) -> dict[str, torch.Tensor]:
    """The authors' file of a published family: its shapes, but tensors that take no room."""
    with torch.device("meta"):
        model = ControlNet(decode(ControlNetConfig, PUBLISHED[name], "config.json"))
    table = names(model.config)
    return {f"control_model.{table[k]}": v for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", ["control_v11p_sd15_canny", "like an early one of SD 2.1"])
@pytest.mark.parametrize("form", ["control_model.", "", "whole"])
def test_a_file_of_the_authors_is_recognised_by_its_shapes(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {k.removeprefix("control_model.") if not form else k: v for k, v in narrow(name).items()}
    if form == "whole":
        tensors |= {"model.diffusion_model.out.0.weight": torch.zeros(1), "cond_stage_model.x": torch.zeros(1)}
    monkeypatch.setattr(weights, "open_file", lambda path: weights.of_state(tensors))
    monkeypatch.setattr(weights, "metadata", lambda path: {})
    (tmp_path / "control.safetensors").touch()
    config, source = open_control(tmp_path / "control.safetensors")
    wanted = decode(ControlNetConfig, PUBLISHED[name], "config.json")
    assert config == wanted or config.unet.heads == wanted.unet.heads
    with torch.device("meta"):
        assert weights.shapes(source) == {k: v.shape for k, v in ControlNet(wanted).state_dict().items()}


@pytest.mark.parametrize("name", [n for n in PUBLISHED if "sdxl" in n])
def test_sdxl_files_in_native_names_tell_which_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = decode(ControlNetConfig, PUBLISHED[name], "config.json")
    with torch.device("meta"):
        state = ControlNet(wanted).state_dict()
    monkeypatch.setattr(weights, "open_file", lambda path: weights.of_state(state))
    monkeypatch.setattr(weights, "metadata", lambda path: {})
    (tmp_path / "xl.safetensors").touch()
    config, source = open_control(tmp_path / "xl.safetensors")
    assert config.down_block_types == wanted.down_block_types
    with torch.device("meta"):
        assert weights.shapes(source) == {k: v.shape for k, v in ControlNet(config).state_dict().items()}


def test_single_files_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours, theirs = pair(CASES["sd2"])
    save_control_single(tmp_path / "control.safetensors", ours)
    assert is_control(tmp_path / "control.safetensors")
    found = load_control(tmp_path / "control.safetensors")
    assert found.config == ours.config
    assert same(found, theirs)


def test_bad_files_say_what_they_are(tmp_path: Path) -> None:
    ours, _ = pair(CASES["sdxl"])
    with pytest.raises(ValueError, match="no single file of their authors"):
        write_single(tmp_path / "x.safetensors", ours.config, {})
    other = on_disk(tmp_path / "other.safetensors", {"lora_controlnet": torch.zeros(1), "a.b.c": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"other\.safetensors: no ControlNet: it is a Control-LoRA"):
        load_control(other)
    assert not is_control(other)
    with pytest.raises(ValueError, match="no such file or folder"):
        load_control(tmp_path / "nothing")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match=r"its config\.json is of 'UNet2DConditionModel', not one of"):
        load_control(tmp_path / "unet")
    small, _ = pair(CASES["sd1"])
    save_control_single(tmp_path / "less.safetensors", small)
    less = {k: e.read() for k, e in weights.open_file(tmp_path / "less.safetensors").items()}
    del less["control_model.zero_convs.1.0.weight"]
    weights.write_file(
        tmp_path / "less2.safetensors", weights.of_state(less), metadata=weights.metadata(tmp_path / "less.safetensors")
    )
    with pytest.raises(ValueError, match=r"ControlNet: missing .*zero_convs\.1\.0\.weight"):
        load_control(tmp_path / "less2.safetensors")


def test_another_family_is_refused_in_one_line_naming_both() -> None:
    wanted = {n: decode(ControlNetConfig, PUBLISHED[n], "config.json") for n in PUBLISHED}
    for name, preset in (
        ("control_v11p_sd15_canny", "sd15"), ("like an early one of SD 2.1", "sd21"),
        ("like controlnet-canny-sdxl-1.0-small", "sdxl"), ("controlnet-canny-sdxl-1.0", "sdxl"),
        ("control_v11p_sd15_canny", "sd15_inpainting"), ("control_v11p_sd15_canny", "lcm_sd15"),
    ):  # fmt: skip
        check_control(wanted[name], presets.UNETS[preset], "edges", "base")
    line = re.escape(
        "'xl' is a ControlNet of Stable Diffusion XL, but 'mine' is Stable Diffusion 1: block_out_channels"
    )
    with pytest.raises(ValueError, match=line):
        check_control(wanted["controlnet-canny-sdxl-1.0"], presets.UNETS["sd15"], "'xl'", "'mine'")
    with pytest.raises(
        ValueError, match="of Stable Diffusion 1, but 'mine' is Stable Diffusion 2: cross_attention_dim"
    ):
        check_control(wanted["control_v11p_sd15_canny"], presets.UNETS["sd21"], "'c'", "'mine'")
    with pytest.raises(ValueError, match=r"of Stable Diffusion 1, but 'mine' is FLUX\.1"):
        check_control(wanted["control_v11p_sd15_canny"], presets.PRESETS["flux_dev"], "'c'", "'mine'")
