"""Words that users write: the nearest known name, and ~ for the home folder."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping


def near(word: object, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """`; did you mean 'X'?` for the known name that is nearest, or that is meant by another program's name; or "".

    Upper and lower case, blanks, `-` and `_` make no difference. `aliases`: {their name, as `bare` has it: ours}.
    """
    names = {bare(name): name for name in known}
    text = bare(str(word))
    if word in names.values():
        return ""  # known, and refused for another reason
    if aliases and aliases.get(text) in names.values():
        return f"; did you mean {aliases[text]!r}?"
    longer = [name for name in names if len(text) > 2 and name.startswith(text)]
    found = [text] if text in names else longer or difflib.get_close_matches(text, names, n=1)
    return f"; did you mean {names[found[0]]!r}?" if found else ""


def bare(name: str) -> str:
    """A name without what people spell differently."""
    return name.casefold().replace("-", "_").replace(" ", "_").replace("+", "p")


def expanded(text: str) -> str:
    """The path with ~ and ~user replaced; a name that only begins with ~, and is no user's, stays.

    Raises ValueError where there is no home folder: nobody wants a folder called ~.
    """
    if not text.startswith("~"):
        return text
    found = os.path.expanduser(text)
    if found == text and text.split("/", 1)[0] == "~":
        raise ValueError(f"{text!r}: ~ is the home folder, but HOME is not set and this user has none")
    return found
