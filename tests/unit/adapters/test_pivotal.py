"""Pivotal tuning: words and corrections train together, each at its own speed, and are exported as what they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ldm.adapters.lora import LoraAdapter, LoraConfig, LoraNet
from ldm.adapters.pivotal import PivotalAdapter, PivotalConfig
from ldm.adapters.tokens import NewToken, TokensAdapter, TokensConfig, add_concept
from ldm.cli.finetune import parser, tree
from ldm.config.load import decode
from ldm.recipes.dreambooth import DreamboothTask
from tests.unit.adapters.test_lora import inputs, model

NEW = (NewToken(token="<x>", vectors=2, initializer=("red",)),)
LORA = LoraConfig(rank=2, targets=("attention",))


def attached(**changes: object) -> tuple[PivotalAdapter, torch.nn.Module, list]:
    unet, tower = model()
    adapter = PivotalAdapter(dataclasses.replace(PivotalConfig(tokens=NEW, lora=LORA), **changes))
    torch.manual_seed(1)
    return adapter, adapter.attach(unet, [tower]), [unet, tower]


def test_only_words_and_corrections_train_and_adam_moves_the_words_speed_times_as_far() -> None:
    """Adam's first step is the rate for every weight that has a gradient: eps is far below it here."""
    adapter, net, (unet, tower) = attached(speed=4.0)
    frozen = {k: v.clone() for k, v in (unet.state_dict() | tower.model.state_dict()).items()}
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    with torch.no_grad():
        for name, p in net.named_parameters():  # `down` has no gradient before `up` is something
            if name.endswith("up"):
                p.normal_(std=0.1)
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    before = adapter.concepts(weights)["<x>"][0]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-30)
    x, t, _ = inputs()
    net(x, t, {"text": tower(["a <x>", "<x>"])["text"]}).double().square().sum().backward()
    optimizer.step()
    assert all(torch.equal(v, frozen[k]) for k, v in (unet.state_dict() | tower.model.state_dict()).items())
    now = {n: p.detach() for n, p in net.named_parameters()}
    moved = (adapter.concepts(now)["<x>"][0] - before).abs()
    assert torch.allclose(moved, torch.full_like(moved, 4e-3), atol=2e-6)
    steps = torch.cat([(now[n] - weights[n]).abs().flatten() for n in now if n.endswith(("down", "up"))])
    assert float(steps.median()) == pytest.approx(1e-3, rel=1e-3)
    assert float(steps.max()) < 1.01e-3


def test_exported_parts_are_those_of_either_adapter_and_draw_the_same() -> None:
    """A LoRA and an embedding put on a fresh model answer as the trained module does."""
    adapter, net, (_, tower) = attached(speed=3.0)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    weights = {n: p.detach() for n, p in net.named_parameters()}
    unet, fresh = model()
    x, t, _ = inputs()
    with torch.no_grad():
        wanted = net(x, t, {"text": tower(["a <x>", "dog"])["text"]})
        add_concept([fresh], "<x>", adapter.concepts(weights)["<x>"])
        plain = LoraAdapter(LORA)
        other = plain.attach(unet, [fresh])
        assert isinstance(other, LoraNet)
        plain.load(other, adapter.corrections(weights))
        assert torch.allclose(other(x, t, {"text": fresh(["a <x>", "dog"])["text"]}), wanted, atol=1e-6)
    names = set(adapter.export(weights))
    assert "<x>" in names
    assert names - {"<x>"} == set(plain.export({n: p.detach() for n, p in other.named_parameters()}))


def test_speed_1_is_textual_inversion_bit_by_bit() -> None:
    unet, tower = model()
    rows = TokensAdapter(TokensConfig(tokens=NEW)).attach(unet, [tower])
    _, net, _ = attached(speed=1.0)
    own = dict(rows.named_parameters())
    assert own
    assert all(torch.equal(dict(net.named_parameters())[f"words.{n}"], p) for n, p in own.items())


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"speed must be above 0, got 0\.0"):
        PivotalConfig(tokens=NEW, speed=0.0)
    task = {"kind": "dreambooth", "images": str(tmp_path), "noun": "dog", "adapter": {"kind": "pivotal", "tokens": [
        {"token": "<x>"}]}}  # fmt: skip
    with pytest.raises(ValueError, match=r"adapter\.tokens: '<x>' is not in the subject's caption 'a sks dog'"):
        decode(DreamboothTask, task, "task")


def test_the_command_makes_the_identifier_a_new_word(tmp_path: Path) -> None:
    argv = ["dreambooth", "--images", str(tmp_path), "--class", "dog", "--pivotal", "--num-vectors", "2"]
    found = tree(parser().parse_args(argv))
    assert found["task"]["identifier"] == "<thing>"
    adapter = found["task"]["adapter"]
    assert adapter["tokens"] == [{"token": "<thing>", "vectors": 2, "initializer": ["dog"]}]
    assert (adapter["kind"], adapter["lora"]["rank"]) == ("pivotal", 4)
    assert found["train"]["optim"]["weight_decay"] == 0.0
    plain = tree(parser().parse_args(argv[:5]))
    assert (plain["task"]["identifier"], plain["train"]["optim"]["weight_decay"]) == ("sks", 0.01)


@pytest.mark.parametrize("option", [("--initializer-token", "dog"), ("--num-vectors", "2"), ("--max-norm", "0")])
def test_options_of_the_new_word_are_refused_without_it(option: tuple[str, str], tmp_path: Path) -> None:
    argv = ["dreambooth", "--images", str(tmp_path), "--class", "dog", "--lora", *option]
    with pytest.raises(ValueError, match=f"{option[0]}: is of the new word that --pivotal trains"):
        tree(parser().parse_args(argv))
