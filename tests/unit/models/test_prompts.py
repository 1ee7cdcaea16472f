"""Weighted and long prompts: how they are read, and that nothing changes where they are not used."""

from __future__ import annotations

import pytest
import torch

from ldm.models.prompts import count_chunks, encode_prompts, pieces
from ldm.models.text import TextConfig, TextTower, encode_texts

TEXT = {"width": 16, "heads": 2, "layers": 2, "context_length": 10, "vocab_size": 4096, "bpe": "emoji"}
PROMPTS = ["a red apple", "", "a (green) cross: 2"]


@pytest.fixture(scope="module")
def towers() -> list[TextTower]:
    torch.manual_seed(0)
    first = TextTower(TextConfig(**TEXT, zero_empty=True))  # type: ignore[arg-type]
    second = TextTower(TextConfig(**TEXT, pad="zero", projection=6, output="penultimate", zero_empty=True))  # type: ignore[arg-type]
    return [first, second]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a (red:1.3) apple", [("a ", 1.0), ("red", 1.3), (" apple", 1.0)]),
        ("(big red: .5)(dot:2)", [("big red", 0.5), ("dot", 2.0)]),
        ("a (red) apple: 3 (x:y)", [("a (red) apple: 3 (x:y)", 1.0)]),
        ("", []),
    ],
)
def test_weights_are_read(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(prompt) == expected


@torch.no_grad()
def test_nothing_changes_where_nothing_is_asked_for(towers: list[TextTower]) -> None:
    plain = encode_texts(towers, PROMPTS)
    for how in ({}, {"weighted": True}, {"chunks": 1, "weighted": True}):
        given = encode_prompts(towers, PROMPTS, **how)  # type: ignore[arg-type]
        assert all(torch.equal(given[k], plain[k]) for k in plain)
    one = encode_prompts(towers, ["a (red:1) apple"], weighted=True)
    assert torch.equal(one["text"], encode_texts(towers, ["a red apple"])["text"])


@torch.no_grad()
def test_weights_scale_the_states_of_their_tokens(towers: list[TextTower]) -> None:
    plain = encode_texts(towers[1:], ["a red apple", "white"])
    made = encode_prompts(towers[1:], ["a (red:1.5) apple", "white"], weighted=True)
    ids = towers[1].tokenizer.encode
    first = 1 + len(ids("a"))
    inside = range(first, first + len(ids("red")))
    scaled = plain["text"][0].clone()
    scaled[list(inside)] *= 1.5
    scaled *= plain["text"][0].mean() / scaled.mean()
    torch.testing.assert_close(made["text"][0], scaled, rtol=1e-5, atol=1e-6)
    assert torch.equal(made["text"][1], plain["text"][1])
    assert torch.equal(made["pooled"], plain["pooled"])


@torch.no_grad()
def test_long_prompts_are_chunks_side_by_side(towers: list[TextTower]) -> None:
    tokenizer = towers[0].tokenizer
    words = ["red", "apple", "cross", "dot", "white", "bar", "blue", "green", "sun", "moon"]
    prompt = " ".join(words * 2)
    ids = tokenizer.encode(prompt)
    chunks = count_chunks(tokenizer, ["red", prompt])
    assert chunks == -(-len(ids) // 8) > 1
    made = encode_prompts(towers, [prompt, "red", ""], chunks=chunks)
    assert made["text"].shape == (3, 10 * chunks, 32)
    for i in range(chunks):
        part = encode_texts(towers, [tokenizer.decode(ids[8 * i : 8 * (i + 1)])])
        torch.testing.assert_close(made["text"][0, 10 * i : 10 * (i + 1)], part["text"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(made["text"][1, :10], encode_texts(towers, ["red"])["text"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(made["pooled"][1], encode_texts(towers, ["red"])["pooled"][0], rtol=0, atol=1e-5)
    assert not made["text"][2].any()  # zeros for the empty prompt of this family
    assert count_chunks(tokenizer, ["red", ""]) == 1
