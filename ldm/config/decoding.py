"""Plain data -> frozen dataclasses, strictly; what is wrong is named with its key and what is allowed."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from ldm.config.written import Place
from ldm.words import bare, expanded, near

Forms = Callable[[dict[str, Any], str], dict[str, Any]]
FORMS: dict[type, Forms] = {}
"""How files that others write spell the keys of a class: `ldm.config.load.accepts` enters them."""

_SCALARS = {int: "int", float: "float", str: "str", bool: "bool"}
_WHOLE = re.compile(r"[-+]?[0-9_]+(\.[0-9_]*)?[eE]\+?[0-9]+")

MOST_NAMED = 12
"""Keys of a class that are named where no key is near to one that is unknown."""
OTHERS = {
    "adam_beta1": "train.optim.betas", "adam_beta2": "train.optim.betas", "adam_epsilon": "train.optim.eps",
    "adam_weight_decay": "train.optim.weight_decay", "batch_size": "train.batch", "bs": "train.batch",
    "checkpointing_steps": "train.checkpoint.every", "checkpoints_total_limit": "train.checkpoint.keep",
    "dataloader_num_workers": "workers", "dataset": "data.path", "ema_decay": "train.ema.decay",
    "epochs": "train.steps", "grad_clip": "train.engine.clip", "gradient_accumulation_steps": "train.accumulate",
    "gradient_clip": "train.engine.clip", "image_size": "data.size", "learning_rate": "train.optim.lr",
    "logging_steps": "train.log.every", "lr_scheduler": "train.optim.schedule",
    "lr_warmup_steps": "train.optim.warmup", "max_grad_norm": "train.engine.clip", "max_steps": "train.steps",
    "max_train_steps": "train.steps", "micro_batch": "train.batch", "mixed_precision": "train.engine.precision",
    "num_epochs": "train.steps", "num_train_epochs": "train.steps", "num_workers": "workers",
    "offset_noise": "noise_offset", "optimizer": "train.optim", "output_dir": "out",
    "prediction_type": "task.process.prediction", "pretrained_model_name_or_path": "task.start",
    "resolution": "data.size", "save_steps": "train.checkpoint.every", "snr_gamma": "task.process.weighting",
    "train_batch_size": "train.batch", "train_data_dir": "data.path", "use_ema": "train.ema",
    "warmup_steps": "train.optim.warmup", "zero": "train.engine.zero_stage",
}  # fmt: skip
"""Other programs' names of our keys."""


