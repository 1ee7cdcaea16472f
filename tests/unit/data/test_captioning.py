"""Captions of a folder are changed where they are, and nothing else is; what is wrong with a folder is named."""

from __future__ import annotations

import csv
import io
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


def pictures(folder, *names):
    for i, name in enumerate(names):
        noise(folder / name, (64, 64), i)


WORDS = "a “cat”, 'small'"
TABLES = {
    "metadata.csv": 'id,file_name,text,n\r\n007,a.png,"a cat, one",1.50\r\n008,b.png,"a\nb ""c""",2\r\n'
    "009,c.png,,\r\n",
    "metadata.tsv": "file_name\ttext\tid\na.png\ta cat, one\t007\nb.png\tb \"c\"\t8\nc.png\t\t",
    "metadata.jsonl": '\n{"id": 1e2, "file_name":"a.png","text": "a cat, one","x": [1,{"text":"no"}]}\r\n'
    '{"file_name": "b.png", "text": ["b", "c"]}\r\n{"text": null, "file_name": "c.png"}',
}  # fmt: skip


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_change_in_one_cell_alone(tmp_path, name, mark):
    """Against the text itself: what differs is the caption's place, whatever quotes and line ends are around it."""
    pictures(tmp_path, "a.png", "b.png", "c.png")
    before = (mark + TABLES[name]).encode()
    (tmp_path / name).write_bytes(before)
    (tmp_path / name).chmod(0o640)
    assert edit(tmp_path, texts={"a.png": WORDS}) == ["a.png"]
    new = f'"{WORDS}"' if name != "metadata.tsv" else WORDS
    old = '"a cat, one"' if name != "metadata.tsv" else "a cat, one"
    assert (tmp_path / name).read_bytes() == before.replace(old.encode(), new.encode())
    edit(tmp_path, texts={"a.png": "a cat, one"})
    assert (tmp_path / name).read_bytes() == before
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    edit(tmp_path, texts={"c.png": "fills the empty cell"})
    edit(tmp_path, trigger="sks")
    assert captions(tmp_path)["a.png"] == ("sks, a cat, one",)
    assert captions(tmp_path)["c.png"] == ("sks, fills the empty cell",)
    assert all(caption.startswith("sks, ") for caption in captions(tmp_path)["b.png"])
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png", "c.png", name}


def test_tables_as_others_read_them(tmp_path):
    """Python's csv module and json are the oracle; UTF-16, semicolons and a column that is there twice."""
    pictures(tmp_path, "a.png", "b.png")
    rows = [["file_name", "text", "text", "id"], ["a.png", "one", "two", "01"], ["b.png", "x;y", '"', "2"]]
    held = io.StringIO(newline="")
    csv.writer(held, delimiter=";").writerows(rows)
    (tmp_path / "metadata.csv").write_bytes(held.getvalue().encode("utf-16"))
    edit(tmp_path, texts={"a.png": 'a "b"; c', "b.png": "é"})
    rows[1][1], rows[2][1] = 'a "b"; c', "é"
    found = (tmp_path / "metadata.csv").read_bytes().decode("utf-16")
    assert list(csv.reader(io.StringIO(found, newline=""), delimiter=";")) == rows


def test_a_pictures_own_json(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.json").write_text('{\n  "tags": [1.0],\n  "caption": "a cat",\n  "caption": "the cat"\n}\n')
    (tmp_path / "b.json").write_text('[ "b", "b cat" ]\n')
    (tmp_path / "c.json").write_text("{ }")
    assert edit(tmp_path, replace=("cat", "dog")) == ["a.png", "b.png"]
    assert (tmp_path / "a.json").read_text() == (
        '{\n  "tags": [1.0],\n  "caption": "a cat",\n  "caption": "the dog"\n}\n'
    )
    assert (tmp_path / "b.json").read_text() == '["b", "b dog"]\n'
    edit(tmp_path, texts={"c.png": "new"})
    assert json.loads((tmp_path / "c.json").read_text()) == {"captions": "new"}
    assert captions(tmp_path)["c.png"] == ("new",)
    with pytest.raises(ValueError, match=r"a\.json: holds one caption, got 2 lines"):
        edit(tmp_path, texts={"a.png": "x\ny"})


def test_the_table_that_names_a_picture_is_written(tmp_path):
    """The nearest table need not name it; a picture may be in two rows; a link stays one."""
    (tmp_path / "sub").mkdir()
    pictures(tmp_path, "sub/a.png", "sub/b.png")
    (tmp_path / "real.jsonl").write_text('{"file_name": "sub/a.png", "text": "one"}\n' * 2)
    (tmp_path / "metadata.jsonl").symlink_to("real.jsonl")
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,id\nb.png,1\n")
    assert edit(tmp_path, trigger="sks") == ["sub/a.png", "sub/b.png"]
    assert (tmp_path / "real.jsonl").read_text() == '{"file_name": "sub/a.png", "text": "sks, one"}\n' * 2
    assert (tmp_path / "metadata.jsonl").is_symlink()
    assert (tmp_path / "sub" / "b.txt").read_text() == "sks\n"  # the table has no column of captions


@pytest.mark.parametrize(
    ("text", "caption", "words"),
    [
        ("file_name,text\na.png,a cat\n", "x\ny", r"metadata\.csv:2: holds one caption, got 2 lines"),
        ("file_name,text\na.png,a cat\n", "x\0y", "zero bytes"),
        ('file_name,text\na.png,"a cat"\n\n', "\ud800", "surrogate"),
    ],
)
def test_what_a_cell_cannot_hold_is_refused_and_nothing_is_written(tmp_path, text, caption, words):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        edit(tmp_path, texts={"b.png": "new", "a.png": caption})
    assert (tmp_path / "metadata.csv").read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "metadata.csv"]


def test_parquet_is_refused(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    pictures(tmp_path, "a.png")
    parquet.write_table(pyarrow.table({"file_name": ["a.png"], "text": ["a cat"]}), tmp_path / "metadata.parquet")
    with pytest.raises(ValueError, match=r"a\.png: .*metadata\.parquet, which is not written here"):
        edit(tmp_path, trigger="sks")


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
