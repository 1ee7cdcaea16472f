"""What text encoders share: placeholders, texts without padding, new tokens, weights of words, types of weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.models.text import (
    MissingConfig,
    MissingT5,
    QwenConfig,
    QwenEncoder,
    T5Config,
    T5Encoder,
    TextConfig,
    TextTower,
    build_encoder,
    encode_texts,
    filled_encoder,
    padded,
    trimmed,
)
from ldm.models.text.int8 import Int8Linear
from ldm.models.text.prompts import count_chunks, cut_off, encode_prompts, too_long
from tests.text_files import PROMPTS, QWEN, T5, WORDS, qwen_tokenizer, t5_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    t5_tokenizer(folder / "t5")
    qwen_tokenizer(folder / "qwen")
    return folder


def t5(files: Path, **changes: object) -> T5Encoder:
    torch.manual_seed(0)
    return T5Encoder(T5Config(**T5 | {"max_length": 32} | changes, tokenizer=files / "t5"))


def qwen(files: Path) -> QwenEncoder:
    torch.manual_seed(0)
    return QwenEncoder(QwenConfig(**QWEN, max_length=48, tokenizer=files / "qwen"))


def clip() -> TextTower:
    torch.manual_seed(0)
    return TextTower(TextConfig(width=16, heads=2, layers=2, context_length=12, vocab_size=4096, bpe="emoji"))


def test_keys_tell_the_place_where_encoders_differ(files: Path) -> None:
    one, two, third = clip(), t5(files, masked=True), MissingT5(MissingConfig(width=32, tokens=7))
    assert set(encode_texts([one], PROMPTS)) == {"text", "pooled"}
    assert set(encode_texts([two], PROMPTS)) == {"text", "mask"}
    cond = encode_texts([one, two, third], PROMPTS)
    assert set(cond) == {"text.0", "pooled.0", "text.1", "mask.1", "text.2"}
    assert torch.equal(cond["text.1"], two(PROMPTS)["text"])
    assert torch.equal(cond["text.2"], torch.zeros(4, 7, 32))
    towers = encode_texts([one, one], PROMPTS)
    assert set(towers) == {"text", "pooled"}
    assert towers["text"].shape == (4, 12, 32)


def test_a_placeholder_follows_device_and_type_and_refuses_tokens() -> None:
    encoder = build_encoder(MissingConfig())
    assert encoder.to(torch.bfloat16)(["a", "b"])["text"].dtype == torch.bfloat16
    assert encoder(["a"])["text"].shape == (1, 256, 4096)
    assert (encoder.width, encoder.context, dict(encoder.state_dict())) == (4096, 256, {})
    with pytest.raises(ValueError, match="cannot have it"):
        encoder.add_token("<thing>", 1, lambda: torch.zeros(1, 4096))
    with pytest.raises(ValueError, match="8-bit weights"):
        encoder.quantize_8bit()


def test_trimmed_texts_come_back_padded(files: Path) -> None:
    cond = encode_texts([clip(), t5(files, masked=True)], PROMPTS)
    samples = trimmed(cond)
    lengths = [len(s["text.1"]) for s in samples]
    assert lengths == cond["mask.1"].sum(1).tolist()
    assert len(set(lengths)) > 2
    assert all(s["text.0"].shape == (12, 16) and s["pooled.0"].shape == (16,) for s in samples)
    whole = padded(samples, 32)
    assert torch.equal(whole["mask.1"], cond["mask.1"])
    assert torch.equal(whole["text.1"], cond["text.1"] * cond["mask.1"][..., None])
    assert torch.equal(whole["text.0"], cond["text.0"])
    assert torch.equal(whole["pooled.0"], cond["pooled.0"])
    short = padded(samples[:3])
    assert short["text.1"].shape[1] == short["mask.1"].shape[1] == max(lengths[:3])
    with pytest.raises(ValueError, match="longer than 3"):
        padded(samples, 3)
    with pytest.raises(ValueError, match="without a mask"):
        padded([{"text": torch.zeros(2, 4)}, {"text": torch.zeros(3, 4)}])
    plain = encode_texts([t5(files)], PROMPTS)
    assert torch.equal(padded(trimmed(plain))["text"], plain["text"]), "padding that no mask names stays"


@pytest.mark.parametrize("make", [t5, qwen])
def test_new_tokens_stand_for_vectors(files: Path, make: type) -> None:
    encoder = make(files)
    word = "cat"
    assert encoder.tokenizer.free("<thing>")
    before = encoder([f"a {word} here"])["text"]
    ids = encoder.tokenizer.encode(f"a {word} here")
    plain = encoder.tokenizer.encode("a"), encoder.tokenizer.encode(" here" if make is qwen else "here")
    own = ids[len(plain[0]) : len(ids) - len(plain[1])]
    rows = encoder.table.weight[own].clone().requires_grad_()
    encoder.add_token("<thing>", len(own), lambda: rows)
    text = "a<thing> here" if make is qwen else "a <thing> here"
    after = encoder([text])["text"]
    assert torch.allclose(after, before, atol=1e-5), "vectors of a word give the word's states"
    after.sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().sum() > 0
    assert encoder.tokenizer.decode(encoder.tokenizer.encode(text)).split()[-1] == "here"
    assert "<thing>" in encoder.tokenizer.decode(encoder.tokenizer.encode(text))
    with pytest.raises(ValueError, match="exists already"):
        encoder.add_token("<thing>", 1, lambda: rows)
    with pytest.raises(ValueError, match="has it already"):
        encoder.add_token("</s>" if make is t5 else "<|im_end|>", 1, lambda: rows)


def test_weights_scale_the_states_of_their_words(files: Path) -> None:
    encoder = t5(files)
    plain = encoder(["a red apple", "a cat"])["text"]
    made = encode_prompts([encoder], ["a (red:1.5) apple", "a cat"], weighted=True)["text"]
    tokenizer = encoder.tokenizer
    start = len(tokenizer.encode("a"))
    factors = torch.ones(2, 32)
    factors[0, start : start + len(tokenizer.encode("red"))] = 1.5
    assert torch.allclose(made, plain * factors[..., None])
    assert torch.equal(encode_prompts([encoder], ["a red apple", "a cat"], weighted=True)["text"], plain)
    assert torch.equal(encode_prompts([encoder], ["a (red:1) apple", "a cat"], weighted=True)["text"], plain)
    with pytest.raises(ValueError, match=r"weights=True \(--prompt-weights\): the Qwen3"):
        encode_prompts([qwen(files)], ["a (red:1.5) apple"], weighted=True)


def test_long_prompts_are_clips_chunks_and_t5s_whole_text(files: Path) -> None:
    one, two = clip(), t5(files, max_length=64)
    prompt = "two green eyes of a cat, the quick brown fox"
    chunks = count_chunks(one.tokenizer, [prompt])
    assert chunks == 2
    assert count_chunks(two.tokenizer, [prompt, ""]) == 1
    cond = encode_prompts([one, two], [prompt], chunks=chunks)
    assert cond["text.0"].shape == (1, 24, 16)
    assert torch.equal(cond["text.1"], two([prompt])["text"])
    assert torch.equal(cond["text.0"], encode_prompts([one], [prompt], chunks=chunks)["text"])
    assert cut_off([one, two], [prompt]) == []
    assert cut_off([one, MissingT5(MissingConfig(width=32))], [prompt]) == too_long(one.tokenizer, [prompt])
    long = " ".join(WORDS)
    (lost,) = cut_off([one, two], [long])
    assert long.replace(" ", "").endswith(lost.cut.replace(" ", ""))
    assert count_chunks(two.tokenizer, [long]) == -(-lost.tokens // 63)
    with pytest.raises(ValueError, match="joins contexts of CLIP's text towers alone"):
        encode_prompts([one, two], [long], chunks=count_chunks(one.tokenizer, [long]))


def test_half_precision_keeps_what_would_overflow(files: Path) -> None:
    encoder = t5(files)
    whole = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    wide = encoder.model.encoder.block[0].layer[1].DenseReluDense.wo
    exact = encoder(PROMPTS)["text"]
    half = filled_encoder(encoder.config, whole, torch.float16)
    for made in (encoder.to(torch.float16), half):
        layer = made.model.encoder.block[0].layer[1].DenseReluDense
        assert torch.equal(layer.wo.weight, whole["encoder.block.0.layer.1.DenseReluDense.wo.weight"])
        assert layer.wi_0.weight.dtype == made.dtype == torch.float16
        assert made(PROMPTS)["text"].dtype == torch.float16
        assert torch.nn.functional.cosine_similarity(made(PROMPTS)["text"].float(), exact, dim=-1).min() > 0.999
    with torch.no_grad():  # 64 inputs of 1 with weights of 2000 are too large for float16
        wide.weight.fill_(2000.0)
    assert torch.isfinite(encoder(PROMPTS)["text"]).all()
    assert encoder.to(torch.bfloat16)(PROMPTS)["text"].dtype == torch.bfloat16
    assert wide.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("make", [t5, qwen])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_8_bits_are_a_quarter_and_near(files: Path, make: type, dtype: torch.dtype) -> None:
    encoder = t5(files, d_model=128, d_kv=32, d_ff=256) if make is t5 else make(files)
    linear = [m for m in encoder.model.modules() if isinstance(m, nn.Linear)]
    for m in linear:  # no two rows alike
        m.weight.data *= torch.linspace(0.5, 1.5, len(m.weight))[:, None]
    exact = encoder(PROMPTS)
    before = sum(m.weight.numel() * 4 for m in linear)
    encoder.to(dtype).quantize_8bit()
    layers = [m for m in encoder.model.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == len(linear)
    assert not any(isinstance(m, nn.Linear) for m in encoder.model.modules())
    after = sum(m.weight.numel() + m.scale.numel() * 4 for m in layers)
    assert before / 4 <= after <= before / 3.2
    assert all(m.scale.dtype == torch.float32 for m in layers)
    made = encoder(PROMPTS)["text"]
    assert made.dtype == dtype
    seen = exact.get("mask", torch.ones(made.shape[:2], dtype=torch.bool))
    cosine = torch.nn.functional.cosine_similarity(made.float()[seen], exact["text"][seen], dim=-1)
    assert cosine.min() > 0.999


def test_8_bits_of_one_layer_are_the_nearest() -> None:
    linear = nn.Linear(5, 3)
    with torch.no_grad():
        linear.weight[1] *= 100
        linear.weight[2] = 0
    made, x = Int8Linear(linear), torch.randn(4, 5)
    weight = made.weight * made.scale
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((weight - linear.weight).abs() <= step / 2 + 1e-6).all()
    assert torch.equal(weight[2], torch.zeros(5))
    assert torch.allclose(made(x), x @ weight.T + linear.bias)
    assert made.to(torch.float16).scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (T5Config, "the T5 text encoder has no tokenizer: set `tokenizer` to a folder with tokenizer.json or spiece"),
        (
            QwenConfig,
            "the Qwen3 text encoder has no tokenizer: set `tokenizer` to a folder with tokenizer.json or vocab",
        ),
    ],
)
def test_a_tokenizer_that_is_missing_is_named(config: type, says: str, tmp_path: Path) -> None:
    sizes = T5 if config is T5Config else QWEN
    with pytest.raises(ValueError, match=says):
        build_encoder(config(**sizes, max_length=20))(["a"])
    with pytest.raises(ValueError, match=r"needs a folder with tokenizer\.json or"):
        build_encoder(config(**sizes, max_length=20, tokenizer=tmp_path))(["a"])


def test_a_tokenizer_larger_than_the_table_is_named(files: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 100"):
        t5(files, vocab_size=100)(["a"])


def test_without_transformers_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for config in (T5Config(**T5), QwenConfig(**QWEN, max_length=20)):
        with pytest.raises(ValueError, match=r"needs transformers: pip install 'ldm\[transformers\]'"):
            build_encoder(config)


@pytest.mark.parametrize(
    ("config", "changes", "says"),
    [
        (T5Config, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj 'gated-silu' is not one of"),
        (T5Config, {"num_layers": 0}, "num_layers must be at least 1, got 0"),
        (T5Config, {"relative_attention_num_buckets": 7}, "relative_attention_num_buckets 7"),
        (QwenConfig, {"num_attention_heads": 6, "num_key_value_heads": 4}, "must be a multiple"),
        (QwenConfig, {"layers": (40,)}, r"layers \[40\] must name some in \[-37, 37\)"),
        (QwenConfig, {"max_length": 50_000}, "max_length must be at most max_position_embeddings 40960"),
        (MissingConfig, {"tokens": 0}, "tokens must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_named(config: type, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config(**changes)
