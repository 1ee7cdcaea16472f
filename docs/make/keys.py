"""The reference of config keys: Markdown made from the dataclasses that read a config."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from ldm.config.load import encode
from ldm.config.schema import RunConfig

FOLDER = "reference/config"
PAGES = {
    "index": (
        "Config keys",
        "A run's config is YAML. These are the keys of its root; the links lead to what is below.",
    ),
    "tasks": ("`task`: methods", "`task.kind` says how is trained. Each kind has its own keys."),
    "parts": ("Below `task`", "Options of losses, adapters, sample pictures: what several kinds of `task` hold."),
    "process": (
        "Noise and times",
        "`task.process`, `task.weighting` and `task.density`: schedules, predictions, loss weights, times.",
    ),
    "networks": (
        "Networks",
        "`task.network`, `task.model`, `task.discriminator`: sizes of networks trained from nothing.",
    ),
    "train": ("`train`: the loop", "Steps, optimizer, engine, averages, checkpoints, log, guards."),
    "data": ("`data`: what is seen", "Shards, mixtures, pairs, captions, the network."),
}
"""Title and first sentence of each page, by the name of its file."""
_WRITING = """
Every key has a place, a type and a default; a key without a default must be written. `ldm train CONFIG --print-config`
prints a config with everything filled in, and `key=value` behind it sets one: `train.optim.lr=1e-4`,
`task.samples=null`, `data.size=512`. A choice among several is made by its key `kind`. `base: other.yaml` puts another
file underneath, `${out}` is another key's value. A key that there is not is an error, which names the nearest.
"""


@dataclass(frozen=True)
class Part:
    """One dataclass of the config, and the dotted places where it stands; `data.sources[].data`: in a list."""

    cls: Any
    places: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The value of its `kind`, "" for what is no choice."""
        return next((str(f.default) for f in dataclasses.fields(self.cls) if f.name == "kind"), "")

    @property
    def page(self) -> str:
        """The name of the page that tells of it."""
        module, first = self.cls.__module__, self.places[0]
        if first == "":
            return "index"
        if first.startswith(("train", "data")):
            return first.split(".")[0]
        if re.fullmatch("task", first):
            return "tasks"
        for prefix, page in (("ldm.models", "networks"), ("ldm.diffusion", "process")):
            if module.startswith(prefix):
                return page
        return "parts"

    @property
    def anchor(self) -> str:
        """The place in its page."""
        return self.cls.__name__


def parts(root: Any = RunConfig) -> list[Part]:
    """Every dataclass that a config can hold, in the order in which its keys lead to them."""
    found: dict[Any, list[str]] = {}

    def walk(hint: Any, place: str) -> None:
        if not dataclasses.is_dataclass(hint):
            for below in get_args(hint):
                walk(
                    below, place + ("[]" if get_origin(hint) is tuple else ".NAME" if get_origin(hint) is dict else "")
                )
            return
        known = found.setdefault(hint, [])
        if place in known or place.startswith("data.sources[].data."):
            return
        known.append(place)
        hints = typing.get_type_hints(hint)
        for f in dataclasses.fields(hint):
            if f.init:
                walk(hints[f.name], f"{place}.{f.name}".lstrip("."))

    walk(root, "")
    return [Part(cls, tuple(places)) for cls, places in found.items()]


def pages() -> dict[str, str]:
    """Markdown of every page, by its path."""
    every = parts()
    by_class = {part.cls: part for part in every}
    made = {}
    for name, (title, first) in PAGES.items():
        lines = [f"# {title}", "", first, ""]
        if name == "index":
            lines += [_WRITING.strip(), ""]
        for part in every:
            if part.page == name:
                lines += _section(part, by_class)
        made[f"{FOLDER}/{name}.md"] = "\n".join(lines) + "\n"
    return made


def _section(part: Part, known: dict[Any, Part]) -> list[str]:
    """Heading, what the class says of itself, and the table of its keys."""
    general, by_key = sentences(part.cls)
    head = " and ".join(f"`{place}`" for place in part.places[:1]) if part.places[0] else "The root"
    head += f", kind `{part.kind}`" if part.kind else ""
    lines = [f"## {head} {{ #{part.anchor} }}", "", general, ""]
    if len(part.places) > 1:
        lines += ["Also " + ", ".join(f"`{place}`" for place in part.places[1:]) + ".", ""]
    hints = typing.get_type_hints(part.cls)
    rows = []
    for f in dataclasses.fields(part.cls):
        if f.init and f.name != "kind":
            shown = typed(hints[f.name], known, part.page)
            said = " ".join(by_key.get(f.name, [])) or _of_below(hints[f.name])
            rows.append(f"| `{f.name}` | {shown} | {default(f)} | {_cell(said)} |")
    if rows:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    lines += [f'<p class="source">{part.cls.__module__}.{part.cls.__name__}</p>', ""]
    return lines


