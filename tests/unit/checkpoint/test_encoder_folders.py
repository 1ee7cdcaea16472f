"""Folders of T5 and Qwen3 as transformers writes them, read here, and ours read there; the rest is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoint import weights
from ldm.checkpoint.encoders import (
    encoder_classes,
    encoder_part,
    kind_of,
    open_encoder,
    qwen_settings,
    t5_names,
    t5_settings,
    write_tokenizer,
)
from ldm.checkpoint.opened import OpenedText
from ldm.checkpoint.settings import read_json, write_json
from ldm.models.text import MissingConfig, QwenConfig, T5Config, TextConfig, TextEncoder, filled_encoder
from ldm.models.text.config import AnyText
from ldm.models.text.pretrained import FILES
from tests.text_files import PROMPTS, QWEN, T5, qwen_tokenizer, t5_tokenizer

torch.set_num_threads(1)
LIKE: dict[str, AnyText] = {
    "t5": T5Config(max_length=40, masked=True, lower=True),
    "qwen": QwenConfig(max_length=60, layers=(-2, 1)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `t5` and `qwen`, each with `text_encoder` and `tokenizer`, by transformers."""
    import transformers

    folder = tmp_path_factory.mktemp("files")
    t5_tokenizer(folder / "t5" / "tokenizer")
    qwen_tokenizer(folder / "qwen" / "tokenizer")
    torch.manual_seed(0)
    published = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    models: dict[str, Any] = {
        "t5": transformers.T5EncoderModel(transformers.T5Config(**T5, **published)),
        "qwen": transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**QWEN, rope_theta=500.0, tie_word_embeddings=False)
        ),
    }
    for name, model in models.items():
        for key, p in model.named_parameters():
            torch.nn.init.normal_(p, 1.0 if "norm" in key else 0.0, 0.2)
        model.eval().save_pretrained(folder / name / "text_encoder")
    return folder


def read(opened: OpenedText) -> TextEncoder:
    return filled_encoder(opened.config, weights.read_all(opened.source))  # type: ignore[arg-type]


def theirs(kind: str, folder: Path) -> torch.Tensor:
    """What transformers' model of a folder gives for the prompts, with padding hidden."""
    import transformers

    cls = transformers.T5EncoderModel if kind == "t5" else transformers.Qwen3ForCausalLM
    model = cls.from_pretrained(folder / "text_encoder").eval()
    encoder = read(open_encoder(folder / "text_encoder", folder / "tokenizer", LIKE[kind]))
    ids, mask = encoder.tokenizer.batch(encoder.tokenizer.rows(PROMPTS))
    with torch.no_grad():
        out = model(ids, attention_mask=mask.long(), output_hidden_states=True)
    if kind == "t5":
        return out.last_hidden_state
    return torch.cat([out.hidden_states[-2], out.hidden_states[1]], dim=-1)


@pytest.mark.parametrize("kind", ["t5", "qwen"])
def test_their_folder_is_read_and_ours_is_theirs(files: Path, kind: str, tmp_path: Path) -> None:
    opened = open_encoder(files / kind / "text_encoder", files / kind / "tokenizer", LIKE[kind])
    assert kind_of(files / kind / "text_encoder") == opened.config.kind == kind
    want = theirs(kind, files / kind)
    own = read(opened)(PROMPTS)
    assert torch.allclose(own["text"], want, atol=1e-5)

    config, source = encoder_part(opened)
    (tmp_path / "text_encoder").mkdir()
    write_json(tmp_path / "text_encoder" / "config.json", config)
    weights.write_folder(tmp_path / "text_encoder", "model", source)
    write_tokenizer(tmp_path / "tokenizer", opened.config)  # type: ignore[arg-type]
    assert torch.allclose(theirs(kind, tmp_path), want, atol=1e-5)
    again = open_encoder(tmp_path / "text_encoder", tmp_path / "tokenizer", LIKE[kind])
    assert again.config == type(opened.config)(**vars(opened.config) | {"tokenizer": tmp_path / "tokenizer"})
    before, after = ({p.name: p.read_bytes() for p in (f / "tokenizer").iterdir()} for f in (files / kind, tmp_path))
    assert after == {name: data for name, data in before.items() if name in FILES}
    assert config["architectures"] == [encoder_classes(opened.config)[0]]  # type: ignore[arg-type]
    if kind == "t5":
        names = set(source)
        assert "shared.weight" in names
        assert "encoder.embed_tokens.weight" not in names


@pytest.mark.parametrize("kind", ["t5", "qwen"])
def test_shards_and_variants(files: Path, kind: str, tmp_path: Path) -> None:
    import transformers

    shutil.copytree(files / kind, tmp_path / kind)
    folder = tmp_path / kind / "text_encoder"
    cls = transformers.T5EncoderModel if kind == "t5" else transformers.Qwen3ForCausalLM
    model = cls.from_pretrained(folder)
    shutil.rmtree(folder)
    model.half().save_pretrained(folder, max_shard_size="20KB", variant="fp16")
    assert len(list(folder.glob("*.safetensors"))) > 2
    opened = open_encoder(folder, tmp_path / kind / "tokenizer", LIKE[kind], variant="fp16")
    whole = open_encoder(files / kind / "text_encoder", files / kind / "tokenizer", LIKE[kind])
    assert set(opened.source) == set(whole.source)
    assert {e.dtype for e in opened.source.values()} == {torch.float16}
    key = next(iter(whole.source))
    assert torch.equal(opened.source[key].read(), whole.source[key].read().half())


