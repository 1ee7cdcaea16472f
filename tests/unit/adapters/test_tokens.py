"""New tokens: what they stand for, that only they move, and what is refused."""

from __future__ import annotations

import pytest
import torch

from ldm.adapters.tokens import NewToken, TokensAdapter, TokensConfig, add_concept
from ldm.models.text import Tokenizer
from tests.unit.adapters.test_lora import inputs, model


def test_a_prompt_expands_to_all_vectors() -> None:
    tokenizer = Tokenizer("emoji", context=12)
    plain = tokenizer.encode("a red dog")
    tokenizer.add("<toy>", [5000, 5001, 5002])
    tokenizer.add("<toy>2", [5003])
    dog = tokenizer.encode("dog")
    assert tokenizer.encode("a red dog") == plain
    assert tokenizer.encode("a red <toy>") == [*plain[: -len(dog)], 5000, 5001, 5002]
    assert tokenizer.encode("<toy>2, dog") == [5003, *tokenizer.encode(", dog")]
    assert tokenizer(["<toy>"])[0].tolist() == [tokenizer.start, 5000, 5001, 5002, *[tokenizer.end] * 8]
    assert tokenizer.decode([*plain, 5000, 5001, 5002, 5003]) == "a red dog <toy> <toy>2"
    assert [o.tokens for o in tokenizer.too_long(["<toy> " * 4])] == [12]


def test_starts_from_words_and_equals_them() -> None:
    """A token of one vector that starts from one word is that word."""
    unet, tower = model()
    wanted = tower(["a dog", "dog"])
    config = TokensConfig(
        tokens=(
            NewToken(token="<one>", initializer=("dog",)),
            NewToken(token="<two>", vectors=3, initializer=("dog", "a")),
            NewToken(token="<mean>", initializer=("dog", "a")),
        ),
        max_norm=0.0,
    )
    net = TokensAdapter(config).attach(unet, [tower])
    found = tower(["a <one>", "<one>"])
    assert torch.equal(found["text"], wanted["text"])
    table = tower.model.token_embedding.weight
    dog, a = (table[tower.tokenizer.encode(w)[0]] for w in ("dog", "a"))
    rows = {n: p.detach() for n, p in net.named_parameters()}
    assert torch.equal(rows["tokens.1.0.rows"], torch.stack([dog, a, dog]))
    assert torch.equal(rows["tokens.2.0.rows"][0], (dog + a) / 2)


def test_only_the_new_rows_have_gradients_and_the_others_stay() -> None:
    unet, tower = model()
    unet.enable_gradient_checkpointing()
    before = {k: v.clone() for k, v in (unet.state_dict() | tower.model.state_dict()).items()}
    config = TokensConfig(tokens=(NewToken(token="<x>", vectors=2, initializer=("red",)), NewToken(token="<y>")))
    net = TokensAdapter(config).attach(unet, [tower])
    assert [tuple(p.shape) for p in net.parameters()] == [(2, 16), (1, 16)]
    x, t, _ = inputs()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(x, t, {"text": tower(["a <x>", "<y> <x>"])["text"]}).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in (unet.state_dict() | tower.model.state_dict()).items())


def test_norms_are_bounded_and_what_is_exported_is_what_was_used() -> None:
    unet, tower = model()
    config = TokensConfig(tokens=(NewToken(token="<x>", vectors=2, initializer=("red",)),), max_norm=1.5)
    adapter = TokensAdapter(config)
    net = adapter.attach(unet, [tower])
    with torch.no_grad():
        next(net.parameters())[1].mul_(100)
    bound = 1.5 * float(tower.model.token_embedding.weight.norm(dim=1).median())
    exported = adapter.export({n: p.detach() for n, p in net.named_parameters()})
    assert set(exported) == {"<x>"}
    assert float(exported["<x>"][1].norm()) == pytest.approx(bound, rel=1e-5)
    _, fresh = model()
    add_concept([fresh], "<x>", [exported["<x>"]])
    with torch.no_grad():
        assert torch.equal(fresh(["a <x>"])["text"], tower(["a <x>"])["text"])


def test_mistakes_are_named() -> None:
    unet, tower = model()

    def attach(**changes: object) -> None:
        adapter = TokensAdapter(TokensConfig(tokens=(NewToken(**{"token": "<new>", **changes}),)))  # type: ignore[arg-type]
        adapter.attach(unet, [tower])

    with pytest.raises(ValueError, match="'dog': the vocabulary has it already"):
        attach(token="dog")
    with pytest.raises(ValueError, match=r"initializer 'zebraish' of <new>: is \d tokens"):
        attach(initializer=("zebraish",))
    with pytest.raises(ValueError, match="without spaces"):
        attach(token="my toy")
    attach()
    with pytest.raises(ValueError, match="'<new>': exists already"):
        attach()
    with pytest.raises(ValueError, match="named twice"):
        TokensConfig(tokens=(NewToken(token="<a>"), NewToken(token="<a>")))
    with pytest.raises(ValueError, match="has width 3, the text tower 16"):
        add_concept([tower], "<z>", [torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="is for 2 text towers, the model has 1"):
        add_concept([tower], "<z>", [torch.zeros(1, 16)] * 2)
