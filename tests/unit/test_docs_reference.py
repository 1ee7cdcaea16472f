"""The references that the site makes: no key, no command and no option is missing."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.make import keys, verbs
from ldm.cli.__main__ import VERBS
from ldm.config.load import encode
from ldm.config.schema import load_run

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("[tfd][ri]*/*.yaml"))
PAGES = keys.pages()
TEXT = "\n".join(PAGES.values())


def told() -> dict[str, set[str]]:
    """The keys of each class that the pages have, by the class's anchor."""
    found = {}
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        (anchor,) = re.findall(r"\{ #(\w+) \}", section.splitlines()[0])
        found[anchor] = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    return found


def values(value: Any) -> Iterator[Any]:
    """Every dataclass that a config's object holds."""
    if dataclasses.is_dataclass(value):
        yield value
        for f in dataclasses.fields(value):
            yield from values(getattr(value, f.name))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from values(one)
    elif isinstance(value, dict):
        yield from values(list(value.values()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_key_of_every_shipped_config_is_told(path: Path) -> None:
    """Of what was read, not of the types that the reference goes through."""
    known = told()
    for value in values(load_run(path)):
        wanted = {f.name for f in dataclasses.fields(value) if f.init and f.name != "kind"}
        assert wanted <= known[type(value).__name__], type(value)


def test_every_class_of_a_choice_is_told() -> None:
    """The classes of `kind`s, found in the source."""
    sources = [p for p in (ROOT / "ldm").rglob("*.py") if not p.is_relative_to(ROOT / "ldm" / "interop")]
    kinds = {k for p in sources for k in re.findall(r'^    kind: Literal\["(\w+)"\]', p.read_text(), re.MULTILINE)}
    shown = set(re.findall(r"kind `(\w+)`", TEXT))
    assert len(kinds) > 50
    # Of models' folders, and made of other keys.
    assert kinds - shown <= {
        "controlnet",
        "flux_control",
        "ip_adapter",
        "missing",
        "openclip",
        "qwen",
        "sd3_control",
        "t5",
        "tokens",
        "none",
    }


def test_links_lead_to_sections() -> None:
    for path, text in PAGES.items():
        for there, anchor in re.findall(r"\]\(([\w.]*)#(\w+)\)", text):
            page = PAGES[f"{keys.FOLDER}/{there}"] if there else text
            assert f"{{ #{anchor} }}" in page, (path, there, anchor)
    anchors = re.findall(r"\{ #(\w+) \}", TEXT)
    assert len(anchors) == len(set(anchors))


def test_types_defaults_and_meanings_are_those_of_the_class() -> None:
    """By hand, of a class that has every kind of key."""

    @dataclasses.dataclass(frozen=True)
    class Below:
        size: int = 3

    @dataclasses.dataclass(frozen=True)
    class Above:
        """What it is. With `path` it reads a file. More, of no key. `often` is a number, e.g. 3; `path` too."""

        path: Path
        often: float | None = None
        sizes: tuple[int, ...] = (1, 2)
        below: Below = dataclasses.field(default_factory=lambda: Below(size=4))
        on: bool = False
        """Whether it is on."""

    general, by_key = keys.sentences(Above)
    assert general == "What it is. More, of no key."
    assert by_key["path"] == ["With `path` it reads a file.", "`often` is a number, e.g. 3; `path` too."]
    assert by_key["on"] == ["Whether it is on."]
    fields = {f.name: f for f in dataclasses.fields(Above)}
    assert [keys.default(f) for f in fields.values()] == [
        "**must be given**", "`null`", "`[1, 2]`", "`{size: 4}`", "`false`",
    ]  # fmt: skip
    part = {Below: keys.Part(Below, ("task.x.below",))}
    assert keys.typed(float | None, part, "parts") == "number, or `null`"
    assert keys.typed(tuple[int, ...], part, "parts") == "list of whole number"
    assert keys.typed(tuple[Below, ...], part, "train") == "list of [keys](parts.md#Below)"
    assert keys.typed(dict[str, Below], part, "parts") == "names, each with [keys](#Below)"


def test_defaults_are_those_that_a_run_gets() -> None:
    """Of the loop: each default in the table is what YAML reads as the value of a config that leaves the key out."""
    run = encode(load_run(ROOT / "configs/finetune/lora.yaml").train)
    given = yaml.safe_load((ROOT / "configs/finetune/lora.yaml").read_text())["train"]
    section = PAGES[f"{keys.FOLDER}/train.md"].split("{ #TrainConfig }")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| `([^|`]*)` \|", section, re.MULTILINE))
    left = {name: value for name, value in rows.items() if name not in given and not value.startswith("{")}
    assert {"threads", "max_skipped", "validate"} <= set(left)
    assert {name: yaml.safe_load(value) for name, value in left.items()} == {name: run[name] for name in left}


def test_no_page_of_keys_is_empty_and_every_table_is_whole() -> None:
    for path, text in PAGES.items():
        rows = [line for line in text.splitlines() if line.startswith("| `")]
        assert rows, path
        assert [r for r in rows if len(re.findall(r"(?<!\\)\|", r)) != 5] == []


def below(parser: Any) -> Iterator[Any]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from below(one)


@pytest.mark.parametrize("verb", [*VERBS, "launch"])
def test_every_option_of_every_command_is_told(verb: str) -> None:
    """With its help's words and its default."""
    text = verbs.pages()[f"{verbs.FOLDER}/{verb}.md"]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for parser in below(verbs.parser_of(verb)):
        for action in parser._actions:
            if (
                isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
                or action.help == argparse.SUPPRESS
            ):
                continue
            names = action.option_strings or list(action.choices or [action.metavar or action.dest])
            shown = [row for row in rows if all(re.search(rf"(?<![\w-]){re.escape(n)}(?![\w-])", row) for n in names)]
            assert shown, (parser.prog, names)
            first = re.sub(r" ?\(.*", "", action.help or "").split("%")[0].split("`")[0][:40]
            plain = [re.sub(r"\\([<>*_\[\]|])", r"\1", row) for row in shown]
            assert any(first in row for row in plain), (parser.prog, names, first)
    assert [r for r in rows if len(re.findall(r"(?<!\\)\|", r)) != 4] == []


def test_every_verb_has_a_place() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    made = [*verbs.pages(), *PAGES]
    assert [path for path in made if path not in text] == []


def test_every_key_has_a_sentence() -> None:
    """Its own, or the first of the class below it; a new key of any class fails here."""
    missing: dict[str, list[str]] = {}
    for part in keys.parts():
        by_key, hints = keys.sentences(part.cls)[1], typing.get_type_hints(part.cls)
        for f in dataclasses.fields(part.cls):
            if f.init and f.name != "kind" and not (by_key.get(f.name) or keys._of_below(hints[f.name])):
                missing.setdefault(part.cls.__name__, []).append(f.name)
    assert missing == {}