def test_names_of_the_embedding_and_of_whole_models(files: Path, tmp_path: Path) -> None:
    path = next((files / "t5" / "text_encoder").glob("*.safetensors"))
    state = load_file(path)
    table = state.pop("shared.weight")
    state.pop("encoder.embed_tokens.weight", None)
    shared = "shared.weight", "encoder.embed_tokens.weight"
    for names in (shared[:1], shared[1:], shared):
        given = (
            state
            | {name: table.clone() for name in names}
            | {name: table[:1].clone() for name in ("decoder.x", "lm_head.weight")}
        )
        save_file({k: v.contiguous() for k, v in given.items()}, tmp_path / "m.safetensors")
        left: list[str] = []
        found = t5_names(weights.open_file(tmp_path / "m.safetensors"), left)
        assert set(found) == {*state, "shared.weight"}
        assert torch.equal(found["shared.weight"].read(), table)
        assert sorted(left) == ["decoder.x", "lm_head.weight"]


PUBLISHED = {  # SD3's text_encoder_3 and FLUX.1's text_encoder_2, as public repositories cite them
    "architectures": ["T5EncoderModel"], "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64, "d_model": 4096,
    "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True,
    "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24,
    "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.41.2", "use_cache": True, "vocab_size": 32128,
}  # fmt: skip
QWEN3_4B = {  # Qwen3-4B's config.json
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
    "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


def test_published_settings() -> None:
    assert T5Config(**t5_settings(PUBLISHED, "x")) == T5Config()
    assert T5Config(**t5_settings(PUBLISHED | {"tie_word_embeddings": True}, "x")) == T5Config()
    assert QwenConfig(**qwen_settings(QWEN3_4B, "x")) == QwenConfig()
    new = {k: v for k, v in QWEN3_4B.items() if k not in ("rope_theta", "rope_scaling")}
    new |= {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "layer_types": ["full_attention"] * 36}
    assert QwenConfig(**qwen_settings(new, "x")) == QwenConfig()


@pytest.mark.parametrize(
    ("base", "change", "says"),
    [
        (PUBLISHED, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj 'gated-silu' is not one of"),
        (PUBLISHED, {"dense_act_fn": "gelu"}, "dense_act_fn 'gelu' is not 'gelu_new'"),
        (PUBLISHED, {"is_gated_act": False}, "is_gated_act False is not True"),
        (PUBLISHED, {"is_decoder": True}, "is_decoder True is not supported"),
        (PUBLISHED, {"d_model": "4096"}, "d_model '4096' is not a whole number"),
        (PUBLISHED, {"quantization_config": {"bits": 8}}, "quantization_config"),
        (QWEN3_4B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        (QWEN3_4B, {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        (QWEN3_4B, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only 'silu' is"),
        (QWEN3_4B, {"layer_types": ["sliding_attention"]}, "layer_types 'sliding_attention'"),
    ],
)
def test_settings_that_are_not_supported_are_named(base: dict[str, Any], change: dict[str, Any], says: str) -> None:
    read = t5_settings if base is PUBLISHED else qwen_settings
    with pytest.raises(ValueError, match=f"^x: {says}"):
        read(base | change, "x")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "umt5", "architectures": ["UMT5EncoderModel"]}, "model_type 'umt5' is not one of"),
        ({"model_type": "gemma2", "architectures": ["Gemma2Model"]}, "model_type 'gemma2' is not one of"),
        (
            {"model_type": "qwen3", "architectures": ["Qwen3Model"]},
            "holds a text encoder of kind 'qwen', expected 't5'",
        ),
    ],
)
def test_another_model_is_named(files: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    shutil.copytree(files / "t5", tmp_path / "t5")
    path = tmp_path / "t5" / "text_encoder" / "config.json"
    path.write_text(json.dumps(read_json(path) | change))
    with pytest.raises(ValueError, match=says):
        open_encoder(path.parent, tmp_path / "t5" / "tokenizer", LIKE["t5"])


def test_a_folder_without_a_tokenizer_says_what_to_give(files: Path, tmp_path: Path) -> None:
    says = r"the T5 text encoder needs a folder with tokenizer\.json or spiece\.model"
    with pytest.raises(ValueError, match=says):
        open_encoder(files / "t5" / "text_encoder", tmp_path, LIKE["t5"])
    with pytest.raises(ValueError, match="the T5 text encoder has no tokenizer"):
        write_tokenizer(tmp_path / "out", T5Config(**T5))
    with pytest.raises(ValueError, match="left out"):
        encoder_part(OpenedText(MissingConfig(), {}))  # type: ignore[arg-type]
    assert encoder_classes(MissingConfig()) == (None, None)
    assert encoder_classes(TextConfig(), projected=False) == ("CLIPTextModel", "CLIPTokenizer")
