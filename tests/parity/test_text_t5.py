"""T5's encoder and tokenizer against transformers, sentencepiece and diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.models.text import (
    MissingConfig,
    MissingT5,
    T5Config,
    T5Encoder,
    TextConfig,
    TextTower,
    encode_texts,
    filled_encoder,
)
from ldm.models.text.t5 import T5Tokenizer
from tests.text_files import ODD, PROMPTS, T5, t5_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t5_tokenizer(tmp_path_factory.mktemp("t5") / "tokenizer")


def deviation(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def theirs_of(config: T5Config, state: dict[str, Tensor]) -> Any:
    """transformers' own, as `from_pretrained` makes it of a published config.json."""
    import transformers

    published = {
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "dropout_rate": 0.1,
        "tie_word_embeddings": False,
        "feed_forward_proj": "gated-gelu",
    }
    keys = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    theirs = transformers.T5EncoderModel(
        transformers.T5Config(**published, **{key: getattr(config, key) for key in keys})
    )
    report = theirs.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= {"encoder.embed_tokens.weight"}
    theirs.tie_weights()
    return theirs.eval()


def encoder(config: T5Config, seed: int = 0) -> T5Encoder:
    """With weights away from their start, so that every one matters."""
    torch.manual_seed(seed)
    made = T5Encoder(config)
    for name, p in made.model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.2)
    return made


@pytest.mark.parametrize("form", ["both", "spiece", "json"])
def test_ids_equal_transformers_and_sentencepiece(form: str, tmp_path: Path) -> None:
    import sentencepiece
    from transformers import T5TokenizerFast

    folder = t5_tokenizer(tmp_path / form, form=form)
    ours = T5Tokenizer(folder, context=24)
    theirs = T5TokenizerFast.from_pretrained(str(folder))
    told = theirs(ODD, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    ids, mask = ours.batch(ours.rows(ODD))
    assert torch.equal(ids, told.input_ids)
    assert torch.equal(mask, told.attention_mask.bool())
    assert torch.equal(ours(ODD), told.input_ids)
    assert (ids[3] == ours.end).nonzero().flatten().tolist() == [23], "a text that is cut ends with the end token too"
    plain = sentencepiece.SentencePieceProcessor(
        model_file=str(t5_tokenizer(tmp_path / "plain", form="spiece") / "spiece.model")
    )
    for text in (t for t in ODD if "<" not in t):
        assert ours.encode(text) == plain.encode(text)
    assert ours.vocab_size == plain.get_piece_size() + 100 > 180


def test_what_is_cut_off_is_told(folder: Path) -> None:
    tokenizer = T5Tokenizer(folder, context=12)
    (lost,) = tokenizer.too_long(["a red apple", "the quick brown fox jumps over the lazy dog"])
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog")
    assert (lost.index, lost.tokens, lost.limit) == (1, len(ids), 11)
    assert "the quick brown fox jumps over the lazy dog".endswith(lost.cut)
    assert lost.cut
    with pytest.raises(ValueError, match="got one string"):
        tokenizer("a red apple")  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_states_equal_transformers(folder: Path, masked: bool, dtype: torch.dtype, bound: float) -> None:
    config = T5Config(**T5, max_length=40, masked=masked, tokenizer=folder)
    ours = encoder(config).to(dtype)
    theirs = theirs_of(config, ours.model.state_dict()).to(dtype)
    ids, mask = ours.tokenizer.batch(ours.tokenizer.rows(PROMPTS))
    told = theirs(ids, attention_mask=mask.long() if masked else None).last_hidden_state
    cond = ours(PROMPTS)
    assert set(cond) == ({"text", "mask"} if masked else {"text"})
    assert deviation(cond["text"], told) < bound
    if masked:
        assert torch.equal(cond["mask"], mask)
        other = theirs(ids).last_hidden_state
        assert deviation(cond["text"][0], other[0]) > 1e-3, "the mask must matter"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(PROMPTS)["text"], cond["text"])
    assert torch.equal(ours.empty["text"], ours([""])["text"])
    assert ours.empty["text"].shape == (1, 40, config.width)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_zero_padding_is_transformers_attention_mask_and_zeros(folder: Path, dtype: torch.dtype, bound: float) -> None:
    """And why it is a choice: seen, the states of padding are neither alike nor the same for every text."""
    config = T5Config(**T5, max_length=40, padding="zero", tokenizer=folder)
    ours = encoder(config).to(dtype)
    theirs = theirs_of(config, ours.model.state_dict()).to(dtype)
    ids, mask = ours.tokenizer.batch(ours.tokenizer.rows(PROMPTS))
    told = theirs(ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
    cond = ours(PROMPTS)
    assert set(cond) == {"text"}, "the network attends to the zeros"
    assert deviation(cond["text"], told) < bound
    assert not cond["text"][~mask].any()
    seen = theirs(ids).last_hidden_state
    assert deviation(cond["text"][mask], seen[mask]) > 1e-3
    one, other = seen[0], seen[1]
    assert deviation(one[-1], one[-2]) > 1e-3, "places tell them apart"
    assert deviation(one[-1], other[-1]) > 1e-3, "and so does the text"


def test_states_equal_transformers_at_the_real_width(folder: Path) -> None:
    """One layer of t5-v1_1-xxl; a table of fewer rows."""
    config = T5Config(num_layers=1, vocab_size=320, max_length=16, tokenizer=folder)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in T5Encoder(config).model.state_dict().items()}
    state = {k: torch.rand(s).add_(-0.5).mul_(0.05) + ("norm" in k) for k, s in shapes.items()}
    ours = filled_encoder(config, state)
    with torch.device("meta"):
        theirs = theirs_of(config, {k: v.to("meta") for k, v in state.items()})
    theirs.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]}, assign=True)
    with torch.no_grad():
        told = theirs(ours.tokenize(PROMPTS[:2])).last_hidden_state
        assert deviation(ours(PROMPTS[:2])["text"], told) < 1e-5


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = T5Encoder(T5Config()).model
        ids = torch.zeros(2, 300, dtype=torch.int64)
        small = T5Encoder(T5Config(**T5, max_length=300, masked=True))
        cond = small.encode(ids, torch.ones(2, 300, dtype=torch.bool))
    assert {k: v.shape for k, v in cond.items()} == {"text": (2, 300, 32), "mask": (2, 300)}, "plans need no memory"
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656  # FAMILIES.md
    names = set(model.state_dict())
    assert len(names) == 1 + 24 * 9 + 1 + 1, "the table, nine tensors a layer, the positions' and the last norm"
    assert {"shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"} <= names
    assert "encoder.block.23.layer.1.DenseReluDense.wi_1.weight" in names


