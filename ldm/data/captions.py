"""The captions of a sample and the choice among them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.data.bad import BadSample
from ldm.data.texts import captions_in, check, metadata, text
from ldm.rng import key as rng_key

_UNIT = float(1 << 63)


@dataclass(frozen=True)
class Captions:
    """Texts with weights; the first is the plain one."""

    texts: tuple[str, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.weights) > 0

    def pick(self, u: float) -> int:
        """Index drawn by the weights for u in [0, 1)."""
        target = u * sum(self.weights)
        for i, weight in enumerate(self.weights):
            target -= weight
            if target < 0:
                return i
        return len(self.weights) - 1


_FIELD = re.compile(r"\{([^{}]*)\}")
_OPTIONAL = re.compile(r"\[([^\[\]]*\{[^{}]+\}[^\[\]]*)\]")


def check_template(template: str) -> None:
    """Raise ValueError unless the caption has a place in it."""
    if "{}" not in template:
        raise ValueError(f"template {template!r} must hold {{}} where the caption goes")


def names_fields(template: str) -> bool:
    """Whether it holds more than the caption: fields of a sample's json, {NAME}."""
    return any(_FIELD.findall(template))


def filled(template: str, caption: str, meta: Mapping[str, Any]) -> str:
    """The template with the caption for {} and fields of the sample's json for {NAME}.

    A part in square brackets is left out where one of its fields is empty or missing. Raises ValueError naming a field
    that is so outside of brackets.
    """
    if not names_fields(template):
        return template.replace("{}", caption)

    def value(name: str) -> str | None:
        found = caption if name == "" else meta.get(name)
        if isinstance(found, bool) or not isinstance(found, str | int | float) or found == "":
            return None
        return str(found)

    def optional(part: re.Match[str]) -> str:
        known = all(value(name) is not None for name in _FIELD.findall(part[1]) if name)
        return part[1] if known else ""

    def put(field: re.Match[str]) -> str:
        found = value(field[1])
        if found is None and field[1]:
            has = sorted(k for k in meta if value(k) is not None)
            raise ValueError(
                f"template {template!r}: a sample has no {field[1]!r} (it has {has}); write the part that needs it in "
                "square brackets, which is left out then"
            )
        return found or ""

    return _FIELD.sub(put, _OPTIONAL.sub(optional, template))


def with_trigger(caption: str, trigger: str) -> str:
    """The caption with the word for [trigger], or before it where the caption lacks it."""
    if not trigger:
        return caption
    caption = caption.replace("[trigger]", trigger)
    return caption if trigger in caption else f"{trigger} {caption}".strip()


_WILDCARD = re.compile(r"(?<!\{)\{((?:[^{}])+)\}(?!\})")


def spoken(caption: str, seed: int, position: int) -> str:
    """One line of the caption, and one alternative of each {a|b|c} in it; {{ and }} are braces, as kohya has them."""
    lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
    line = lines[int(uniform(seed, position, "caption line") * len(lines))]
    places = itertools.count()

    def choice(found: re.Match[str]) -> str:
        parts = found[1].split("|")
        return parts[int(uniform(seed, position, f"wildcard {next(places)}") * len(parts))]

    return _WILDCARD.sub(choice, line).replace("{{", "{").replace("}}", "}")


def uniform(seed: int, position: int, purpose: str) -> float:
    """A number in [0, 1) that belongs to one sample position and purpose."""
    return rng_key(seed, position, purpose) / _UNIT


TEXTS = ("txt", "text", "caption")
"""Members of a sample that hold a caption as plain text."""
_FIELDS = ("caption", "text")


def captions_of(members: dict[str, bytes], *, required: bool = True) -> tuple[Captions, dict[str, Any]]:
    """Captions and the json metadata of a sample.

    Looks at json `captions` (texts or [text, weight] pairs), json `caption` or `text` (a text, a number, a list), then
    the members of `TEXTS`; null and what is empty is none. Raises BadSample no_caption, not_utf8 or bad_json; with
    `required` false a missing one is the empty text.
    """
    tree = metadata(members)
    pairs = _pairs(tree.get("captions"))
    for name in _FIELDS:
        pairs = pairs or [(one, 1.0) for one in captions_in(tree.get(name), name)]
    for name in TEXTS:
        if not pairs and name in members and (one := text(members[name])):
            pairs = [(one, 1.0)]
    if not pairs:
        if required:
            raise BadSample("no_caption", f"members {sorted(members)}")
        pairs = [("", 1.0)]
    return Captions(tuple(t for t, _ in pairs), tuple(w for _, w in pairs)), tree


def _pairs(value: Any) -> list[tuple[str, float]]:
    if value is None or isinstance(value, str):
        return [(one, 1.0) for one in captions_in(value, "captions")]
    if not isinstance(value, list):
        raise BadSample("bad_json", f"captions: {value!r:.80}; expected a list of texts or [text, weight]")
    pairs: list[tuple[str, float]] = []
    for entry in value:
        if entry is None:
            continue
        if isinstance(entry, str):
            pairs += [(one, 1.0) for one in captions_in(entry, "captions")]
        elif isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and _is_number(entry[1]):
            if not 0 <= entry[1] < math.inf:
                raise BadSample("bad_json", f"caption weight {entry[1]} is negative or no number")
            pairs.append((check(entry[0]), float(entry[1])))
        else:
            raise BadSample("bad_json", f"captions hold {entry!r:.80}; expected a text or [text, weight]")
    return pairs if sum(w for _, w in pairs) > 0 else []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
