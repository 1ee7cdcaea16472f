"""Configs: OmegaConf reads, merges `base:` files and takes `a.b=c` overrides; `decode` makes frozen dataclasses.

A choice is a tagged union on `kind`. Unknown keys, wrong types and values out of range are a ValueError that names
the key, the value and what is allowed. A config is data: nothing in it can run code.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ldm.config.decoding import FORMS, Decoder, Forms, WrongValue
from ldm.config.earlier import today, today_key
from ldm.config.written import Place, Tree, parse_file, parse_value
from ldm.words import expanded, near

if TYPE_CHECKING:
    from omegaconf import DictConfig

T = TypeVar("T")


def read(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Tree:
    """Read a YAML file with its `base:` files under it and `a.b=c` overrides over it; interpolations resolved.

    Plain data may come instead of a file. Keys by earlier names are read as today's, and told in `earlier`. Raises
    ValueError for a missing file, YAML that does not parse, or an override that is not `key=value`.
    """
    from omegaconf import OmegaConf  # here: networks have configs, and need no YAML
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(source, Mapping):
        data, earlier = today(dict(source))
        path, tree, places = Path("config"), OmegaConf.create(data), {}
    else:
        path = Path(expanded(str(source)))
        tree, places, earlier = _read_file(path, depth=0)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ValueError(f"override {override!r}: expected key=value, such as train.optim.lr=1e-4")
        if (now := today_key(key)) != key:
            earlier, key = [*earlier, key], now
        try:
            value, place = parse_value(text)
            OmegaConf.update(tree, key, value, force_add=True)
        except (ValueError, TypeError, IndexError, OmegaConfBaseException) as error:
            raise ValueError(f"override {override!r}: {_first_line(error)}") from error
        places = {k: p for k, p in places.items() if not k.startswith((f"{key}.", f"{key}["))} | {key: place}
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_first_line(error)}") from error
    assert isinstance(plain, dict)
    return Tree(typing.cast("dict[str, Any]", plain), places, tuple(dict.fromkeys(earlier)))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_file(path: Path, depth: int) -> tuple[DictConfig, dict[str, Place], list[str]]:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        raise ValueError(f"config {str(path)!r}: {_why_not(path)}")
    if depth > 2:
        raise ValueError(f"config {str(path)!r}: `base:` may be nested at most two levels deep")
    data, own = parse_file(path)
    data, earlier = today(data)
    own = {today_key(key): place for key, place in own.items()}
    try:
        tree = OmegaConf.create({} if data is None else data)
    except OmegaConfBaseException as error:
        raise ValueError(f"config {str(path)!r}: {_first_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise ValueError(f"config {str(path)!r}: expected keys and values at the top, got {type(tree).__name__}")
    bases = tree.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else list(bases)
    below, places = OmegaConf.create({}), {}
    files = [_read_file(path.parent / expanded(str(base)), depth + 1) for base in bases]
    for over, more, names in (*files, (tree, own, earlier)):
        kept = _without_other_kinds(OmegaConf.to_container(below), OmegaConf.to_container(over))
        merged = OmegaConf.merge(kept, over)
        assert isinstance(merged, DictConfig)
        below = merged
        places |= more
        earlier = [*names, *(n for n in earlier if n not in names)]
    return below, places, earlier


def _why_not(path: Path) -> str:
    """Why there is no file of that name."""
    if path.is_symlink():
        return "is a link to nothing, or to itself"
    if path.is_dir():
        return "is a folder, not a file"
    folder = path.parent if str(path.parent) else Path()
    try:
        names = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        names = []
    return "no such file" + near(path.name, names)


def _without_other_kinds(below: Any, over: Any) -> Any:
    """`below` without the choices whose `kind` is another in `over`: their keys are not those of the new kind."""
    if not isinstance(below, dict) or not isinstance(over, dict):
        return below
    if "kind" in below and over.get("kind", below["kind"]) != below["kind"]:
        return {}
    return {key: _without_other_kinds(value, over.get(key)) for key, value in below.items()}


def decode(cls: type[T], data: Any, where: str = "config") -> T:
    """Build a frozen dataclass from plain data, strictly. `~` begins a path in the home folder.

    Raises ValueError naming the key and what is allowed for an unknown key, a missing one or a wrong type, and where a
    file has it.
    """
    places = data.places if isinstance(data, Tree) else {}
    try:
        return typing.cast("T", Decoder(cls, data, where, places).decode(cls, data, where))
    except WrongValue as error:
        raise ValueError(f"{error}{error.place(places, where)}") from error


def accepts(forms: Forms) -> Callable[[type[T]], type[T]]:
    """Let a dataclass whose keys are those of files that others write be read leniently in form.

    `forms(data, where)` gives the data as the class has it; `decode` is as strict with the result as ever.
    """

    def enter(cls: type[T]) -> type[T]:
        FORMS[cls] = forms
        return cls

    return enter


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """`decode(cls, read(path, overrides))`."""
    return decode(cls, read(path, overrides))


def encode(value: Any) -> Any:
    """Plain data (dicts, lists, scalars) that `decode` turns back into the same object."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def dump(value: Any) -> str:
    """The config as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(encode(value)))