def clip(**changes: Any) -> TextTower:
    base: dict[str, Any] = {"heads": 2, "layers": 3, "vocab_size": 4096, "bpe": "emoji", "activation": "quick_gelu"}
    return TextTower(TextConfig(**base | {"width": 32, "context_length": 77} | changes))


def clip_of(tower: TextTower, path: Path, projected: bool) -> tuple[Any, Any]:
    """transformers' model and tokenizer of a tower."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from ldm.checkpoint import weights
    from ldm.checkpoint.encoders import encoder_part, write_tokenizer
    from ldm.checkpoint.opened import OpenedText
    from ldm.checkpoint.settings import write_json

    hf, source = encoder_part(OpenedText(tower.config, weights.of_state(tower.model.state_dict())), projected=projected)
    path.mkdir()
    write_json(path / "config.json", hf)
    weights.write_folder(path, "model", source)
    write_tokenizer(path / "tokenizer", tower.config)
    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    return cls.from_pretrained(path).eval(), CLIPTokenizer.from_pretrained(path / "tokenizer")


class _Transformer:
    """What SD3's pipeline asks the transformer when T5 is missing."""

    class config:
        joint_attention_dim = 96
        sample_size = 8


@pytest.mark.parametrize("t5", [True, False])
def test_sd3_equals_the_pipeline(folder: Path, tmp_path: Path, t5: bool) -> None:
    from diffusers import StableDiffusion3Pipeline
    from transformers import T5TokenizerFast

    from ldm.models.transformers.sd3 import SD3Config, SD3Transformer

    torch.manual_seed(1)
    first = clip(output="penultimate", projection=24)
    second = clip(output="penultimate", projection=40, width=48, pad="zero", activation="gelu")
    third: Any = (
        encoder(T5Config(**T5 | {"d_model": 96}, tokenizer=folder)) if t5 else MissingT5(MissingConfig(width=96))
    )
    (one, one_tokens), (two, two_tokens) = clip_of(first, tmp_path / "1", True), clip_of(second, tmp_path / "2", True)
    pipe = StableDiffusion3Pipeline.__new__(StableDiffusion3Pipeline)
    super(StableDiffusion3Pipeline, pipe).__init__()
    pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, pipe.tokenizer_2 = one, two, one_tokens, two_tokens
    pipe.text_encoder_3 = theirs_of(third.config, third.model.state_dict()) if t5 else None
    pipe.tokenizer_3 = T5TokenizerFast.from_pretrained(str(folder)) if t5 else None
    pipe.transformer, pipe.tokenizer_max_length = _Transformer, 77
    prompts = [*PROMPTS[:2], "Smiling face, with SUNGLASSES"]
    with torch.no_grad():
        states, negative, pooled, _ = pipe.encode_prompt(
            prompts, None, None, device=torch.device("cpu"), negative_prompt=["", "", ""], max_sequence_length=256
        )
        cond = encode_texts([first, second, third], prompts)
        empty = encode_texts([first, second, third], [""])
    assert set(cond) == {"text.0", "pooled.0", "text.1", "pooled.1", "text.2"}
    network = SD3Transformer(
        SD3Config(
            sample_size=8,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=96,
            caption_projection_dim=16,
            pooled_projection_dim=64,
            pos_embed_max_size=8,
        )
    ).eval()
    with torch.no_grad():
        raw = network.prepared(cond)
        joined = network.prepared({"text": states, "pooled": pooled})
        other = network.prepared(empty)
    assert states.shape == (3, 77 + 256, 96)
    for key in joined:
        assert deviation(raw[key], joined[key]) < 1e-5, key
    with torch.no_grad():
        context = network.prepared({"text": negative[:1], "pooled": pooled[:1]})["context"]
    assert deviation(other["context"], context) < 1e-5


