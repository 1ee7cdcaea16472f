"""The usual syntax of weighted prompts, A1111's: "((a))", "[a]", "(a:1.3)", escapes, BREAK; the rest of it by name.

Whatever is read otherwise than its writer may have meant, or not at all, is told in a note that names the part.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

STEP = 1.1
"""What a pair of round brackets multiplies by; square ones divide."""
FAR = 10.0
"""Weights beyond this are said."""
DEEPEST = 100
"""Brackets within brackets beyond this are characters."""

Piece = tuple[str, float]

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_WEIGHT = re.compile(rf":\s*({_NUMBER})\s*$", re.IGNORECASE)
_COMMA = re.compile(r":\s*([+-]?\d+),(\d+)\s*$")
_NEARLY = re.compile(r":\s*([+-]?[.,]?\d[^\s:()\[\]]*)\s*$")
_ESCAPED_WEIGHT = re.compile(r"\\\(([^()\[\]\\]*?)(:\s*[+-]?\d*\.\d+\s*)\\\)")
_NETWORK = re.compile(r"<(lora|lyco|hypernet|hypernetwork):([^<>]*)>", re.IGNORECASE)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_MARK = "\0"
_OTHERS = (
    (re.compile(r"\bAND\b"), "composing prompts is not supported: it is read as a word"),
    (re.compile(r"\)(?:\++|-+)(?=[\s,.)]|$)"), "compel's signs are not supported: they are read as words"),
    (re.compile(r"\.(?:and|blend|swap)\("), "compel's functions are not supported: they are read as words"),
    (re.compile(r"\{[^{}]*\}"), "braces mean nothing here: they are read as words"),
    (
        re.compile(r"\bembedding:\S+", re.IGNORECASE),
        "the prefix is read as a word: a token's name alone calls it",
    ),
    (re.compile(r"\b__[\w/*-]+__"), "wildcards are not supported: they are read as words"),
)
_WRITTEN = re.compile(
    rf"\((?:[^()\\]|\\.)*:\s*{_NUMBER}\s*\)|<(?:lora|lyco|hypernet|hypernetwork):[^<>]*>|\(\(.*?\)\)|\bBREAK\b|\bAND\b"
    r"|\[[^\[\]]*:[\d.]+\]|\[[^\[\]]*\|[^\[\]]*\]|\[\[.*?\]\]",
    re.IGNORECASE,
)


@dataclass
class Parsed:
    """Sections between BREAKs, each a list of text and weight, and what to tell of how the prompt was read."""

    sections: list[list[Piece]]
    notes: list[str] = field(default_factory=list)


def parse(prompt: str) -> Parsed:
    """Read a prompt's weights; never fails: what is not understood is words, with a note."""
    reader = _Reader(prompt)
    parts, end = reader.sequence(0, "")
    assert end == len(reader.text)
    sections: list[list[Piece]] = [[]]
    for text, weight in parts:
        if text == _MARK:
            sections.append([])
        elif sections[-1] and sections[-1][-1][1] == weight:
            sections[-1][-1] = (sections[-1][-1][0] + text, weight)
        else:
            sections[-1].append((text, weight))
    kept = [[(text, weight) for text, weight in section if text.strip()] for section in sections]
    for text, weight in (piece for section in kept for piece in section):
        if abs(weight) > FAR:
            reader.note(text.strip(), f"its weight is {weight:g}, far beyond the usual 0 to 2")
    return Parsed(kept, list(dict.fromkeys(reader.notes)))


def unread(prompt: str) -> str | None:
    """The first part of a prompt that looks like this syntax; for prompts whose brackets are words. None: none does."""
    for match in _WRITTEN.finditer(prompt):
        upper = match[0].upper()
        if upper not in ("BREAK", "AND") or match[0] == upper:
            return match[0]
    return None


