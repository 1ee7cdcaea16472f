"""Captions of a folder are changed where they are, and nothing else is; what is wrong with a folder is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ldm.cli.__main__ import main
from ldm.data.captioning import check, edit, listed, with_trigger


def noise(path, size, seed):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("a.png", "b.jpg", "c.png")):
        noise(tmp_path / name, (128, 96), i)
    (tmp_path / "a.txt").write_text("a cat\nthe cat again\n")
    (tmp_path / "b.caption").write_text("cat on a mat")
    return tmp_path


def captions(folder):
    return {shown.name: shown.captions for shown in listed(folder)}


def test_files_beside_are_changed_in_place(folder):
    assert captions(folder) == {"a.png": ("a cat", "the cat again"), "b.jpg": ("cat on a mat",), "c.png": ()}
    assert edit(folder, replace=("cat", "dog")) == ["a.png", "b.jpg"]
    assert (folder / "b.caption").read_text() == "dog on a mat\n"
    assert edit(folder, texts={"c.png": "  a   bird "}) == ["c.png"]
    assert (folder / "c.txt").read_text() == "a bird\n"
    assert edit(folder, trigger="sks") == ["a.png", "b.jpg", "c.png"]
    assert captions(folder)["a.png"] == ("sks, a dog", "sks, the dog again")
    assert edit(folder, trigger="sks") == []  # once is enough
    assert sorted(p.name for p in folder.iterdir()) == ["a.png", "a.txt", "b.caption", "b.jpg", "c.png", "c.txt"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("a cat", "sks, a cat"), ("sks a cat", "sks a cat"), ("sks", "sks"), ("", "sks"), ("sksy cat", "sks, sksy cat")],
)
def test_a_trigger_word_comes_first_once(caption, expected):
    assert with_trigger(caption, "sks") == expected


def test_rows_of_a_table_keep_their_other_fields(tmp_path):
    noise(tmp_path / "a.png", (64, 64), 0)
    noise(tmp_path / "b.png", (64, 64), 1)
    rows = [{"file_name": "a.png", "text": "a cat", "id": 7}, {"file_name": "b.png", "text": "é"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert edit(tmp_path, trigger="sks") == ["a.png", "b.png"]
    found = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert found == [{"file_name": "a.png", "text": "sks, a cat", "id": 7}, {"file_name": "b.png", "text": "sks, é"}]
    assert not list(tmp_path.glob("*.txt"))


def test_other_tables_are_refused_and_nothing_is_written(tmp_path):
    noise(tmp_path / "a.png", (64, 64), 0)
    noise(tmp_path / "b.png", (64, 64), 1)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat\n")
    (tmp_path / "b.txt").write_text("b cat\n")
    with pytest.raises(ValueError, match=r"a\.png.*metadata\.csv"):
        edit(tmp_path, replace=("cat", "dog"))
    assert (tmp_path / "b.txt").read_text() == "b cat\n"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"trigger": " "}, "trigger"),
        ({"replace": ("", "x")}, "replace"),
        ({"texts": {"no.png": "x"}}, "no.png"),
    ],
)
def test_mistakes_are_named(folder, how, words):
    with pytest.raises(ValueError, match=words):
        edit(folder, **how)


def test_what_training_would_find(folder):
    Image.open(folder / "a.png").resize((64, 48)).save(folder / "a2.png")  # a smaller copy
    (folder / "d.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    found = check(folder, 96)
    assert found.pictures == 5
    assert list(found.bad) == ["d.png"]
    assert found.small == {"a2.png": (64, 48)}
    assert found.alike == [["a.png", "a2.png"]]
    assert set(found.uncaptioned) == {"a2.png", "c.png", "d.png"}
    # 4 to 3 of at most 96 x 96 pixels by steps of 8: 112 x 80 (1.4) is nearer to 1.33 than 104 x 88 (1.18)
    assert found.buckets == {"112x80": 4}
    assert check(folder).side == 64  # half of the pictures have 96, which is no usual side


def test_the_commands(folder, capsys):
    assert main(["data", "captions", str(folder), "--trigger", "sks", "--set", "c.png", "a bird"]) == 0
    assert "3 captions changed" in capsys.readouterr().out
    assert main(["data", "captions", str(folder)]) == 0
    assert "c.png: sks, a bird" in capsys.readouterr().out
    assert main(["data", "check", str(folder), "--size", "96", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 3
    assert main(["data", "check", str(folder / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err