def test_flux_equals_the_pipeline(folder: Path, tmp_path: Path) -> None:
    from diffusers import FluxPipeline
    from transformers import T5TokenizerFast

    torch.manual_seed(2)
    first, second = clip(), encoder(T5Config(**T5, max_length=512, tokenizer=folder))
    pipe = FluxPipeline.__new__(FluxPipeline)
    super(FluxPipeline, pipe).__init__()
    pipe.text_encoder, pipe.tokenizer = clip_of(first, tmp_path / "1", False)
    pipe.text_encoder_2 = theirs_of(second.config, second.model.state_dict())
    pipe.tokenizer_2, pipe.tokenizer_max_length = T5TokenizerFast.from_pretrained(str(folder)), 77
    with torch.no_grad():
        states, pooled, _ = pipe.encode_prompt(PROMPTS[:3], None, device=torch.device("cpu"))
        cond = encode_texts([first, second], PROMPTS[:3])
    assert deviation(cond["text.1"], states) < 1e-5
    assert deviation(cond["pooled.0"], pooled) < 1e-5
    assert states.shape == (3, 512, 32)


def test_pixart_equals_the_pipeline(tmp_path: Path) -> None:
    from diffusers import PixArtSigmaPipeline
    from transformers import T5Tokenizer as Theirs

    folder = t5_tokenizer(tmp_path / "tokenizer", form="spiece")
    ours = encoder(T5Config(**T5, max_length=300, masked=True, lower=True, tokenizer=folder))
    pipe = PixArtSigmaPipeline.__new__(PixArtSigmaPipeline)
    super(PixArtSigmaPipeline, pipe).__init__()
    pipe.text_encoder = theirs_of(ours.config, ours.model.state_dict())
    pipe.tokenizer, pipe.transformer = Theirs.from_pretrained(str(folder)), None
    prompts = [PROMPTS[2], "  A RED Apple "]
    with torch.no_grad():
        states, mask, negative, negative_mask = pipe.encode_prompt(
            prompts, device=torch.device("cpu"), negative_prompt=""
        )
        cond, empty = encode_texts([ours], prompts), ours.empty
    assert set(cond) == {"text", "mask"}
    assert deviation(cond["text"], states) < 1e-5
    assert torch.equal(cond["mask"], mask.bool())
    assert deviation(empty["text"], negative[:1]) < 1e-5
    assert torch.equal(empty["mask"], negative_mask[:1].bool())
