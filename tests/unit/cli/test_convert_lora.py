"""`ldm convert --to lora | kohya`: a tuned model's difference from its base, as a file that gives it back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.adapters.low_rank import LowRank
from ldm.adapters.sites import all_sites
from ldm.checkpoint import weights
from ldm.checkpoint.convert import Components
from ldm.checkpoint.lora_files import write_lora
from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.cli.convert import main
from ldm.diffusion.prediction import Epsilon, V
from ldm.diffusion.schedule import Discrete
from ldm.pipeline import TextToImage
from tests.parity.test_diffusers_folder import make, save

LAYERS = (
    "unet.mid_block.resnets.0.conv1",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "text_encoder.text_model.encoder.layers.1.self_attn.v_proj",
)


@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_the_file_gives_the_tuned_weights_back(form: str, tmp_path: Path) -> None:
    parts = make("sd1")
    save(parts, tmp_path / "base")
    sites = all_sites(parts.network, parts.text)
    with torch.no_grad():
        for name in LAYERS:
            weight = sites[name].read()
            weight += (0.1 * torch.randn(len(weight), 2) @ torch.randn(2, weight[0].numel())).view(weight.shape)
    save(parts, tmp_path / "tuned")
    target = tmp_path / "x.safetensors"
    argv = [str(tmp_path / "tuned"), str(target), "--to", form, "--base", str(tmp_path / "base")]
    assert main([*argv, "--rank", "2"]) == 0
    pipeline = TextToImage.load(tmp_path / "base")
    pipeline.load_lora(target)
    found = all_sites(pipeline.unet, pipeline.text)
    assert all(torch.allclose(found[n].read(), sites[n].read(), atol=1e-5) for n in sites)
    save(make("sd2"), tmp_path / "other")
    with pytest.raises(ValueError, match="of different form"):
        main([str(tmp_path / "other"), *argv[1:]])
    with pytest.raises(ValueError, match="the same weights: nothing to extract"):
        main([str(tmp_path / "base"), *argv[1:]])
    with pytest.raises(ValueError, match=r"--to \w+: needs --base"):
        main(argv[:-2])
    with pytest.raises(ValueError, match=r"expected a file ending in \.safetensors"):
        main([argv[0], str(tmp_path / "folder"), *argv[2:]])


def corrected(folder: Path, name: str) -> Tensor:
    pipeline = TextToImage.load(folder)
    return all_sites(pipeline.unet, pipeline.text)[name].read()


def small_lora(parts: Components) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """A correction of three layers, and the weights that it makes."""
    sites, lora, wanted = all_sites(parts.network, parts.text), {}, {}
    g = torch.Generator().manual_seed(3)
    for name in LAYERS:
        base = sites[name].read()
        down, up = torch.randn(2, *base.shape[1:], generator=g), torch.randn(len(base), 2, generator=g)
        lora[name] = LowRank(0.1 * down, up.view(len(base), 2, *[1] * (base.ndim - 2)), 1.0)
        wanted[name] = (base.double() + lora[name].delta(base)).float()
    return lora, wanted


@pytest.mark.parametrize("to", ["diffusers", "compvis"])
@pytest.mark.parametrize("source", ["file", "run"])
def test_a_lora_is_merged_into_its_base(to: str, source: str, tmp_path: Path) -> None:
    parts = make("sd1")
    save(parts, tmp_path / "base")
    lora, wanted = small_lora(parts)
    export = tmp_path / "run" / "export"
    write_lora(export / "pytorch_lora_weights.safetensors", lora, parts.network.config)
    told = {"base": str(tmp_path / "base"), "loras": ["pytorch_lora_weights.safetensors"], "embeddings": []}
    (export / "adapter.json").write_text(json.dumps(told))
    target = tmp_path / ("out" if to == "diffusers" else "out.safetensors")
    what = [str(export / "pytorch_lora_weights.safetensors")] if source == "file" else [str(tmp_path / "run")]
    if source == "file":
        with pytest.raises(ValueError, match="needs --base"):
            main([*what, str(target), "--to", to])
    assert main([*what, str(target), "--to", to, *(["--base", told["base"]] if source == "file" else [])]) == 0
    assert all(torch.allclose(corrected(target, n), w, atol=1e-6) for n, w in wanted.items())


@pytest.mark.parametrize(("form", "to"), [("diffusers", "kohya"), ("kohya", "lora")])
def test_a_lora_in_another_form(form: str, to: str, tmp_path: Path) -> None:
    parts = make("sd1")
    save(parts, tmp_path / "base")
    lora, wanted = small_lora(parts)
    write_lora(tmp_path / "x.safetensors", lora, parts.network.config, form=form)  # type: ignore[arg-type]
    target = tmp_path / "y.safetensors"
    argv = [str(tmp_path / "x.safetensors"), str(target), "--to", to, "--base", str(tmp_path / "base")]
    assert main(argv) == 0
    pipeline = TextToImage.load(tmp_path / "base")
    pipeline.load_lora(target)
    sites = all_sites(pipeline.unet, pipeline.text)
    assert all(torch.allclose(sites[n].read(), w, atol=1e-6) for n, w in wanted.items())
    with pytest.raises(ValueError, match="exists already"):
        main(argv)


@pytest.mark.parametrize(
    ("family", "prediction", "zero", "words"),
    [
        ("sd1", Epsilon(), False, None),
        ("sd1", V(), True, "cannot say that the model predicts v with zero terminal SNR: in ComfyUI put ModelSampling"),
        ("sd2", V(), False, "cannot say that the model predicts v: in ComfyUI put ModelSamplingDiscrete"),
        ("sdxl", V(), True, None),
        ("lcm", Epsilon(), False, "ignore the guidance embedding"),
    ],
)
def test_what_a_single_file_cannot_say(
    family: str, prediction: Any, zero: bool, words: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = make(family)
    parts.scheduler = scheduler_to_diffusers(Discrete(zero_terminal_snr=zero), prediction)
    save(parts, tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        assert main([str(tmp_path / "m"), str(tmp_path / "m.safetensors"), "--to", "compvis"]) == 0
    assert (words is None and "ComfyUI" not in caplog.text) or (words or "-") in caplog.text
    markers = {"v_pred", "ztsnr"} & set(weights.open_file(tmp_path / "m.safetensors"))
    assert markers == ({"v_pred", "ztsnr"} if family == "sdxl" else set())  # where ComfyUI and A1111 read them


def test_unknown_tensors_on_the_command_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(make("sd1"), tmp_path / "m")
    path = tmp_path / "m/unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"surprise.weight": torch.ones(2)}, path)
    argv = [str(tmp_path / "m"), str(tmp_path / "out"), "--to", "diffusers"]
    with pytest.raises(ValueError, match=r"tensors fit, --lenient .*not known 1 key\(s\): surprise\.weight"):
        main(argv)
    with caplog.at_level(logging.WARNING):
        assert main([*argv, "--lenient"]) == 0
    assert "surprise.weight" in caplog.text
    assert TextToImage.load(tmp_path / "out").unet
    assert TextToImage.load(tmp_path / "m", lenient=True).unet