class _Reader:
    """One pass over a prompt, its brackets nested by recursion."""

    def __init__(self, prompt: str) -> None:
        self.notes: list[str] = []
        self.depth = 0
        self.text = _ESCAPED_WEIGHT.sub(self._unweighted, prompt.replace(_MARK, " "))
        for pattern, says in _OTHERS:
            if match := pattern.search(self.text):
                self.note(match[0], says)

    def note(self, part: str, says: str) -> None:
        self.notes.append(f"prompt part {part!r}: {says}")

    def _unweighted(self, match: re.Match[str]) -> str:
        self.note(match[0], f"escaped brackets are words and take no weight; {match[2].strip()!r} is left out")
        return rf"\({match[1]}\)"

    def sequence(self, at: int, closing: str) -> tuple[list[Piece], int]:
        """Parts from `at` to before the bracket that closes this sequence, or to the end."""
        parts: list[Piece] = []
        self.depth += 1
        while at < len(self.text) and self.text[at] != closing:
            char = self.text[at]
            if char in "([" and self.depth > DEEPEST:
                self.note(self.text[at : at + 12], "too many brackets within each other: it is read as a character")
                found, at = [(char, 1.0)], at + 1
            elif char == "(":
                found, at = self._round(at)
            elif char == "[":
                found, at = self._square(at)
            elif char == "<" and (network := _NETWORK.match(self.text, at)):
                file = network[2].split(":")[0]
                self.note(network[0], f"names in prompts load nothing and are left out; give the file: --lora {file}")
                found, at = [], network.end()
            else:
                found, at = self._literal(at, closing)
            parts += found
        self.depth -= 1
        return parts, at

    def _literal(self, at: int, closing: str) -> tuple[list[Piece], int]:
        """Text to the next bracket, with escapes taken back and BREAK as marks."""
        out = ""
        while at < len(self.text):
            char = self.text[at]
            if char == "\\" and self.text[at + 1 : at + 2] in ("(", ")", "[", "]", "\\"):
                out += self.text[at + 1 : at + 2]
                at += 2
                continue
            if char in ("(", "[") or char == closing or (char == "<" and _NETWORK.match(self.text, at)):
                break
            if char in (")", "]") and {")": "(", "]": "["}[char] in self.text:  # not of a smiley
                around = self.text[max(0, at - 12) : at + 1]
                self.note(around, f"{char!r} closes nothing: it is read as a character")
            out += char
            at += 1
        pieces = _BREAK.split(out)
        found: list[Piece] = [(pieces[0], 1.0)] if pieces[0] else []
        for piece in pieces[1:]:
            found += [(_MARK, 1.0), (piece, 1.0)] if piece else [(_MARK, 1.0)]
        return found, at

    def _round(self, at: int) -> tuple[list[Piece], int]:
        parts, end = self.sequence(at + 1, ")")
        raw, closed = self.text[at + 1 : end], end < len(self.text)
        shown = self.text[at : end + 1]
        weight = self._weight(parts, raw, shown)
        if not closed:
            read = "1.1 from there on" if weight is None else f"{weight:g}"
            self.note(shown, f"its bracket is not closed; the weight is {read}")
        return _times(parts, STEP if weight is None else weight), min(end + 1, len(self.text))

    def _weight(self, parts: list[Piece], raw: str, shown: str) -> float | None:
        """The number behind the last colon, which is taken out of the parts."""
        found: float | None = None
        while parts:
            match, comma = _WEIGHT.search(raw), _COMMA.search(raw)
            if match is None and comma is None:
                break
            chosen = match or comma
            assert chosen is not None
            value = float(match[1]) if match is not None else float(f"{chosen[1]}.{chosen[2]}")
            if match is None:
                self.note(shown, f"{chosen[0].strip(' :')} is read as {value:g}")
            length = len(chosen[0])
            if len(parts[-1][0]) < length or parts[-1][0] == _MARK:
                break
            if found is not None:
                self.note(shown, f"of several weights the last one counts; {value:g} is left out")
            found = value if found is None else found
            raw = raw[:-length]
            parts[-1] = (parts[-1][0][:-length], parts[-1][1])
            if not parts[-1][0]:
                parts.pop()
        if found is None and (nearly := _NEARLY.search(raw)):
            self.note(shown, f"{nearly[1]!r} is no weight and is read as words; the brackets count 1.1")
        return found

    def _square(self, at: int) -> tuple[list[Piece], int]:
        cuts, end = self._cuts(at)
        if end < len(self.text) and (chosen := self._scheduled(at, cuts, end)) is not None:
            return chosen, end + 1
        parts, end = self.sequence(at + 1, "]")
        if end == len(self.text):
            self.note(self.text[at:], "its bracket is not closed; the weight is 1 / 1.1 from there on")
        return _times(parts, 1 / STEP), min(end + 1, len(self.text))

    def _scheduled(self, at: int, cuts: list[tuple[int, str]], end: int) -> list[Piece] | None:
        """The first of the words between which a schedule "[a:b:0.5]" or "[a|b]" changes; None if it is none."""
        places = [at, *(where for where, _ in cuts), end]
        words = [self.text[a + 1 : b] for a, b in itertools.pairwise(places)]
        signs = {sign for _, sign in cuts}
        if signs == {":"} and len(words) in (2, 3) and re.fullmatch(rf"\s*{_NUMBER}\s*", words[-1]):
            words = words[:-1]
        elif signs != {"|"}:
            return None
        index = next((i for i, word in enumerate(words) if word.strip()), None)
        drawn = "" if index is None else words[index].strip()
        self.note(self.text[at : end + 1], f"changing words between steps is not supported; read as {drawn!r}")
        if index is None:
            return []
        inner = _Reader("")
        inner.notes, inner.depth, inner.text = self.notes, self.depth, words[index]
        return inner.sequence(0, "")[0]

    def _cuts(self, at: int) -> tuple[list[tuple[int, str]], int]:
        """Where ":" and "|" stand in a square bracket outside of further brackets, and where it closes."""
        depth, found, i = 0, [], at + 1
        while i < len(self.text):
            char = self.text[i]
            if char == "\\":
                i += 1
            elif char in "([":
                depth += 1
            elif char == "]" and depth == 0:
                break
            elif char in ")]":
                depth = max(0, depth - 1)
            elif char in ":|" and depth == 0:
                found.append((i, char))
            i += 1
        return found, min(i, len(self.text))


def _times(parts: list[Piece], factor: float) -> list[Piece]:
    return [(text, weight * factor) for text, weight in parts]
