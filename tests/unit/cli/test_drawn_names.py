"""File names of prompts: letters of any script stay, what file systems refuse goes, and bytes are counted."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from ldm.cli.drawn import Album, slug


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("A red (apple:1.4), 3 of them", "a-red-apple-1-4-3-of-them"),
        ("Красное яблоко", "красное-яблоко"),
        ("赤いりんご、木の上", "赤いりんご-木の上"),
        ("تفاحة حمراء", "تفاحة-حمراء"),
        ("हिन्दी सेब", "हिन्दी-सेब"),  # vowel signs are no letters, and belong to them
        ("Äpfel ÉTÉ", "äpfel-été"),
        ("../../etc/passwd\0\n", "etc-passwd"),
        ("a\udce9b", "a-b"),  # a byte of the command line that is no text
        ("🍎🍏", ""),
    ],
)
def test_words_as_a_name(words: str, name: str) -> None:
    assert slug(words) == name


def test_one_spelling_of_accents() -> None:
    assert slug(unicodedata.normalize("NFD", "été")) == "été"


@pytest.mark.parametrize("letter", ["a", "я", "木", "𠀀"])
def test_names_are_cut_by_characters_and_bytes_and_can_be_written(letter: str, tmp_path: Path) -> None:
    name = slug(letter * 500)
    assert set(name) == {letter}
    assert len(name) <= 60
    assert len(name.encode()) <= 120
    assert len(name) == 60 or len(name.encode()) > 116
    path = Album(tmp_path).add(Image.new("RGB", (2, 2)), 7, letter * 500, {})
    assert path.is_file()
    assert path.name == f"0007-{name}.png"
    long = Album(tmp_path).name(Image.new("RGB", (2, 2)), letter * 500, {})
    assert len(long.name.encode()) <= 204