class WrongValue(ValueError):
    """A value that is refused; `key` is where it stands."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key

    def place(self, places: Mapping[str, Place], root: str) -> str:
        """` (FILE, line 3, column 5)`, or "" for what no file says."""
        key = self.key.removeprefix(root).lstrip(".")
        named = re.match(rf"{re.escape(self.key)}: (\w+)", str(self))  # a class's own check begins with its field
        for k in ([f"{key}.{named[1]}" if key else named[1]] if named else []) + [key]:
            if (found := places.get(k)) is not None:
                if found.file:
                    return f" ({found})"
                return f" ({found.remark})" if found.remark else ""
        return ""


class Decoder:
    """Decodes one tree; `places` tells how its values were written."""

    def __init__(self, root: Any, tree: Any, name: str, places: Mapping[str, Place]) -> None:
        self.root, self.tree, self.name, self.places = root, tree, name, places

    def decode(self, hint: Any, data: Any, where: str) -> Any:
        """`data` as what the type hint says."""
        origin = get_origin(hint)
        if hint is Any:
            return data
        if origin is Literal:
            return self._literal(get_args(hint), data, where)
        if origin in (Union, types.UnionType):
            return self._union(hint, data, where)
        if dataclasses.is_dataclass(hint):
            return self._dataclass(typing.cast("type", hint), data, where)
        if origin is tuple:
            return self._tuple(get_args(hint), data, where)
        if origin is dict:
            if not isinstance(data, dict):
                raise WrongValue(where, f"{where}: expected keys and values, got {data!r}")
            return {k: self.decode(get_args(hint)[1], v, f"{where}.{k}") for k, v in data.items()}
        return self._scalar(hint, data, where)

    def _written(self, where: str) -> Place | None:
        return self.places.get(where.removeprefix(self.name).lstrip("."))

    def _text(self, data: Any, where: str) -> Any:
        """The words of an override for a key that wants words: 007, no and v: 2 are what they look like."""
        place = self._written(where)
        if place is None or place.file or place.text is None or data is None or isinstance(data, str):
            return data
        return place.text

    def _literal(self, allowed: tuple[Any, ...], data: Any, where: str) -> Any:
        place = self._written(where)
        words = place.text if place is not None and isinstance(data, (bool, int, float)) else None
        for value in allowed:
            if (data == value and type(data) is type(value)) or (words is not None and words == value):
                return value
        hint = near(data, [a for a in allowed if isinstance(a, str)]) if isinstance(data, str) else ""
        raise WrongValue(where, f"{where}: {data!r} is not one of {list(allowed)}{hint}")

    def _scalar(self, hint: Any, data: Any, where: str) -> Any:
        if hint in (str, Path):
            data = self._text(data, where)
        if hint is Path and data is None and (place := self._written(where)) is not None and place.text == "~":
            data = "~"  # YAML's other null
        try:
            if hint is Path and isinstance(data, (str, Path)):
                if not str(data):
                    raise WrongValue(where, f"{where}: expected path, got '' (an empty word)")
                return Path(expanded(str(data)))
            if hint is str and isinstance(data, str):
                return expanded(data) if data.startswith("~/") else data
        except ValueError as error:
            if isinstance(error, WrongValue):
                raise
            raise WrongValue(where, f"{where}: {error}") from error
        if hint is float and isinstance(data, int) and not isinstance(data, bool):
            return float(data)
        if hint is float and isinstance(data, float) and not math.isfinite(data):
            raise WrongValue(where, f"{where}: expected a finite number, got {data}")
        if hint is int and isinstance(data, float) and data.is_integer():
            place = self._written(where)
            if place is not None and place.text is not None and _WHOLE.fullmatch(place.text.strip()):
                return int(data)
        if hint in _SCALARS and type(data) is hint:
            return data
        name = _SCALARS.get(hint, "path" if hint is Path else str(hint))
        hand = "; quote it in YAML?" if hint in (str, Path) and data is not None else ""
        raise WrongValue(where, f"{where}: expected {name}, got {data!r} ({type(data).__name__}){hand}")

    def _tuple(self, args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(data, (list, tuple)):
            raise WrongValue(where, f"{where}: expected a list, got {data!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(self.decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(data))
        if len(args) != len(data):
            raise WrongValue(where, f"{where}: expected {len(args)} values, got {len(data)}: {list(data)!r}")
        return tuple(self.decode(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, data, strict=True)))

    def _union(self, hint: Any, data: Any, where: str) -> Any:
        members = get_args(hint)
        if data is None and type(None) in members:
            return None
        members = [m for m in members if m is not type(None)]
        tagged = _tagged(members)
        if tagged and isinstance(data, dict):
            if len(members) == 1:
                return self.decode(members[0], data, where)
            if "kind" not in data:
                raise WrongValue(where, f"{where}.kind: missing; one of {sorted(tagged)}")
            if data["kind"] not in tagged:
                hint = near(data["kind"], tagged)
                raise WrongValue(
                    f"{where}.kind", f"{where}.kind: {data['kind']!r} is not one of {sorted(tagged)}{hint}"
                )
            return self.decode(tagged[data["kind"]], data, where)
        errors: list[WrongValue] = []
        for member in members:
            try:
                return self.decode(member, data, where)
            except WrongValue as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        raise WrongValue(where, "; or ".join(map(str, errors)))

    def _dataclass(self, cls: Any, data: Any, where: str) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, dict):
            raise WrongValue(where, f"{where}: expected the keys of {cls.__name__}, got {data!r}")
        data = FORMS[cls](data, where) if cls in FORMS else data
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
        unknown = sorted(set(map(str, data)) - set(fields))
        if unknown:
            raise WrongValue(f"{where}.{unknown[0]}", self._unknown(unknown, cls, fields, where))
        hints = typing.get_type_hints(cls)
        values = {k: self.decode(hints[k], v, f"{where}.{k}") for k, v in data.items()}
        required = {
            n
            for n, f in fields.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - set(values)):
            raise WrongValue(where, f"{where}: missing key(s) {missing} of {cls.__name__}")
        try:
            return cls(**values)
        except ValueError as error:
            raise WrongValue(where, f"{where}: {error}") from error

    def _unknown(self, unknown: list[str], cls: Any, fields: typing.Iterable[str], where: str) -> str:
        """What to say of unknown keys: what each is near to; of those near to nothing, what there is."""
        hints = [near(name, fields) or self._elsewhere(name, where) for name in unknown]
        found = [hint.removeprefix("; did you mean ").removesuffix("?") for hint in hints if hint]
        said = f"{where}: unknown key(s) {unknown}"
        if len(found) < len(unknown):
            names = sorted(fields)
            more = f", ... ({len(names)} in all)" if len(names) > MOST_NAMED else ""
            said += f"; {cls.__name__} has {', '.join(names[:MOST_NAMED])}{more}"
        return said + (f"; did you mean {', '.join(found)}?" if found else "")

    def _elsewhere(self, name: str, where: str) -> str:
        """A hint at the key of that name, or of that meaning, in another place of the tree."""
        known = list(_keys(self.root, self.tree, ""))
        meant = OTHERS.get(bare(name), "")
        same = [k for k in known if k == meant or k.rsplit(".", 1)[-1] in (name, bare(name), meant)]
        own = where.removeprefix(self.name).lstrip(".")
        same.sort(key=lambda k: (k != meant, not k.startswith(own), k.count("."), k))
        if same:
            return f"; did you mean {same[0]!r}?"
        return near(name, {k.rsplit(".", 1)[-1]: k for k in known}.values()) if "." in name else ""


def _tagged(members: typing.Sequence[Any]) -> dict[str, Any]:
    return {tag: m for m in members if dataclasses.is_dataclass(m) and (tag := _tag(m)) is not None}


def _tag(cls: Any) -> str | None:
    """The value of the class's `kind` field."""
    for f in dataclasses.fields(cls):
        if f.name == "kind":
            return typing.cast("str", f.default)
    return None


def _keys(hint: Any, data: Any, prefix: str) -> Iterator[str]:
    """Every dotted key that the tree may have, of a choice those of the kind that `data` takes."""
    if get_origin(hint) in (Union, types.UnionType):
        classes = [m for m in get_args(hint) if dataclasses.is_dataclass(m)]
        kind = data.get("kind") if isinstance(data, dict) else None
        chosen = _tagged(classes).get(kind) if isinstance(kind, str) else None
        hint = chosen or (classes[0] if classes else None)
    if hint is None or not dataclasses.is_dataclass(hint):
        return
    hints = typing.get_type_hints(hint)
    for f in dataclasses.fields(hint):
        if f.init:
            yield f"{prefix}{f.name}"
            yield from _keys(hints[f.name], data.get(f.name) if isinstance(data, dict) else None, f"{prefix}{f.name}.")
