"""Strangers' single files in the layouts that tools give them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoint import maps, single, weights
from ldm.checkpoint.opened import shapes_of
from ldm.checkpoint.schedulers import scheduler_from_diffusers
from ldm.checkpoint.weights import Entry, Source
from ldm.diffusion.schedule import Discrete
from tests.parity.test_single_file import family

Open = Callable[..., Any]


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> Open:
    """`open_single` of tensors in memory, checked."""

    def opened(source: Source, about: dict[str, str] | None = None, **options: Any) -> Any:
        monkeypatch.setattr(weights, "open_file", lambda path: dict(source))
        monkeypatch.setattr(weights, "metadata", lambda path: about or {})
        lenient = bool(options.get("lenient"))
        return single.open_single(Path("m.safetensors"), **options).fitted(lenient=lenient).check()

    return opened


def entry(*shape: int, value: float | None = None) -> Entry:
    size = torch.Size(shape)
    return Entry(size, torch.float32, lambda: torch.full(size, value or 0.0))


def hf_tower(name: str, prefix: str, layers: int | None = None) -> dict[str, Entry]:
    """A family's first tower under Hugging Face's names."""
    native = family(name).text[0].source
    cut = "-" if layers is None else f"transformer.resblocks.{layers}."
    native = {k: e for k, e in native.items() if not k.startswith(cut)}
    return maps.prefixed(prefix, maps.follow(maps.text_to_hf(native), native, ""))


def without_tower(name: str) -> dict[str, Entry]:
    return {k: e for k, e in single.tensors(family(name)).items() if not k.startswith("cond_stage_model.")}


@pytest.mark.parametrize("constants", [False, True])
def test_both_layouts_of_sd_turbo(opening: Open, constants: bool) -> None:
    """stabilityai/sd-turbo keeps SD 2.1's tower under SDXL's prefix (AUTOMATIC1111/stable-diffusion-webui#14170)."""
    usual = single.tensors(family("sd21"))
    turbo = {k.replace("cond_stage_model.", "conditioner.embedders.0."): e for k, e in usual.items()}
    extra = {"conditioner.embedders.0.model.logit_scale": entry(), "denoiser.sigmas": entry(1000)} if constants else {}
    found, plain = opening(turbo | extra), opening(usual)
    assert [t.config for t in found.text] == [t.config for t in plain.text]
    how = scheduler_from_diffusers(found.scheduler)
    assert (how.prediction.kind, how.spacing) == ("epsilon", "trailing")
    assert scheduler_from_diffusers(plain.scheduler).prediction.kind == "v"
    assert scheduler_from_diffusers(opening(turbo, prediction="v").scheduler).prediction.kind == "v"


@pytest.mark.parametrize("prefix", ["cond_stage_model.transformer.", "cond_stage_model.clip_l.transformer."])
@pytest.mark.parametrize("inner", [True, False])
def test_towers_of_sd1(opening: Open, prefix: str, inner: bool) -> None:
    """With and without `text_model.`, with constants, and a projection that nothing uses."""
    tower = hf_tower("sd15", prefix)
    tower.pop(f"{prefix}text_projection.weight", None)
    tower |= {f"{prefix}text_model.embeddings.position_ids": entry(1, 77), f"{prefix}logit_scale": entry()}
    if inner:
        tower[f"{prefix}text_projection.weight"] = entry(768, 768)
    else:
        tower = {k.replace("text_model.", ""): e for k, e in tower.items()}
    assert set(opening(without_tower("sd15") | tower).text[0].source) >= {"ln_final.weight"}


@pytest.mark.parametrize("layers", [None, 23])
def test_a_tower_of_sd2_under_the_other_names(opening: Open, layers: int | None) -> None:
    tower = hf_tower("sd21", "cond_stage_model.transformer.", layers)
    text = opening(without_tower("sd21") | tower).text[0].config
    assert (text.layers, text.output) == ((24, "penultimate_norm") if layers is None else (23, "last"))


def test_a_projection_stored_as_a_linear_layers(opening: Open) -> None:
    stored = single.tensors(family("sdxl"))
    key = "conditioner.embedders.1.model.text_projection"
    values = torch.arange(1280.0 * 1280).view(1280, 1280)
    stored[f"{key}.weight"] = Entry(values.shape, values.dtype, lambda: values)
    del stored[key]
    assert torch.equal(opening(stored).text[1].source["text_projection"].read(), values.T)


@pytest.mark.parametrize("old", [True, False])
def test_attention_of_autoencoders(opening: Open, old: bool) -> None:
    """Linear shapes where 1x1 convolutions are usual, and diffusers' names that a converter left."""
    names = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"} if old else {}
    stored = {}
    for key, e in single.tensors(family("sd15")).items():
        start, found, rest = key.rpartition(".mid.attn_1.")
        layer, _, kind = rest.partition(".")
        if found and layer in ("q", "k", "v", "proj_out"):
            key = f"{start}{found}{names.get(layer, layer)}.{kind}"
            e = entry(*e.shape[:2]) if kind == "weight" else e
        stored[key] = e
    assert opening(stored).vae["encoder.mid_block.attentions.0.to_q.weight"].shape == (512, 512)


def test_a_projection_in_the_network_in_the_other_shape(opening: Open) -> None:
    stored = single.tensors(family("sd15"))
    key = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
    assert stored[key].shape == (320, 320, 1, 1)
    stored[key] = entry(320, 320, value=2.0)
    found = opening(stored).network["down_blocks.0.attentions.0.proj_in.weight"]
    assert found.shape == (320, 320, 1, 1)
    assert found.read().shape == (320, 320, 1, 1)


def test_what_is_beside_the_model_is_said_once(opening: Open, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"model_ema.decay": entry(), "model_ema.num_updates": entry(), "betas": entry(1000), "global_step": entry()}
    with caplog.at_level(logging.WARNING):
        opening(single.tensors(family("sd15")) | extra)
    said = [r.message for r in caplog.records if "not used" in r.message]
    assert said == [
        "m.safetensors: not used: 2 averages of the weights (--ema takes them), 1 schedule tables, 1 training state"
    ]


def test_a_few_unknown_tensors(opening: Open, caplog: pytest.LogCaptureFixture) -> None:
    stored = single.tensors(family("sd15"))
    count = len(stored)
    stored |= {
        "model.diffusion_model.surprise.weight": entry(1),
        "first_stage_model.other": entry(1),
        "cond_stage_model.transformer.text_model.more": entry(1),
        "lora_something": entry(1),
    }
    with pytest.raises(ValueError, match=rf"{count} of {count + 4} tensors fit; .*surprise.*--lenient"):
        opening(stored)
    with caplog.at_level(logging.WARNING):
        found = opening(stored, lenient=True)
    assert set(found.network) == set(shapes_of(found.network_config))
    assert all(word in caplog.text for word in ("surprise", "other", "text_model.more", "lora_something"))
    del stored["model.diffusion_model.out.0.weight"]
    with pytest.raises(ValueError, match=r"U-Net: missing 1 key\(s\): out\.0\.weight"):
        opening(stored, lenient=True)


@pytest.mark.parametrize("key", ["edm_mean", "edm_vpred.sigma_max"])
def test_other_noise_levels_are_refused(opening: Open, key: str) -> None:
    """Playground v2.5 and CosXL: read as epsilon they would draw noise."""
    with pytest.raises(ValueError, match=rf"'{key}' marks a model of continuous noise levels"):
        opening(single.tensors(family("sdxl")) | {key: entry(1)}, lenient=True)


@pytest.mark.parametrize(
    ("name", "extra", "about", "kind", "zero"),
    [
        ("sdxl", {"v_pred": entry(0)}, {}, "v", False),
        ("sdxl", {"v_pred": entry(0), "ztsnr": entry(0)}, {}, "v", True),
        ("sdxl", {"ztsnr": entry(0)}, {}, "epsilon", False),
        ("sd15", {}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "v", True),
        ("sd15", {}, {"modelspec.prediction_type": "v"}, "v", False),
        ("sd15", {}, {}, "epsilon", False),
        ("sd21", {"global_step": entry(value=875_000.0)}, {}, "epsilon", False),
        ("sd21", {"global_step": entry(value=140_000.0)}, {}, "v", False),
    ],
)
def test_what_tells_the_prediction(
    opening: Open, name: str, extra: dict[str, Entry], about: dict[str, str], kind: str, zero: bool
) -> None:
    """As ComfyUI reads the markers (ztsnr counts beside v_pred alone), kohya's header, and diffusers SD 2's step."""
    found = scheduler_from_diffusers(opening(single.tensors(family(name)) | extra, about).scheduler)
    assert found.prediction.kind == kind
    assert isinstance(found.schedule, Discrete)
    assert found.schedule.zero_terminal_snr == zero