def _of_below(hint: Any) -> str:
    """The first sentence of a key's only class, where the key's own class says nothing of it."""
    classes = [h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h)]
    if len(classes) != 1:
        return ""
    text = " ".join(inspect.cleandoc(vars(classes[0]).get("__doc__") or "").split())
    return "" if text.startswith(f"{classes[0].__name__}(") else re.split(r"(?<=[.!?])\s+(?=[A-Z`])", text)[0]


def sentences(cls: Any) -> tuple[str, dict[str, list[str]]]:
    """A class's docstring: what is said of it as a whole, and of each key, which a sentence has in backticks."""
    general, by_key = _own(cls)
    for parent in cls.__mro__[1:]:
        if dataclasses.is_dataclass(parent):
            for name, said in _own(parent)[1].items():
                by_key.setdefault(name, said)
    return " ".join(general), by_key


def _own(cls: Any) -> tuple[list[str], dict[str, list[str]]]:
    """The same of the class without those that it inherits from."""
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    if text.startswith(f"{cls.__name__}("):  # what dataclasses write where nothing is said
        text = ""
    names = {f.name for f in dataclasses.fields(cls)}
    general: list[str] = []
    by_key: dict[str, list[str]] = {}
    for one in re.split(r"(?<=[.!?])\s+(?=[A-Z`\[])", " ".join(text.split())):
        told = [name for name in dict.fromkeys(re.findall(r"`(\w+)`", one)) if name in names and name != "kind"]
        for name in told:
            by_key.setdefault(name, []).append(one)
        if not told:
            general.append(one)
    for name, said in _attribute_docs(cls).items():
        by_key.setdefault(name, []).insert(0, said)
    return general, by_key


def _attribute_docs(cls: Any) -> dict[str, str]:
    """Strings below fields, as Sphinx and mkdocstrings read them."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return found


def typed(hint: Any, known: dict[Any, Part], page: str) -> str:
    """A type as a user would say it; classes are links to their sections."""
    return ", or ".join(dict.fromkeys(_members(hint, known, page)))


def _members(hint: Any, known: dict[Any, Part], page: str) -> Iterator[str]:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        part = known[hint]
        there = "" if part.page == page else f"{part.page}.md"
        yield f"[{part.kind or 'keys'}]({there}#{part.anchor})"
    elif origin is Literal:
        yield " ".join(f"`{_plain(a)}`" for a in args)
    elif origin in (Union, types.UnionType):
        for one in args:
            yield from _members(one, known, page)
    elif origin is tuple:
        below = args[:1] if args[1:] == (Ellipsis,) else args
        inside = " and ".join(dict.fromkeys(typed(a, known, page) for a in below))
        yield f"list of {inside}" if args[1:] == (Ellipsis,) else f"{len(args)} of {inside}"
    elif origin is dict:
        yield f"names, each with {typed(args[1], known, page)}"
    elif hint is type(None):
        yield "`null`"
    else:
        names = {
            int: "whole number",
            float: "number",
            str: "text",
            bool: "`true` `false`",
            Path: "path",
            Any: "anything",
        }
        yield names.get(hint, getattr(hint, "__name__", str(hint)))


def default(f: Any) -> str:
    """A field's default as YAML has it; "must be given" without one."""
    if f.default is not dataclasses.MISSING:
        return f"`{_plain(f.default)}`" if not dataclasses.is_dataclass(f.default) else _of_class(f.default)
    if f.default_factory is not dataclasses.MISSING:
        made = f.default_factory()
        return _of_class(made) if dataclasses.is_dataclass(made) else f"`{_plain(made)}`"
    return "**must be given**"


def _of_class(value: Any) -> str:
    """A default that has keys: its kind, and what is not that class's own default."""
    plain = encode(value)
    own, missing = {f.name: f.default for f in dataclasses.fields(value)}, dataclasses.MISSING
    shown = {
        k: v for k, v in plain.items() if k == "kind" or (own.get(k, missing) is not missing and encode(own[k]) != v)
    }
    return f"`{_plain(shown)}`" if shown else "its defaults"


def _plain(value: Any) -> str:
    """A value in YAML's short form."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return str(value) if str(value) else '""'


def _cell(text: str) -> str:
    """Text in a cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)
