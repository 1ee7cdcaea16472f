"""Settings as they were published load here and mean what diffusers and transformers take them to mean.

`published.json` holds the settings of well-known folders, and of such as are like them, file by file; no weights.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from ldm.checkpoint.index import check_index, read_scheduler, two_towers
from ldm.checkpoint.opened import shapes_of
from ldm.checkpoint.schedulers import scheduler_from_diffusers
from ldm.checkpoint.towers import text_settings
from ldm.config.load import decode
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig

torch.set_num_threads(1)
PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text("utf-8"))


def files(part: str) -> list[Any]:
    """(settings) of every model that has the file, by its name."""
    return [pytest.param(m[part], id=name) for name, m in PUBLISHED.items() if part in m]


def own(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_")}


def same_parameters(theirs: torch.nn.Module, ours: UNetConfig | AutoencoderConfig) -> None:
    assert {k: v.shape for k, v in theirs.state_dict().items()} == shapes_of(ours)


@pytest.mark.parametrize("config", files("unet/config.json"))
def test_unets(config):
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(config)
    ours = decode(UNetConfig, own(config), "unet")
    same_parameters(theirs, ours)
    assert ours.sample_size == theirs.config["sample_size"]
    assert ours.norm_eps == theirs.config["norm_eps"]
    assert ours.upcast_attention == bool(theirs.config["upcast_attention"])


@pytest.mark.parametrize("config", files("vae/config.json"))
def test_autoencoders(config):
    with torch.device("meta"):
        theirs = AutoencoderKL.from_config(config)
    ours = decode(AutoencoderConfig, own(config), "vae")
    same_parameters(theirs, ours)
    assert ours.scaling_factor == theirs.config["scaling_factor"]
    assert ours.force_upcast == theirs.config["force_upcast"]


@pytest.mark.parametrize("config", files("text_encoder/config.json") + files("text_encoder_2/config.json"))
def test_text_encoders(config):
    theirs, ours = CLIPTextConfig(**config), text_settings(config, Path("text_encoder"))
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"):
        assert ours[key] == getattr(theirs, key)
    assert ours["max_position_embeddings"] == theirs.max_position_embeddings


@pytest.mark.parametrize("config", files("model_index.json"))
def test_indices(config, tmp_path):
    check_index(config, tmp_path)
    assert two_towers(config, tmp_path) == ("text_encoder_2" in config)


@pytest.mark.parametrize("model", [m for m in PUBLISHED.values() if "scheduler/scheduler_config.json" in m])
def test_schedulers(model, tmp_path):
    """What the pipeline makes of the files; each draws here as there (`test_scheduler_classes` compares them)."""
    write(tmp_path / "scheduler/scheduler_config.json", model["scheduler/scheduler_config.json"])
    config = read_scheduler(tmp_path, model.get("model_index.json", {}))
    how = scheduler_from_diffusers(config)
    assert how.own is not None
    assert how.schedule.at(999)[0] ** 2 == pytest.approx(0.0046600985, rel=1e-6)
    assert how.prediction.kind == ("v" if config.get("prediction_type") == "v_prediction" else "epsilon")


def write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


# ---- one setting at a time: the same result, or a refusal that names the setting ----

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
}
UNET_OTHER: dict[str, list[Any]] = {
    "sample_size": [16, [8, 8], None],
    "center_input_sample": [True, None],
    "flip_sin_to_cos": [False],
    "freq_shift": [1],
    "mid_block_type": ["UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"],
    "only_cross_attention": [True, [False, False], None],
    "downsample_padding": [0],
    "mid_block_scale_factor": [2.0],
    "dropout": [0.1],
    "act_fn": ["gelu", "mish", "swish"],
    "norm_num_groups": [4],
    "norm_eps": [1e-3],
    "layers_per_block": [2, [1, 2]],
    "transformer_layers_per_block": [2, [1, 2]],
    "reverse_transformer_layers_per_block": [[2, 1], None],
    "encoder_hid_dim": [16],
    "encoder_hid_dim_type": ["text_proj"],
    "attention_head_dim": [4, [2, 4]],
    "dual_cross_attention": [True],
    "use_linear_projection": [True],
    "class_embed_type": ["timestep", "identity", None],
    "num_class_embeds": [3, None],
    "addition_embed_type": ["text", "image", None],
    "upcast_attention": [True, None],
    "resnet_time_scale_shift": ["scale_shift"],
    "resnet_skip_time_act": [True],
    "resnet_out_scale_factor": [0.7],
    "time_embedding_type": ["fourier"],
    "time_embedding_dim": [48],
    "time_embedding_act_fn": ["silu"],
    "timestep_post_act": ["silu"],
    "time_cond_proj_dim": [16],
    "conv_in_kernel": [5],
    "conv_out_kernel": [1],
    "attention_type": ["gated"],
    "mid_block_only_cross_attention": [True, False],
    "cross_attention_norm": ["layer_norm"],
    "addition_embed_type_num_heads": [32],
}


@pytest.mark.parametrize("key", UNET_OTHER)
@torch.no_grad()
def test_every_unet_setting(key):
    for value in UNET_OTHER[key]:
        config = {**UNET, key: value}
        try:
            ours = UNet(decode(UNetConfig, config, "unet"))
        except ValueError as error:
            assert key in str(error)  # noqa: PT017  (one of two right ends)
            assert value is not None
            continue
        try:
            theirs = UNet2DConditionModel.from_config(config).eval()
        except Exception:  # theirs does not take it either, in words of many kinds
            assert value is None
            continue
        torch.manual_seed(0)
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        ours.load_state_dict(theirs.state_dict())
        x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 5, 32)
        labels = {"timestep": torch.tensor([3.0]), "identity": torch.randn(1, 64)}.get(str(value), torch.tensor([2]))
        more = {"class_labels": labels} if key in ("class_embed_type", "num_class_embeds") and value else {}
        want = theirs(x, t, encoder_hidden_states=text, **more).sample
        got = ours.eval()(x, t, {"text": text} | ({"class": labels} if more else {}))
        assert (got - want).norm() < 1e-4 * want.norm(), (key, value)


VAE: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
VAE_OTHER: dict[str, list[Any]] = {
    "act_fn": ["gelu", "swish"],
    "latent_channels": [8],
    "norm_num_groups": [8],
    "scaling_factor": [0.5, None],
    "shift_factor": [0.1],
    "latents_mean": [[0.1] * 4, [0.0] * 4, None],
    "latents_std": [[2.0] * 4, [1.0] * 4],
    "force_upcast": [False, None],
    "use_quant_conv": [False],
    "use_post_quant_conv": [False],
    "mid_block_add_attention": [False, None],
    "sample_size": [[64, 64], 64.0],
    "down_block_types": [["AttnDownEncoderBlock2D"] * 2],
}


@pytest.mark.parametrize("key", VAE_OTHER)
@torch.no_grad()
def test_every_autoencoder_setting(key):
    for value in VAE_OTHER[key]:
        config = {**VAE, key: value}
        try:
            read = decode(AutoencoderConfig, config, "vae")
        except ValueError as error:
            assert key in str(error)  # noqa: PT017
            continue
        theirs = AutoencoderKL.from_config({k: v for k, v in config.items() if v is not None}).eval()
        torch.manual_seed(0)
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        ours = Autoencoder(read).eval()
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(1, 3, 8, 8)
        want = theirs.encode(x).latent_dist
        mean, _ = ours.encode(x).chunk(2, 1)
        assert (mean - want.mean).norm() < 1e-4 * want.mean.norm(), (key, value)
        decoded = theirs.decode(mean).sample
        assert (ours.decode(mean) - decoded).norm() < 1e-4 * decoded.norm(), (key, value)
        for name in ("scaling_factor", "shift_factor", "force_upcast"):
            assert getattr(read, name) == theirs.config[name]


def test_names_before_diffusers_0_2():
    old = {
        "image_size": 8, "num_res_blocks": 1, "block_channels": [16, 32], "downscale_freq_shift": 0,
        "resnet_num_groups": 8, "resnet_act_fn": "silu", "resnet_eps": 1e-5, "num_head_channels": 2,
        "down_block_types": ["UNetResCrossAttnDownBlock2D", "UNetResDownBlock2D"],
        "up_block_types": ["UNetResUpBlock2D", "UNetResCrossAttnUpBlock2D"], "cross_attention_dim": 32,
    }  # fmt: skip
    assert decode(UNetConfig, old, "unet") == decode(UNetConfig, UNET, "unet")


def test_unknown_keys_are_refused_and_ours_stay_strict():
    with pytest.raises(ValueError, match=r"unknown key\(s\) \['mystery'\]"):
        decode(UNetConfig, {**UNET, "mystery": True}, "unet")
    with pytest.raises(ValueError, match="norm_eps: expected float"):
        decode(UNetConfig, {**UNET, "norm_eps": "small"}, "unet")
    with pytest.raises(ValueError, match="sample_size"):
        decode(UNetConfig, {**UNET, "sample_size": [64, 96]}, "unet")


# ---- pipelines and parts that are not these are refused by name ----

PARTS: dict[str, Any] = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}
TWO: dict[str, Any] = {
    **PARTS,
    "_class_name": "StableDiffusionXLImg2ImgPipeline",
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
SD = "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"_class_name": "StableDiffusion3Pipeline", **PARTS}, r"has part\(s\) \['unet'\]; known are \['transformer'"),
        ({"_class_name": "FluxControlPipeline"}, "FluxControlPipeline.*FLUX.1 conditioned by a picture"),
        ({"_class_name": "IFPipeline"}, "IFPipeline.*DeepFloyd"),
        ({"_class_name": "StableDiffusionLatentUpscalePipeline", **PARTS}, "UpscalePipeline.*an upscaler"),
        ({"_class_name": SD, **PARTS, "low_res_scheduler": ["diffusers", "DDPMScheduler"]}, "part.*low_res_scheduler"),
        (
            {**TWO, "_class_name": "StableDiffusionXLInstructPix2PixPipeline", "is_cosxl_edit": True},
            "is_cosxl_edit True is not supported",
        ),
        ({"_class_name": "MyPipeline", **PARTS}, "_class_name 'MyPipeline' is not one of"),
        (
            {**TWO, "text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True},
            "refiner",
        ),
        ({**TWO, "requires_aesthetics_score": True}, "requires_aesthetics_score True"),
        ({"_class_name": SD, **PARTS, "controlnet": ["diffusers", "ControlNetModel"]}, "part.*controlnet"),
        ({"_class_name": SD, **PARTS, "unet": ["diffusers", "UNet3DConditionModel"]}, "unet 'UNet3DConditionModel'"),
        ({"_class_name": SD, **PARTS, "vae": ["diffusers", "AutoencoderTiny"]}, "vae 'AutoencoderTiny'"),
        ({"_class_name": SD, **PARTS, "text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder 'T5Enc"),
        ({"_class_name": SD, **PARTS, "tokenizer": ["transformers", "T5Tokenizer"]}, "tokenizer 'T5Tokenizer'"),
    ],
)
def test_other_families(index, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        check_index(index, tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {"requires_safety_checker": True, "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]},
        {"feature_extractor": ["transformers", "CLIPFeatureExtractor"], "image_encoder": [None, None]},
        {"add_watermarker": None, "requires_aesthetics_score": False, "force_zeros_for_empty_prompt": False},
    ],
)
def test_what_changes_nothing_is_understood(more, tmp_path):
    check_index({"_class_name": SD, **PARTS, **more}, tmp_path)


def test_the_index_tells_the_class_of_the_scheduler(tmp_path, caplog):
    """As in diffusers, where the pipeline makes the index's class; a class that is not known is refused in both."""
    euler = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
    write(tmp_path / "scheduler/scheduler_config.json", euler)
    index = {"_class_name": "StableDiffusionXLPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    assert read_scheduler(tmp_path, index)["_class_name"] == "DDIMScheduler"
    assert "EulerDiscreteScheduler" in caplog.text
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        read_scheduler(tmp_path, {"scheduler": ["diffusers", "EDMEulerScheduler"]})
    write(tmp_path / "scheduler/scheduler_config.json", {**euler, "_class_name": "EDMEulerScheduler"})
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        read_scheduler(tmp_path, index)


def test_old_schedulers_in_sd_pipelines(tmp_path):
    """What diffusers' pipeline changes in outdated files: no clipping of latents, an offset of 1."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    old = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    write(tmp_path / "scheduler/scheduler_config.json", old)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")
        parts: dict[str, Any] = dict.fromkeys(names)
        pipe = StableDiffusionPipeline(**parts, scheduler=DDIMScheduler.from_config(old), requires_safety_checker=False)
    found = read_scheduler(tmp_path, {"_class_name": SD})
    for key in ("steps_offset", "clip_sample"):
        assert found[key] == pipe.scheduler.config[key]
    assert "steps_offset" not in read_scheduler(tmp_path, {"_class_name": "StableDiffusionXLPipeline"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "xlm-roberta"}, "model_type 'xlm-roberta' is not 'clip_text_model'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06 is not supported"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not one of"),
        ({"hidden_size": "wide"}, "hidden_size 'wide' is not a whole number"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
    ],
)
def test_other_text_encoders(change, words):
    with pytest.raises(ValueError, match=words):
        text_settings({"model_type": "clip_text_model", **change}, Path("text_encoder"))


def test_a_whole_clip_and_nulls():
    assert text_settings({"architectures": ["CLIPTextModel"]}, Path("text_encoder"))["hidden_size"] == 512
    whole = {"model_type": "clip", "projection_dim": 64, "text_config": {"hidden_size": 64, "hidden_act": None}}
    found = text_settings(whole, Path("text_encoder"))
    assert (found["hidden_size"], found["hidden_act"], found["num_hidden_layers"]) == (64, "quick_gelu", 12)
