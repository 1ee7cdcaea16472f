"""Configs: OmegaConf reads, merges `base:` files and takes `a.b=c` overrides; `decode` makes frozen dataclasses.

A choice is a tagged union on `kind`. Unknown keys, wrong types and values out of range are a ValueError that names
the key, the value and what is allowed. A config is data: nothing in it can run code.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")
Forms = Callable[[dict[str, Any], str], dict[str, Any]]
_SCALARS = {int: "int", float: "float", str: "str", bool: "bool"}
_FORMS: dict[type, Forms] = {}


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file with its `base:` files under it and `a.b=c` overrides over it; interpolations resolved.

    Raises ValueError for a missing file, YAML that does not parse, or an override that is not `key=value`.
    """
    tree = _read_file(Path(path), depth=0)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ValueError(f"override {override!r}: expected key=value, such as optim.lr=1e-4")
        try:
            OmegaConf.from_dotlist([override])
        except Exception as error:  # yaml's error classes are not OmegaConf's interface
            raise ValueError(f"override {override!r}: not readable as YAML: {str(error).splitlines()[0]}") from error
    try:
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return typing.cast("dict[str, Any]", plain)


def _read_file(path: Path, depth: int) -> DictConfig:
    if not path.is_file():
        raise ValueError(f"config {str(path)!r}: no such file")
    if depth > 2:
        raise ValueError(f"config {str(path)!r}: `base:` may be nested at most two levels deep")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # yaml's error classes are not OmegaConf's interface
        raise ValueError(f"config {str(path)!r}: not readable as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, DictConfig):
        raise ValueError(f"config {str(path)!r}: expected keys and values at the top, got {type(tree).__name__}")
    bases = tree.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else list(bases)
    below = OmegaConf.create({})
    for over in (*[_read_file(path.parent / base, depth + 1) for base in bases], tree):
        kept = _without_other_kinds(OmegaConf.to_container(below), OmegaConf.to_container(over))
        merged = OmegaConf.merge(kept, over)
        assert isinstance(merged, DictConfig)
        below = merged
    return below


def _without_other_kinds(below: Any, over: Any) -> Any:
    """`below` without the choices whose `kind` is another in `over`: their keys are not those of the new kind."""
    if not isinstance(below, dict) or not isinstance(over, dict):
        return below
    if "kind" in below and over.get("kind", below["kind"]) != below["kind"]:
        return {}
    return {key: _without_other_kinds(value, over.get(key)) for key, value in below.items()}


def decode(cls: type[T], data: Any, where: str = "config") -> T:
    """Build a frozen dataclass from plain data, strictly.

    Raises ValueError naming the key and what is allowed for an unknown key, a missing one or a wrong type.
    """
    return typing.cast("T", _decode(cls, data, where))


def accepts(forms: Forms) -> Callable[[type[T]], type[T]]:
    """Let a dataclass whose keys are those of files that others write be read leniently in form.

    `forms(data, where)` gives the data as the class has it; `decode` is as strict with the result as ever.
    """

    def enter(cls: type[T]) -> type[T]:
        _FORMS[cls] = forms
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
    return OmegaConf.to_yaml(OmegaConf.create(encode(value)))


def _decode(hint: Any, data: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return data
    if origin is Literal:
        allowed = get_args(hint)
        if not any(data == a and type(data) is type(a) for a in allowed):
            raise ValueError(f"{where}: {data!r} is not one of {list(allowed)}")
        return data
    if origin in (Union, types.UnionType):
        return _decode_union(hint, data, where)
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(typing.cast("type", hint), data, where)
    if origin is tuple:
        return _decode_tuple(get_args(hint), data, where)
    if origin is dict:
        if not isinstance(data, dict):
            raise ValueError(f"{where}: expected keys and values, got {data!r}")
        return {k: _decode(get_args(hint)[1], v, f"{where}.{k}") for k, v in data.items()}
    return _decode_scalar(hint, data, where)


def _decode_scalar(hint: Any, data: Any, where: str) -> Any:
    if hint is Path and isinstance(data, (str, Path)):
        return Path(data)
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if hint in _SCALARS and type(data) is hint:
        return data
    name = _SCALARS.get(hint, "path" if hint is Path else str(hint))
    hand = "; quote it in YAML?" if hint in (str, Path) and data is not None else ""
    raise ValueError(f"{where}: expected {name}, got {data!r} ({type(data).__name__}){hand}")


def _decode_tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, (list, tuple)):
        raise ValueError(f"{where}: expected a list, got {data!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(data))
    if len(args) != len(data):
        raise ValueError(f"{where}: expected {len(args)} values, got {len(data)}: {list(data)!r}")
    return tuple(_decode(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, data, strict=True)))


def _decode_union(hint: Any, data: Any, where: str) -> Any:
    members = get_args(hint)
    if data is None and type(None) in members:
        return None
    members = [m for m in members if m is not type(None)]
    tagged = {tag: m for m in members if dataclasses.is_dataclass(m) and (tag := _tag(m)) is not None}
    if tagged and isinstance(data, dict):
        if len(members) == 1:
            return _decode(members[0], data, where)
        if "kind" not in data:
            raise ValueError(f"{where}.kind: missing; one of {sorted(tagged)}")
        if data["kind"] not in tagged:
            raise ValueError(f"{where}.kind: {data['kind']!r} is not one of {sorted(tagged)}")
        return _decode(tagged[data["kind"]], data, where)
    errors = []
    for member in members:
        try:
            return _decode(member, data, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[-1] if len(errors) == 1 else "; or ".join(errors))


def _tag(cls: Any) -> str | None:
    """The value of the class's `kind` field."""
    for f in dataclasses.fields(cls):
        if f.name == "kind":
            return typing.cast("str", f.default)
    return None


def _decode_dataclass(cls: Any, data: Any, where: str) -> Any:
    if isinstance(data, cls):
        return data
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected the keys of {cls.__name__}, got {data!r}")
    data = _FORMS[cls](data, where) if cls in _FORMS else data
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(map(str, data)) - set(fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: unknown key(s) {unknown}; {cls.__name__} has {sorted(fields)}{hint}")
    hints = typing.get_type_hints(cls)
    values = {k: _decode(hints[k], v, f"{where}.{k}") for k, v in data.items()}
    required = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise ValueError(f"{where}: missing key(s) {missing} of {cls.__name__}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
