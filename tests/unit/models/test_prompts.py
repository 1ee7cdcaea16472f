"""Weighted and long prompts: how they are read, and that nothing changes where they are not used."""

from __future__ import annotations

import pytest
import torch

from ldm.models.text import TextConfig, TextTower, encode_texts
from ldm.models.text.prompts import count_chunks, encode_prompts, notes, pieces, too_long

TEXT = {"width": 16, "heads": 2, "layers": 2, "context_length": 10, "vocab_size": 4096, "bpe": "emoji"}
PROMPTS = ["a red apple", "", "a green cross: 2"]


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
        ("a (red) apple: 3 (x:y)", [("a ", 1.0), ("red", 1.1), (" apple: 3 ", 1.0), ("x:y", 1.1)]),
        ("", []),
        # the examples that A1111 publishes with its parser
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        # nested, negative, zero, exponents, colons within, spaces
        ("(a red (apple) here:1.3)", [("a red ", 1.3), ("apple", 1.43), (" here", 1.3)]),
        ("((red:1.2) apple:1.5)", [("red", 1.8), (" apple", 1.5)]),
        ("(red:-1) [(a:-0.5)]", [("red", -1.0), ("a", -0.5 / 1.1)]),
        ("(red:0)(a:5e-1)( :1.3)", [("red", 0.0), ("a", 0.5)]),
        ("(http://x : 1.2 )", [("http://x ", 1.2)]),
        (r"(saber \(fate\):1.2) a\b", [("saber (fate)", 1.2), (r" a\b", 1.0)]),
        ("(a:1) (b:1)", [("a b", 1.0)]),
        ("a face :)", [("a face :)", 1.0)]),
    ],
)
def test_weights_are_read(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = pieces(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("prompt", "expected", "says"),
    [
        ("(red:1.3", [("red", 1.3)], "'(red:1.3': its bracket is not closed; the weight is 1.3"),
        ("[red", [("red", 1 / 1.1)], "'[red': its bracket is not closed"),
        ("(red)) x", [("red", 1.1), (") x", 1.0)], "')' closes nothing"),
        ("(red:1,3)", [("red", 1.3)], "1,3 is read as 1.3"),
        ("(red:1.2.3)", [("red:1.2.3", 1.1)], "'1.2.3' is no weight"),
        ("(red:50%)", [("red:50%", 1.1)], "'50%' is no weight"),
        ("(red:1.2:1.4)", [("red", 1.4)], "of several weights the last one counts; 1.2 is left out"),
        ("(red:1e3)", [("red", 1000.0)], "'red': its weight is 1000, far beyond"),
        (r"\(red:1.3\) x", [("(red) x", 1.0)], "escaped brackets are words and take no weight; ':1.3' is left out"),
        ("a <lora:my style:0.8> x", [("a  x", 1.0)], "'<lora:my style:0.8>': names in prompts load nothing"),
        ("[cat:dog:0.5] x", [("cat x", 1.0)], "'[cat:dog:0.5]': changing words between steps is not supported"),
        ("[(cat:1.2):0.5]", [("cat", 1.2)], "'[(cat:1.2):0.5]': changing words between steps is not supported"),
        ("[:dog:5]", [("dog", 1.0)], "read as 'dog'"),
        ("[cat|dog]", [("cat", 1.0)], "'[cat|dog]': changing words between steps is not supported"),
        ("cat AND dog", [("cat AND dog", 1.0)], "'AND': composing prompts is not supported"),
        ("cat BREAK dog", [("cat", 1.0), ("dog", 1.0)], "'BREAK': left out; it begins a chunk with long=True"),
        ("(cat)++", [("cat", 1.1), ("++", 1.0)], "')++': compel's signs are not supported"),
        ("{cat}", [("{cat}", 1.0)], "'{cat}': braces mean nothing"),
        ("(" * 300 + "a", None, "too many brackets"),
    ],
)
def test_what_is_not_the_syntax_is_named(prompt: str, expected: list[tuple[str, float]] | None, says: str) -> None:
    if expected is not None:
        assert pieces(prompt) == [(text, pytest.approx(weight)) for text, weight in expected]
    assert any(says in note for note in notes([prompt, prompt], weighted=True, long=False))


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("a (red:1.3) apple", "(red:1.3)"),
        ("((red)) x", "((red))"),
        ("a <lora:x:1> b", "<lora:x:1>"),
        ("[a:b:0.5]", "[a:b:0.5]"),
        ("a BREAK b", "BREAK"),
        ("a AND b", "AND"),
        ("a (red) apple, break and :)", None),
        ("<my-dog> [x]", None),
    ],
)
def test_weights_that_are_not_read_are_said_once(prompt: str, part: str | None) -> None:
    found = notes([prompt, prompt, ""], weighted=False, long=False)
    assert len(found) == (part is not None)
    assert part is None or repr(part) in found[0]
    assert "--prompt-weights" in "".join(found) or part is None


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
    assert torch.equal(made["text"][0], scaled)
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


@torch.no_grad()
@pytest.mark.parametrize("weights", [(0.0, -0.5, 2.0), (1.3, 0.5, 0.0), (-2.0, 2.0, -1.0)])
def test_tokens_without_a_weight_keep_their_states_whatever_the_others_have(
    towers: list[TextTower], weights: tuple[float, ...]
) -> None:
    """Both towers, last and penultimate states: none is divided by a mean, which may be near 0 or change its sign."""
    words = ["red", "apple", "cross"]
    plain = encode_texts(towers, [" ".join(["a", *words])])
    prompt = "a " + " ".join(f"({word}:{weight})" for word, weight in zip(words, weights, strict=True))
    made = encode_prompts(towers, [prompt], weighted=True)
    factors, at = torch.ones(10), 1 + len(towers[0].tokenizer.encode("a"))
    for word, weight in zip(words, weights, strict=True):
        count = len(towers[0].tokenizer.encode(word))
        factors[at : at + count] = weight
        at += count
    assert torch.equal(made["text"][0], plain["text"][0] * factors[:, None])
    assert torch.equal(made["pooled"], plain["pooled"])


@torch.no_grad()
def test_break_begins_a_chunk(towers: list[TextTower]) -> None:
    prompt = "a red BREAK (apple:1.5) dot"
    assert count_chunks(towers[0].tokenizer, [prompt], weighted=True) == 2
    made = encode_prompts(towers, [prompt], weighted=True, chunks=2)
    first, second = encode_texts(towers, ["a red", "apple dot"])["text"]
    torch.testing.assert_close(made["text"][0, :10], first, rtol=0, atol=1e-6)
    count = len(towers[0].tokenizer.encode("apple"))
    second[1 : 1 + count] *= 1.5
    torch.testing.assert_close(made["text"][0, 10:], second, rtol=0, atol=1e-6)
    one = encode_prompts(towers, ["a red BREAK apple"], weighted=True)
    assert torch.equal(one["text"], encode_texts(towers, ["a red apple"])["text"])


def test_weights_do_not_count_as_words_of_a_long_prompt(towers: list[TextTower]) -> None:
    tokenizer, prompt = towers[0].tokenizer, "(red:1.25) (apple:0.75) dot"
    assert too_long(tokenizer, ["", prompt], weighted=True) == []
    (cut,) = too_long(tokenizer, ["", prompt])
    assert (cut.index, cut.limit, cut.tokens) == (1, 8, len(tokenizer.encode(prompt)))
