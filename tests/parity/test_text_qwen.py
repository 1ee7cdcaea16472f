"""Qwen3 as a text encoder against transformers and the pipelines of Z-Image and FLUX.2 klein."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.models.text import QwenConfig, QwenEncoder, encode_texts, filled_encoder, trimmed
from ldm.models.text.qwen import QwenTokenizer
from tests.text_files import ODD, PROMPTS, QWEN, qwen_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_tokenizer(tmp_path_factory.mktemp("qwen") / "tokenizer")


def deviation(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def theirs_of(config: QwenConfig, state: dict[str, Tensor]) -> Any:
    """transformers' own, as `from_pretrained` makes it of a published config.json."""
    import transformers

    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "head_dim", "max_position_embeddings")
    published = {"rms_norm_eps": 1e-6, "rope_theta": 1000000, "hidden_act": "silu", "tie_word_embeddings": True}
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**published, **{key: getattr(config, key) for key in keys})
    )
    theirs.model.load_state_dict(state, strict=True)
    return theirs.eval()


def encoder(config: QwenConfig) -> QwenEncoder:
    """With weights away from their start, so that every one matters."""
    torch.manual_seed(0)
    made = QwenEncoder(config)
    for name, p in made.model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.2)
    return made


@pytest.mark.parametrize("form", ["json", "parts", "jinja"])
@pytest.mark.parametrize("thinking", [True, False])
def test_ids_equal_transformers(form: str, thinking: bool, tmp_path: Path) -> None:
    from transformers import Qwen2TokenizerFast

    folder = qwen_tokenizer(tmp_path / form, form=form)
    ours = QwenTokenizer(folder, context=40, thinking=thinking)
    theirs = Qwen2TokenizerFast.from_pretrained(str(folder))
    texts = [
        theirs.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for text in ODD
    ]
    told = theirs(texts, padding="max_length", max_length=40, truncation=True, return_tensors="pt")
    ids, mask = ours.batch(ours.rows(ODD))
    assert torch.equal(ids, told.input_ids)
    assert torch.equal(mask, told.attention_mask.bool())
    assert ("<think>" in texts[0]) is not thinking
    (lost,) = [cut for cut in ours.too_long(PROMPTS) if cut.index == 3]
    seen = theirs.decode(ids[3][len(theirs("<|im_start|>user\n").input_ids) :])
    assert PROMPTS[3].replace(" ", "") == (seen + lost.cut).replace(" ", "")


def test_a_template_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = qwen_tokenizer(tmp_path / "t", form="jinja")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        QwenTokenizer(folder, context=40)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_states_equal_transformers(folder: Path, dtype: torch.dtype, bound: float) -> None:
    config = QwenConfig(**QWEN, max_length=60, layers=(-2, 1, 0), tokenizer=folder)
    ours = encoder(config).to(dtype)
    theirs = theirs_of(config, ours.model.state_dict()).to(dtype)
    ids, mask = ours.tokenizer.batch(ours.tokenizer.rows(PROMPTS))
    states = theirs(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    told = torch.cat([states[-2], states[1], states[0]], dim=-1)
    cond = ours(PROMPTS)
    assert deviation(cond["text"], told) < bound
    assert torch.equal(cond["mask"], mask)
    assert cond["text"].shape == (4, 60, config.width)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(PROMPTS)["text"], cond["text"])


def test_states_equal_transformers_at_the_real_width(folder: Path) -> None:
    """Two layers of Qwen3-4B; a table of fewer rows."""
    config = QwenConfig(num_hidden_layers=2, vocab_size=400, max_length=24, tokenizer=folder)
    ours = QwenEncoder(config)
    theirs = theirs_of(config, ours.model.state_dict())
    ids, mask = ours.tokenizer.batch(ours.tokenizer.rows(PROMPTS[:2]))
    with torch.no_grad():
        told = theirs(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states[-2]
        assert deviation(ours(PROMPTS[:2])["text"], told) < 1e-5


def test_weights_without_memory_before_them(folder: Path) -> None:
    """Built on the meta device, the angles of positions, which no file holds, are computed nevertheless."""
    config = QwenConfig(**QWEN, max_length=60, tokenizer=folder)
    ours = encoder(config)
    again = filled_encoder(config, {k: v.clone() for k, v in ours.model.state_dict().items()}, torch.float32)
    assert torch.equal(again(PROMPTS)["text"], ours(PROMPTS)["text"])
    assert not any(p.requires_grad for p in again.parameters())


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = QwenEncoder(QwenConfig()).model
    assert sum(p.numel() for p in model.parameters()) == 4_022_468_096  # Qwen3-4B, whose head is its embedding


def test_z_image_equals_the_pipeline(folder: Path) -> None:
    from diffusers import ZImagePipeline
    from transformers import Qwen2TokenizerFast

    ours = encoder(QwenConfig(**QWEN | {"max_position_embeddings": 1024}, tokenizer=folder))
    pipe = ZImagePipeline.__new__(ZImagePipeline)
    super(ZImagePipeline, pipe).__init__()
    pipe.text_encoder = theirs_of(ours.config, ours.model.state_dict())
    pipe.tokenizer = Qwen2TokenizerFast.from_pretrained(str(folder))
    with torch.no_grad():
        told, _ = pipe.encode_prompt(list(PROMPTS), device=torch.device("cpu"), do_classifier_free_guidance=False)
        samples = trimmed(encode_texts([ours], PROMPTS))
    assert len(told) == len(samples) == 4
    for one, theirs in zip(samples, told, strict=True):
        assert one["text"].shape == theirs.shape
        assert deviation(one["text"], theirs) < 1e-5


def test_flux2_klein_equals_the_pipeline(folder: Path) -> None:
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen2TokenizerFast

    config = QwenConfig(
        **QWEN | {"max_position_embeddings": 1024}, layers=(1, 2, 3), thinking=False, masked=False, tokenizer=folder
    )
    ours = encoder(config)
    pipe = Flux2KleinPipeline.__new__(Flux2KleinPipeline)
    super(Flux2KleinPipeline, pipe).__init__()
    pipe.text_encoder = theirs_of(config, ours.model.state_dict())
    pipe.tokenizer = Qwen2TokenizerFast.from_pretrained(str(folder))
    with torch.no_grad():
        told, _ = pipe.encode_prompt(list(PROMPTS), device=torch.device("cpu"), text_encoder_out_layers=(1, 2, 3))
        cond = encode_texts([ours], PROMPTS)
    assert set(cond) == {"text"}
    assert deviation(cond["text"], told) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_transformers_loads_it(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """The rotary frequencies stay in float32: rounded to bfloat16 they would turn the 500th token elsewhere."""
    import transformers

    config = QwenConfig(**QWEN | {"max_position_embeddings": 1024}, tokenizer=folder)
    whole = encoder(config)
    theirs_of(config, whole.model.state_dict()).save_pretrained(tmp_path / "model")
    theirs: Any = transformers.Qwen3Model.from_pretrained(tmp_path / "model", dtype=dtype)
    half = filled_encoder(config, {k: v.clone() for k, v in whole.model.state_dict().items()}, dtype)
    for name, buffer in half.model.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, theirs.get_buffer(name)), name
    tokens = torch.randint(0, config.vocab_size, (1, 500), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        exact = whole.encode(tokens, mask.bool())["text"].float()
        ours = half.encode(tokens, mask.bool())["text"].float()
        other = theirs(tokens, attention_mask=mask, output_hidden_states=True).hidden_states[-2].float()
    assert deviation(ours, exact) < 1.1 * deviation(other, exact)
