"""New tokens in several text encoders: CLIP beside T5, an encoder that is left out, files of the CLIP towers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.adapters.full import FullAdapter, FullConfig
from ldm.adapters.lora import LoraAdapter, LoraConfig
from ldm.adapters.tokens import NewToken, TokensAdapter, TokensConfig, add_concept
from ldm.models.text import MissingConfig, MissingT5, T5Config, T5Encoder, TextEncoder, TextTower, encode_texts
from tests.text_files import T5, t5_tokenizer
from tests.unit.adapters.test_lora import TEXT, weights
from tests.unit.adapters.test_lora_transformers import made


@pytest.fixture
def encoders(tmp_path: Path) -> list[TextEncoder]:
    """CLIP and T5, as FLUX.1 has them."""
    torch.manual_seed(0)
    config = T5Config(**T5, tokenizer=t5_tokenizer(tmp_path / "tokenizer"))
    return [TextTower(TEXT), T5Encoder(config)]


def test_rows_train_in_clip_and_t5(encoders: list[TextEncoder]) -> None:
    network = made("flux")
    config = TokensConfig(tokens=(NewToken(token="<Thing>", vectors=2),))
    adapter = TokensAdapter(config)
    net = adapter.attach(network, encoders)
    assert [tuple(p.shape) for p in net.parameters()] == [(2, 16), (2, encoders[1].width)]
    one, two = (encode_texts(encoders, [text]) for text in ("a <Thing>", "a"))
    for key in ("text.0", "text.1"):
        assert (one[key] - two[key]).abs().max() > 1e-3
    (one["text.1"].square().mean() + one["pooled.0"].square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    exported = adapter.export({n: p.detach() for n, p in net.named_parameters()})
    assert {k: tuple(v.shape) for k, v in exported.items()} == {
        "<Thing>": (2, 16),
        "text_encoder_2.<Thing>": (2, encoders[1].width),
    }


def test_a_file_of_the_clip_tower_alone(encoders: list[TextEncoder]) -> None:
    """Its word is known to CLIP; T5 reads it as the letters that it is."""
    before = encode_texts(encoders, ["a <x>"])
    assert add_concept(encoders, "<x>", [torch.randn(2, 16)]) == ["<x>"]
    after = encode_texts(encoders, ["a <x>"])
    assert not torch.equal(after["pooled.0"], before["pooled.0"])
    assert torch.equal(after["text.1"], before["text.1"])
    with pytest.raises(ValueError, match="is for 3 text towers, the model has 2"):
        add_concept(encoders, "<y>", [torch.randn(1, 16)] * 3)


def test_an_encoder_that_is_left_out(encoders: list[TextEncoder]) -> None:
    """SD3 without T5: zeros stand in its place, and nothing of it trains."""
    text = [TextTower(TEXT), TextTower(TEXT), MissingT5(MissingConfig())]
    network = made("sd3")
    net = TokensAdapter(TokensConfig(tokens=(NewToken(token="<x>"),))).attach(network, text)
    assert [tuple(p.shape) for p in net.parameters()] == [(1, 16), (1, 16)]
    whole = FullAdapter(FullConfig(text=True)).attach(made("sd3"), text)
    assert {n.split(".")[1] for n in weights(whole) if n.startswith("text.")} == {"0", "1"}
    corrected = weights(LoraAdapter(LoraConfig(text=True)).attach(made("sd3"), text))
    assert {"layers.text_encoder/", "layers.text_encoder_2/"} == {
        n.partition("text_model")[0] for n in corrected if "text_encoder" in n
    }


def test_all_of_t5_trains_and_lora_on_it_is_refused(encoders: list[TextEncoder]) -> None:
    whole = FullAdapter(FullConfig(text=True)).attach(made("flux"), encoders)
    assert all(p.requires_grad for p in whole.parameters())
    cond = encode_texts(encoders, ["a dog"])
    (cond["text.1"].square().mean() + cond["pooled.0"].square().mean()).backward()
    idle = [n for n, p in whole.named_parameters() if n.startswith("text.") and p.grad is None]
    assert idle == []
    with pytest.raises(ValueError, match=r"text: LoRA adapts CLIP towers alone, and the PixArt.*T5Encoder"):
        LoraAdapter(LoraConfig(text=True)).attach(made("pixart"), encoders[1:])
