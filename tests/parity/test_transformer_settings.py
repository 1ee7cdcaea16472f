"""Settings of the transformers as they were published load here and mean what diffusers takes them to mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoint.folder import open_network
from ldm.checkpoint.index import check_index, encoders_there
from ldm.checkpoint.opened import shapes_of
from ldm.models.transformers import presets
from ldm.models.transformers.pixart import PixArtConfig

torch.set_num_threads(1)
_SD3 = {
    "_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.29.0.dev0", "attention_head_dim": 64,
    "caption_projection_dim": 1536, "in_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 24,
    "num_layers": 24, "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
    "sample_size": 128,
}  # fmt: skip
_SD35 = _SD3 | {"_diffusers_version": "0.31.0.dev0", "qk_norm": "rms_norm"}
_FLUX = {
    "_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0", "attention_head_dim": 128,
    "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24,
    "num_layers": 19, "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768,
}  # fmt: skip
_PIXART = {
    "_class_name": "Transformer2DModel", "_diffusers_version": "0.28.0.dev0", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 72, "attention_type": "default", "caption_channels": 4096,
    "cross_attention_dim": 1152, "double_self_attention": False, "dropout": 0.0, "in_channels": 4,
    "interpolation_scale": 2, "norm_elementwise_affine": False, "norm_eps": 1e-06, "norm_num_groups": 32,
    "norm_type": "ada_norm_single", "num_attention_heads": 16, "num_embeds_ada_norm": 1000, "num_layers": 28,
    "num_vector_embeds": None, "only_cross_attention": False, "out_channels": 8, "patch_size": 2, "sample_size": 128,
    "upcast_attention": False, "use_additional_conditions": False, "use_linear_projection": False,
}  # fmt: skip
_OLD = {"_diffusers_version": "0.22.0.dev0", "_name_or_path": "x"}
_ALPHA = {k: v for k, v in _PIXART.items() if k not in ("interpolation_scale", "use_additional_conditions")} | _OLD
_ZIMAGE = {
    "_class_name": "ZImageTransformer2DModel", "_diffusers_version": "0.36.0.dev0", "all_f_patch_size": [1],
    "all_patch_size": [2], "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "cap_feat_dim": 2560, "dim": 3840,
    "in_channels": 16, "n_heads": 30, "n_kv_heads": 30, "n_layers": 30, "n_refiner_layers": 2, "norm_eps": 1e-05,
    "qk_norm": True, "rope_theta": 256.0, "t_scale": 1000.0,
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], Any]] = {
    "stable-diffusion-3-medium": (_SD3, presets.SD3_MEDIUM),
    "stable-diffusion-3.5-medium": (
        _SD35 | {"dual_attention_layers": list(range(13)), "pos_embed_max_size": 384},
        presets.SD35_MEDIUM,
    ),
    "stable-diffusion-3.5-large": (
        _SD35
        | {"caption_projection_dim": 2432, "dual_attention_layers": [], "num_attention_heads": 38, "num_layers": 38},
        presets.SD35_LARGE,
    ),
    "FLUX.1-dev": (_FLUX | {"_name_or_path": "../checkpoints/flux-dev/transformer"}, presets.FLUX_DEV),
    "FLUX.1-schnell": (_FLUX | {"guidance_embeds": False}, presets.FLUX_SCHNELL),
    "FLUX.1, saved again": (_FLUX | {"axes_dims_rope": [16, 56, 56], "out_channels": None}, presets.FLUX_DEV),
    "PixArt-Sigma-XL-2-1024-MS": (_PIXART, presets.PIXART_SIGMA),
    "PixArt-Sigma, saved again": (_PIXART | {"_class_name": "PixArtTransformer2DModel"}, presets.PIXART_SIGMA),
    "PixArt-XL-2-1024-MS": (_ALPHA, None),
    "PixArt-XL-2-512x512": (_ALPHA | {"sample_size": 64}, None),
    "Z-Image-Turbo": (_ZIMAGE, presets.ZIMAGE),
    "Z-Image-Turbo, as copies have it": (_ZIMAGE | {"nheads": 30}, presets.ZIMAGE),
    "Z-Image, saved again": (_ZIMAGE | {"siglip_feat_dim": None}, presets.ZIMAGE),
}
_CLIP, _T5 = ["transformers", "CLIPTextModelWithProjection"], ["transformers", "T5EncoderModel"]
_TOKENS, _T5_TOKENS = ["transformers", "CLIPTokenizer"], ["transformers", "T5TokenizerFast"]
_SHARED = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "vae": ["diffusers", "AutoencoderKL"]}
INDICES: dict[str, dict[str, Any]] = {
    "sd3": _SHARED | {
        "_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.29.0.dev0", "text_encoder": _CLIP,
        "text_encoder_2": _CLIP, "text_encoder_3": _T5, "tokenizer": _TOKENS, "tokenizer_2": _TOKENS,
        "tokenizer_3": _T5_TOKENS, "transformer": ["diffusers", "SD3Transformer2DModel"],
    },
    "flux": _SHARED | {
        "_class_name": "FluxPipeline", "_diffusers_version": "0.30.0.dev0",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": _T5, "tokenizer": _TOKENS, "tokenizer_2": _T5_TOKENS,
        "transformer": ["diffusers", "FluxTransformer2DModel"],
    },
    "zimage": _SHARED | {
        "_class_name": "ZImagePipeline", "_diffusers_version": "0.36.0.dev0",
        "text_encoder": ["transformers", "Qwen3Model"], "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
    },
    "pixart": {
        "_class_name": "PixArtSigmaPipeline", "_diffusers_version": "0.28.0.dev0",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"], "text_encoder": _T5,
        "tokenizer": ["transformers", "T5Tokenizer"], "transformer": ["diffusers", "Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
}  # fmt: skip


def network_folder(config: dict[str, Any], folder: Path) -> Path:
    from safetensors.torch import save_file

    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, folder / "transformer/diffusion_pytorch_model.safetensors")
    return folder / "transformer"


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks(name: str, tmp_path: Path) -> None:
    import diffusers

    config, preset = PUBLISHED[name]
    cls = config["_class_name"] if config["_class_name"] != "Transformer2DModel" else "PixArtTransformer2DModel"
    with torch.device("meta"):
        theirs = getattr(diffusers, cls).from_config(config)
    found, _ = open_network(network_folder(config, tmp_path))
    assert {k: v.shape for k, v in theirs.state_dict().items()} == shapes_of(found)
    assert preset is None or found == preset
    if isinstance(found, PixArtConfig):
        assert found.micro == theirs.use_additional_conditions
        assert found.interpolation == theirs.pos_embed.interpolation_scale


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (_PIXART | {"norm_type": "layer_norm"}, "norm_type 'layer_norm' is not 'ada_norm_single'"),
        (_PIXART | {"double_self_attention": True}, "double_self_attention"),
        (_PIXART | {"use_linear_projection": True}, "use_linear_projection"),
        (_PIXART | {"attention_type": "gated"}, "attention_type"),
        (_PIXART | {"upcast_attention": True}, "upcast_attention"),
        (_SD35 | {"qk_norm": "layer_norm"}, "qk_norm 'layer_norm' is not one of"),
        (_FLUX | {"axes_dims_rope": [16, 56, 54]}, "axes_dims_rope"),
        (_FLUX | {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        (_ZIMAGE | {"n_kv_heads": 10}, "n_kv_heads 10 is not supported"),
        (_ZIMAGE | {"siglip_feat_dim": 1152}, "siglip_feat_dim 1152 is not supported"),
        (_ZIMAGE | {"nheads": 24}, "nheads"),
        (_FLUX | {"_class_name": "Flux2Transformer2DModel"}, "'Flux2Transformer2DModel' is not one of"),
    ],
)
def test_settings_that_would_mean_another_network(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        open_network(network_folder(changes, tmp_path))


@pytest.mark.parametrize("kind", INDICES)
def test_indices(kind: str, tmp_path: Path) -> None:
    index = INDICES[kind]
    assert check_index(index, tmp_path) == kind
    assert all(encoders_there(index, kind, tmp_path))
    assert check_index({k: v for k, v in index.items() if k != "_class_name"}, tmp_path) == kind
    leftovers = {"image_encoder": [None, None], "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    assert check_index(index | leftovers, tmp_path) == kind
    with pytest.raises(ValueError, match=r"text_encoder 'UMT5EncoderModel' is not one of"):
        check_index(index | {"text_encoder": ["transformers", "UMT5EncoderModel"]}, tmp_path)
    with pytest.raises(ValueError, match=r"has part\(s\) \['controlnet'\]; known are"):
        check_index(index | {"controlnet": ["diffusers", "SD3ControlNetModel"]}, tmp_path)


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        ("FluxControlPipeline", "FLUX.1 conditioned by a picture"),
        ("Flux2Pipeline", "FLUX.2"),
        ("ChromaPipeline", "Chroma, a relative of FLUX.1"),
        ("SanaPipeline", "SANA"),
        ("ZImageOmniPipeline", "a relative of Z-Image"),
        ("StableDiffusion3ControlNetPipeline", "a relative of Stable Diffusion 3"),
    ],
)
def test_families_that_are_not_known_are_named_with_those_that_are(cls: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        check_index({"_class_name": cls}, tmp_path)
    assert told in str(error.value)
    for known in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline"):
        assert known in str(error.value)
