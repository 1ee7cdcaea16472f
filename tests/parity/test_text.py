"""Text towers and tokenizers against open_clip and transformers with the same weights, per family's rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoint.maps import carry_out, text_from_hf, text_to_hf
from ldm.models.text import ClipConfig, TextConfig, TextTower, Tokenizer, build_clip, build_tokenizer

torch.set_num_threads(1)
PROMPTS = ["a red apple", "", "Smiling face, with SUNGLASSES!", "a very long one " * 20]
SMALL = ClipConfig(text_width=48, text_heads=3, text_layers=3, vision_width=32, vision_layers=1, vision_head_width=16)


def deviation(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def hf_model(config: TextConfig, state: dict[str, Tensor], projected: bool):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    model = cls(
        CLIPTextConfig(
            attn_implementation="sdpa",  # the eager one takes its softmax in float32
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context_length,
            hidden_act=config.activation,
            projection_dim=config.projection or 16,
            eos_token_id=config.vocab_size - 1,
            bos_token_id=config.vocab_size - 2,
        )
    )
    model = model.to(state["ln_final.bias"].dtype)
    state = carry_out(text_to_hf(state), state, "tower")
    if not projected:
        state = {k.removeprefix("text_model."): v for k, v in state.items() if k != "text_projection.weight"}
    report = model.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert all(k.endswith("position_ids") for k in report.missing_keys)
    return model.eval()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_families_equal_transformers(dtype: torch.dtype, bound: float, activation: str) -> None:
    torch.manual_seed(0)
    base = {"width": 48, "heads": 3, "layers": 3, "vocab_size": 4096, "context_length": 20, "bpe": "emoji"}
    last = TextTower(TextConfig(**base, activation=activation, projection=24)).to(dtype)
    torch.nn.init.normal_(last.model.ln_final.bias)
    tokens = last.tokenize(PROMPTS)
    theirs = hf_model(last.config, last.model.state_dict(), projected=True)
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True)
    ours = last.encode(tokens)
    assert deviation(ours["text"], expected.last_hidden_state) < bound
    assert deviation(ours["pooled"], expected.text_embeds) < bound
    for rule in ("penultimate", "penultimate_norm"):
        tower = TextTower(TextConfig(**base, activation=activation, projection=24, output=rule)).to(dtype)
        tower.model.load_state_dict(last.model.state_dict())
        states = expected.hidden_states[-2]
        if rule == "penultimate_norm":
            states = theirs.text_model.final_layer_norm(states)
        assert deviation(tower.encode(tokens)["text"], states) < bound
        assert deviation(tower.encode(tokens)["pooled"], expected.text_embeds) < bound


def test_penultimate_norm_is_the_last_state_of_a_shorter_tower() -> None:
    torch.manual_seed(0)
    base = {"width": 32, "heads": 2, "vocab_size": 4096, "context_length": 16, "bpe": "emoji", "activation": "gelu"}
    long = TextTower(TextConfig(**base, layers=3, output="penultimate_norm"))
    short = TextTower(TextConfig(**base, layers=2))
    state = long.model.state_dict()
    short.model.load_state_dict({k: v for k, v in state.items() if not k.startswith("transformer.resblocks.2.")})
    tokens = long.tokenize(PROMPTS)
    assert torch.equal(long.encode(tokens)["text"], short.encode(tokens)["text"])


def test_clip_tower_is_the_models_own() -> None:
    torch.manual_seed(0)
    clip = build_clip(SMALL).eval()
    tower = TextTower.of_clip(clip, SMALL.text)
    tokens = build_tokenizer(SMALL)(PROMPTS)
    with torch.no_grad():
        expected = clip.encode_text(tokens)
        assert deviation(tower.encode(tokens)["pooled"], expected) < 1e-5
        # what follows the end token cannot be seen by it
        zeros = tokens.masked_fill((tokens == tower.tokenizer.end).cumsum(1) > 1, 0)
        assert deviation(clip.encode_text(zeros), expected) < 1e-5
    assert clip.encode_image(torch.zeros(2, 3, 64, 64)).shape == (2, SMALL.embed_dim)


def test_hf_names_round_trip() -> None:
    torch.manual_seed(0)
    state = build_clip(SMALL).state_dict()
    tower = TextTower.of_clip(build_clip(SMALL), SMALL.text)
    state = tower.model.state_dict()
    hf = carry_out(text_to_hf(state), state, "tower")
    back = carry_out(text_from_hf(hf), hf, "file")
    assert set(back) == set(state)
    assert all(torch.equal(back[k], state[k]) for k in state)
    bad = hf | {"text_model.encoder.layers.0.surprise.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"file: not known 1 key.*surprise"):
        carry_out(text_from_hf(bad), bad, "file")
    del hf["text_model.encoder.layers.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match=r"file: missing 1 key.*layers\.1\.mlp\.fc1\.bias"):
        carry_out(text_from_hf(hf), hf, "file")


@pytest.mark.parametrize("bpe", ["standard", "emoji"])
def test_tokenizer_equals_open_clip_and_transformers(bpe: str, tmp_path: Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    from ldm.models.text import EMOJI_BPE

    tokenizer = Tokenizer(bpe, context=24)
    assert tokenizer.end == tokenizer.vocab_size - 1
    theirs = SimpleTokenizer(context_length=24, **({} if bpe == "standard" else {"bpe_path": str(EMOJI_BPE)}))
    assert torch.equal(Tokenizer(bpe, context=24, pad="zero")(PROMPTS), theirs(PROMPTS))
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer.vocabulary()))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in tokenizer.merges()) + "\n")
    hugging = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    ids = hugging(PROMPTS, padding="max_length", truncation=True, max_length=24, return_tensors="pt").input_ids
    assert torch.equal(tokenizer(PROMPTS), ids)
    if bpe == "emoji":
        again = Tokenizer(str(tmp_path / "merges.txt"), context=24)
        assert again.vocabulary() == tokenizer.vocabulary()


def test_too_long_prompts_are_told() -> None:
    tokenizer = Tokenizer("emoji", context=8)
    found = tokenizer.too_long(["a red apple", "a red apple with a face and sun"])
    assert [(o.index, o.limit) for o in found] == [(1, 6)]
    assert found[0].cut == tokenizer.decode(tokenizer.encode("a red apple with a face and sun")[6:])
    assert tokenizer(["x " * 50])[0, -1] == tokenizer.end


@pytest.mark.parametrize(
    ("config", "projected", "count"),
    [
        (TextConfig(), False, 123_060_480),
        (TextConfig(width=1024, heads=16, layers=23, activation="gelu", pad="zero"), False, 340_387_840),
    ],
)
def test_parameter_counts(config: TextConfig, projected: bool, count: int) -> None:
    with torch.device("meta"):
        tower = TextTower(config)
    assert sum(p.numel() for p in tower.parameters()) == count


def test_empty_prompt_rules() -> None:
    base = {"width": 32, "heads": 2, "layers": 2, "vocab_size": 4096, "context_length": 8, "bpe": "emoji"}
    tower = TextTower(TextConfig(**base))
    assert torch.equal(tower.empty["text"], tower.encode(tower.tokenize([""]))["text"])
    zero = TextTower(TextConfig(**base, zero_empty=True))
    assert zero.empty["text"].abs().sum() == 0
    cond = zero(["", "apple"])
    assert cond["text"][0].abs().sum() == 0
    assert cond["pooled"][1].abs().sum() > 0
