"""Small random models of every transformer's family with all of their text encoders, for tests of files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.opened import Components
from ldm.models import networks
from ldm.models.text import MissingConfig, QwenConfig, T5Config, TextConfig, TextEncoder, build_encoder
from ldm.models.transformers import presets
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from tests.text_files import QWEN, qwen_tokenizer

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DPM = {
    "_class_name": "DPMSolverMultistepScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "solver_order": 2, "algorithm_type": "dpmsolver++",
}  # fmt: skip
TEXT: dict[str, Any] = {"heads": 2, "layers": 3, "context_length": 16, "vocab_size": 4096, "bpe": "emoji"}
T5 = T5Config(vocab_size=300, d_model=40, d_kv=8, d_ff=48, num_layers=2, num_heads=4, max_length=24)
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]


def t5_tokenizer(folder: Path) -> Path:
    """A unigram tokenizer of letters and a few words, as T5's `tokenizer.json` is made."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = ["\u2581a", "\u2581red", "\u2581apple", "\u2581and", "\u2581green"]
    letters = [chr(c) for c in range(33, 127)]
    pieces = PIECES + [(w, -3.0) for w in words] + [(c, -6.0) for c in letters]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "T5TokenizerFast", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
            "model_max_length": 512, "extra_ids": 0}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def towers(kind: str, folder: Path) -> list[Any]:
    """The settings of a family's text encoders; `kind` "sd3_clip" is one tower alone, "sd3_no_t5" both of them."""
    if kind == "zimage":
        sizes: dict[str, Any] = QWEN | {"max_position_embeddings": 1024}
        return [QwenConfig(**sizes, tokenizer=qwen_tokenizer(folder))]
    t5 = replace(T5, tokenizer=t5_tokenizer(folder))
    one = TextConfig(width=16, activation="quick_gelu", output="penultimate", projection=12, **TEXT)
    two = TextConfig(width=24, activation="gelu", pad="zero", output="penultimate", projection=20, **TEXT)
    return {
        "sd3": [one, two, replace(t5, max_length=256)],
        "sd3_no_t5": [one, two, MissingConfig(width=40)],
        "sd3_clip": [TextConfig(width=24, activation="gelu", projection=20, **TEXT)],
        "flux": [TextConfig(width=12, activation="quick_gelu", **TEXT), replace(t5, max_length=512)],
        "flux_schnell": [TextConfig(width=12, activation="quick_gelu", **TEXT), replace(t5, max_length=256)],
        "pixart": [replace(t5, max_length=300, masked=True, lower=True)],
        "pixart_alpha": [replace(t5, max_length=120, masked=True, lower=True)],
    }[kind]


def network_config(kind: str) -> Any:
    """Settings of a small network that takes these encoders."""
    if kind == "sd3_clip":
        return replace(presets.SD3_TINY, joint_attention_dim=24, pooled_projection_dim=20)
    if kind.startswith("sd3"):
        return replace(presets.SD3_TINY, joint_attention_dim=40, pooled_projection_dim=32)
    if kind.startswith("flux"):
        told = {"joint_attention_dim": 40, "pooled_projection_dim": 12, "guidance_embeds": kind == "flux"}
        return replace(presets.FLUX_TINY, **told)
    if kind == "zimage":
        return replace(presets.ZIMAGE_TINY, cap_feat_dim=32, axes_lens=(1024, 32, 32))
    return replace(presets.PIXART_TINY, caption_channels=40, out_channels=8)


def scrambled(model: Any, std: float = 0.05) -> Any:
    """The same with no weight at zero or one."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=std)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm.weight", "layer_norm.weight")):
            parameter.data += 1
    return model.requires_grad_(False).eval()


def make(kind: str, folder: Path) -> Components:
    """All parts of a small model; the tokenizer of its T5 or Qwen3 is put into `folder`."""
    torch.manual_seed(0)
    network = scrambled(networks.build(network_config(kind)), 0.2)
    shift = None if kind.startswith("pixart") else 0.25
    vae = AutoencoderConfig(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=16, scaling_factor=0.7,
        shift_factor=shift, use_quant_conv=shift is None, use_post_quant_conv=shift is None,
    )  # fmt: skip
    autoencoder = scrambled(Autoencoder(vae), 0.1)
    text: list[TextEncoder] = [scrambled(build_encoder(config), 0.2) for config in towers(kind, folder)]
    scheduler = dict(DPM) if kind.startswith("pixart") else dict(FLOW) | {"shift": 1.0 if "schnell" in kind else 3.0}
    return Components(network, autoencoder, LatentCodec.of(autoencoder), text, scheduler)
