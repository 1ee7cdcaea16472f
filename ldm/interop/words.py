"""The settings in a shell script: the words behind `accelerate launch SCRIPT.py`, with its variables put in."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SET = re.compile(r"^\s*(?:export\s+|set\s+|\$env:)?([A-Za-z_]\w*)\s*=\s*(\"[^\"]*\"|'[^']*'|\S*)\s*;?\s*$")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")
_NUMBER = re.compile(r"-\.?\d")
_VALUED = {"--mixed_precision", "--num_processes", "--num_machines", "--dynamo_backend", "--gpu_ids"}


@dataclass(frozen=True)
class Call:
    """A script's name ("" for a plain list of options), its options, and those of `accelerate launch`."""

    script: str
    options: dict[str, Any]
    launcher: dict[str, Any]


def read_call(text: str, name: str) -> Call:
    """The first call of a training script in a shell script, or a list of options without one.

    Variables that the script sets are put in. Lines go on behind `\\`, `^` or a backtick, and where the next one begins
    with an option. Raises ValueError naming the file for a variable that it does not set, and where there is no call.
    """
    known: dict[str, str] = {}
    for line in _joined(text):
        if (found := _SET.match(line)) and not line.lstrip().startswith("-"):
            known[found[1]] = _filled(found[2].strip("\"'"), known)
            continue
        try:
            words = [_filled(word, known) for word in shlex.split(line, comments=True)]
        except ValueError as error:
            raise ValueError(f"{name}: {error} in {line.strip()[:60]!r}") from error
        place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if place is None and not (words and words[0].startswith("--")):
            continue
        if place is None:
            place, script, before = -1, "", []
        else:
            script, before = Path(words[place].replace("\\", "/")).name, words[:place]
        if gone := [v for word in words[place + 1 :] for v in _VARIABLE.findall(word)]:
            raise ValueError(f"{name}: ${gone[0]} is not set in the file; write its value, or `export {gone[0]}=...`")
        return Call(script, options(words[place + 1 :], name), _launcher(before))
    raise ValueError(f"{name}: no call of a training script (accelerate launch ... .py --key=value) and no options")


def options(words: list[str], name: str) -> dict[str, Any]:
    """`--key=value`, `--key value ...` and `--flag` as keys and values; a flag is True, several values are a list.

    Raises ValueError for a word that belongs to no option.
    """
    found: dict[str, Any] = {}
    key: str | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            found[key] = value if equals else True
        elif key is None or (word.startswith("-") and not _NUMBER.match(word)):
            raise ValueError(f"{name}: {word!r} belongs to no option")
        else:
            before = found[key]
            found[key] = word if before is True else [*before, word] if isinstance(before, list) else [before, word]
    return found


def _launcher(words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, word in enumerate(words):
        key, equals, value = word.partition("=")
        if key in _VALUED:
            found[key[2:]] = value if equals else words[i + 1] if i + 1 < len(words) else ""
    return found


def _joined(text: str) -> list[str]:
    """Whole commands: lines that go on are joined, comments are gone."""
    found: list[str] = []
    on = False
    for raw in text.lstrip("\ufeff").splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            on = on and line.startswith("#")
            continue
        goes_on = line[-1] in "\\^`"
        line = line[:-1].rstrip() if goes_on else line
        if found and (on or (line.startswith("--") and not found[-1].startswith("#"))):
            found[-1] += " " + line
        else:
            found.append(line)
        on = goes_on
    return found


def _filled(text: str, known: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda found: known.get(found[1], found[0]), text)
