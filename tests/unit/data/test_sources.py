"""Folders as people have them: which files are samples, with which captions, and how often each comes."""

import io
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from ldm.data.build import BuildConfig, build
from ldm.data.captions import captions_of
from ldm.data.decode import BadSample, metadata
from ldm.data.manifest import Manifest
from ldm.data.shards import Shards
from ldm.data.sources import captions_beside, find, folder_repeats
from tests.unit.data.pictures import png


def files_of(root: Path, files: dict[str, bytes | str | None]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = png((1, 2, 3)) if content is None else content.encode() if isinstance(content, str) else content
        path.write_bytes(data)
    return root


def told(root: Path, **options: Any) -> dict[str, tuple[list[str], int] | str]:
    """By name: the captions and repeats of what is a sample, or why one is not."""
    found: dict[str, tuple[list[str], int] | str] = {}
    for item in find(root, **options):
        if item.problem is not None:
            found[item.name] = item.problem[0]
            continue
        try:
            found[item.name] = ([c for c, _ in captions_beside(item)], item.repeats)
        except BadSample as error:
            found[item.name] = error.reason
    return found


def test_suffixes_of_any_case(tmp_path: Path) -> None:
    """bmaltais/kohya_ss#217, replicate/cog-sdxl#7: cameras and Windows write capitals."""
    files = {"A.JPG": None, "A.TXT": "a", "b.Jpeg": None, "b.Txt": "b", "c.PNG": None, "c.Caption": "c", "D.webP": None}
    files |= {"d.txt": "other case", "e.png": None, "e.JSON": '{"caption": ["e", null, "f"]}'}
    found = told(files_of(tmp_path / "in", files))
    assert found == {
        "A.JPG": (["a"], 1),
        "b.Jpeg": (["b"], 1),
        "c.PNG": (["c"], 1),
        "D.webP": (["other case"], 1),
        "e.png": (["e", "f"], 1),
    }


def test_caption_files_of_the_whole_name_and_their_order(tmp_path: Path) -> None:
    files = {
        "a.png": None,
        "a.png.txt": "whole",
        "b.png": None,
        "b.txt": "stem",
        "b.png.txt": "whole",
        "b.caption": "c",
    }
    assert told(files_of(tmp_path / "in", files)) == {"a.png": (["whole"], 1), "b.png": (["stem"], 1)}


def test_names_with_accents_match_in_either_form(tmp_path: Path) -> None:
    """macOS stores decomposed letters; ostris/ai-toolkit#689."""
    apart, whole = (unicodedata.normalize(form, "é ü") for form in ("NFD", "NFC"))
    assert apart != whole
    root = files_of(tmp_path / "in", {f"{apart}.png": None, f"{whole}.txt": "one", f"x{whole}.png": None})
    (root / f"x{apart}.txt").write_text("two")
    assert [c for c, _ in told(root).values()] == [["one"], ["two"]]
    rows = [json.dumps({"file_name": f"{apart}.png", "text": "row one"}, ensure_ascii=False)]
    rows += [json.dumps({"file_name": f"x{apart}.PNG", "text": "row two"}, ensure_ascii=False)]
    (root / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert sorted(c for c, _ in told(root).values()) == [["row one"], ["row two"]]


def test_what_systems_leave_is_passed_over_and_what_is_not_read_is_listed(tmp_path: Path) -> None:
    junk = b"\0\5\x16\7\0\2\0\0Mac OS X"
    files = {"a.png": None, "a.txt": "a", "._a.png": junk, "._a.txt": junk, ".hidden.png": None, ".DS_Store": junk}
    files |= {"Thumbs.db": junk, "__MACOSX/._a.png": junk, "__MACOSX/b.png": None, ".git/c.png": None}
    files |= {"@eaDir/a.png/SYNO.png": None, "IMG_2.HEIC": b"x", "x.jxl": b"x", "y.PSD": b"x", "z.svg": b"<svg/>"}
    files |= {"r.CR2": b"x", "r.dng": b"x", "m.mov": b"x", "notes.md": "x", "data.json": "{}"}
    root = files_of(tmp_path / "in", files)
    unread = dict.fromkeys(("IMG_2.HEIC", "x.jxl", "y.PSD", "z.svg", "r.CR2", "r.dng", "m.mov"), "unsupported")
    assert told(root) == {"a.png": (["a"], 1), **unread}
    report = build(root, tmp_path / "out", BuildConfig())
    assert (report.found, report.written, dict(report.reasons)) == (8, 1, {"unsupported": 7})
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {e["name"] for e in listed} == set(unread)
    assert "HEIC is not read here; convert it" in next(e["error"] for e in listed if e["name"] == "IMG_2.HEIC")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("3_my_cat", (3, "my_cat")),  # kohya: "_".join(name.split("_")[1:])
        ("10_sks dog", (10, "sks dog")),
        ("0_name", (0, "name")),
        ("-1_name", (-1, "name")),
        ("3_", (3, "")),
        ("007_bond", (7, "bond")),
        ("cat", None),
        ("my_3_cat", None),
        ("3 my cat", None),
        ("3", None),  # here kohya counts 3 repeats of no words; see docs/data.md
        ("3.5_cat", None),
    ],
)
def test_folder_names_as_kohya_reads_them(name: str, expected: tuple[int, str] | None) -> None:
    """sd-scripts, library/config_util.py, extract_dreambooth_params: repeats and class tokens of a folder's name."""
    assert folder_repeats(name) == expected


def test_kohya_s_folders(tmp_path: Path) -> None:
    files: dict[str, bytes | str | None] = {
        "3_my_cat/a.png": None,
        "3_my_cat/b.png": None,
        "3_my_cat/b.txt": "one\ntwo",
    }
    files |= {
        "0_off/c.png": None,
        "2_/d.png": None,
        "plain/e.png": None,
        "plain/e.txt": "e",
        "3_my_cat/sub/f.png": None,
    }
    files |= {"3_my_cat/5_dog/g.png": None, "3_my_cat/h.png": None, "3_my_cat/h.txt": b"caf\xe9"}
    root = files_of(tmp_path / "in", files)
    assert told(root) == {
        "0_off/c.png": "no_repeats",
        "2_/d.png": ([], 2),
        "3_my_cat/5_dog/g.png": (["dog"], 5),
        "3_my_cat/a.png": (["my_cat"], 3),
        "3_my_cat/b.png": (["one", "two"], 3),
        "3_my_cat/h.png": "not_utf8",
        "3_my_cat/sub/f.png": (["my_cat"], 3),
        "plain/e.png": (["e"], 1),
    }
    assert told(root, captions_from="none")["3_my_cat/h.png"] == ([], 3)  # its text is not opened
    report = build(root, tmp_path / "out", BuildConfig())
    counts = {(s.repeats, s.samples) for s in report.manifest.shards}
    assert counts == {(1, 1), (3, 3), (5, 1)}
    assert dict(report.reasons) == {"no_repeats": 1, "no_caption": 1, "not_utf8": 1}
    assert any("'3_my_cat'" in r and "3 times an epoch" in r for r in report.remarks)


def test_imagefolders_know_no_repeats(tmp_path: Path) -> None:
    root = files_of(tmp_path / "in", {"3_cats/a.png": None, "3_cats/a.txt": b"\xff"})
    assert told(root, captions_from="folder") == {"3_cats/a.png": (["3 cats"], 1)}
    assert told(root, captions_from="name") == {"3_cats/a.png": (["a"], 1)}


CSV = [
    ("plain", 'file_name,text\r\na.png,"red, round"\r\nb.png,blue\r\n', ["red, round", "blue"]),
    ("line ends in cells", 'file_name,text\na.png,"one\ntwo"\nb.png,"a ""b"""\n', ["one\ntwo", 'a "b"']),
    ("old Mac", "file_name,text\ra.png,red\rb.png,blue\r", ["red", "blue"]),
    ("Excel in Europe", "file_name;text\na.png;red, round\nb.png;blue\n", ["red, round", "blue"]),
    ("Excel's hint", "sep=;\r\nfile_name;text\r\na.png;red\r\nb.png;blue\r\n", ["red", "blue"]),
    ("spaces, empty lines", "file_name , text\n\na.png,red\n,\nb.png,blue\n\n", ["red", "blue"]),
    ("columns twice, as pandas", "file_name,text,text\na.png,red,x\nb.png,blue,y\n", ["red", "blue"]),
    ("unnamed column", ",file_name,text\n0,a.png,red\n1,b.png,blue\n", ["red", "blue"]),
    ("trailing commas", "file_name,text\na.png,red,,\nb.png,blue,\n", ["red", "blue"]),
    ("a long cell", f"file_name,text\na.png,{'x' * 200_000}\nb.png,blue\n", ["x" * 200_000, "blue"]),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("_", "table", "expected"), CSV, ids=[c[0] for c in CSV])
def test_tables_are_read_as_csv_says(_: str, table: str, expected: list[str], encoding: str, tmp_path: Path) -> None:
    root = files_of(tmp_path / "in", {"a.png": None, "b.png": None, "metadata.csv": table.encode(encoding)})
    assert told(root) == {"a.png": ([expected[0]], 1), "b.png": ([expected[1]], 1)}


def test_tables_in_other_forms(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import datetime

    import pyarrow
    import pyarrow.parquet

    files: dict[str, bytes | str | None] = {
        "tsv/a.png": None,
        "tsv/Metadata.TSV": "file_name\ttext\na.png\tred, round\n",
    }
    files |= {
        "jsonl/a.png": None,
        "jsonl/metadata.jsonl": '{"file_name":"a.png","text":["x",null,3]}\r\n\r\n'.encode("utf-16"),
    }
    rows = [{"file_name": "a.png", "text": "from parquet", "when": datetime.date(2020, 1, 2), "raw": b"x", "n": None}]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    files |= {"parquet/a.png": None, "parquet/metadata.parquet": sink.getvalue()}
    root = files_of(tmp_path / "in", files)
    assert told(root) == {
        "jsonl/a.png": (["x", "3"], 1),
        "parquet/a.png": (["from parquet"], 1),
        "tsv/a.png": (["red, round"], 1),
    }
    samples = dict(Shards(build(root, tmp_path / "out", BuildConfig()).manifest, "train"))
    assert metadata(samples["parquet/a"])["when"] == "2020-01-02"
    for name in ("tsv/Metadata.TSV", "parquet/metadata.parquet", "jsonl/metadata.jsonl"):
        assert len(told(root / name)) == 1


def test_what_is_wrong_with_a_table_ends_neither_it_nor_the_rest(tmp_path: Path) -> None:
    table = b'file_name,text\na.png,red\nb.png,caf\xe9\nc.png,round, red\n"d.png"x,oops\ne.png,blue\n'
    table += b',nothing\n"f.png,open\n'
    files: dict[str, bytes | str | None] = {f"{n}.png": None for n in "abcdef"}
    root = files_of(tmp_path / "in", {**files, "metadata.csv": table})
    found = told(root)
    assert found["a.png"] == (["red"], 1)
    assert found["e.png"] == (["blue"], 1)
    problems = {i.name: i.problem[1] for i in find(root) if i.problem is not None and i.problem[0] == "bad_metadata"}
    said = "\n".join(problems.values())
    assert "metadata.csv:3: byte 0xe9" in said
    assert "3 cells for 2 columns; quote what holds a ','" in said
    assert "metadata.csv:7: no file_name" in said
    assert "unexpected end of data" in said
    assert "no CSV" in said
    assert [found[f"{n}.png"] for n in "bcdf"] == [([], 1)] * 4  # reported as without caption
    broken = files_of(tmp_path / "two", {"a.png": None, "a.txt": "a", "metadata.parquet": b"PAR1 no"})
    assert told(broken) == {"a.png": (["a"], 1), "metadata.parquet": "bad_metadata"}
    other = files_of(tmp_path / "three", {"a.png": None, "a.txt": "a", "metadata.csv": "image,text\na.png,red\n"})
    assert told(other)["a.png"] == (["a"], 1)
    assert "no file_name; it has image, text" in str([i.problem for i in find(other)])


def test_the_nearest_metadata_is_a_picture_s_own(tmp_path: Path) -> None:
    """As Hugging Face's imagefolder: tables in folders below, names relative to the table, other columns kept."""
    files: dict[str, bytes | str | None] = {"train/a.png": None, "train/sub/b.png": None, "c.png": None, "c.txt": "c"}
    files["metadata.jsonl"] = (
        '{"file_name": "train/a.png", "text": "far"}\n{"file_name": "train/sub/b.png", "text": "b"}'
    )
    files["train/metadata.csv"] = "file_name,text,artist\na.png,near,ann\n"
    root = files_of(tmp_path / "in", files)
    assert told(root) == {"train/a.png": (["near"], 1), "train/sub/b.png": (["b"], 1), "c.png": (["c"], 1)}
    samples = dict(Shards(build(root, tmp_path / "out", BuildConfig()).manifest, "train"))
    assert metadata(samples["train/a"])["artist"] == "ann"


def test_names_in_tables_as_other_systems_write_them(tmp_path: Path) -> None:
    files: dict[str, bytes | str | None] = {"x/a.JPG": None, "x/b.png": None, "c.png": None, "1.png": None}
    rows: list[dict[str, Any]] = [{"file_name": "x\\a.jpg", "text": "a"}, {"image_file_name": "./x/b.png", "text": "b"}]
    root = files_of(tmp_path / "in", files)
    rows += [{"file_name": str(root / "c.png"), "text": "c"}, {"file_name": "1.png", "caption": 5, "text": None}]
    rows += [{"file_name": "..\\in\\c.png", "text": "out"}, {"file_name": "x/../../c.png", "text": "out"}]
    rows += [{"file_name": "/etc/hostname", "text": "out"}, {"file_name": 3}, {"file_name": "c.png", "text": {"a": 1}}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnull\n")
    found = told(root)
    assert found["x\\a.jpg"] == (["a"], 1)
    assert found["./x/b.png"] == (["b"], 1)
    assert found[str(root / "c.png")] == (["c"], 1)
    assert found["1.png"] == (["5"], 1)
    assert [v for k, v in found.items() if k in ("..\\in\\c.png", "x/../../c.png", "/etc/hostname")] == ["outside"] * 3
    assert sorted(v for v in found.values() if isinstance(v, str)) == ["bad_metadata"] * 3 + ["outside"] * 3


def test_a_row_s_problem_is_told_once(tmp_path: Path) -> None:
    files: dict[str, bytes | str | None] = {"a.heic": b"x", "0_x/b.png": None, "c.png": None, "d.png": None}
    rows = [{"file_name": n, "text": "t"} for n in ("a.heic", "0_x/b.png")]
    rows += [{"file_name": "c.png", "text": {"no": "caption"}}, {"file_name": "d.png", "text": "d"}]  # type: ignore[dict-item]
    root = files_of(tmp_path / "in", {**files, "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    report = build(root, tmp_path / "out", BuildConfig())
    assert (report.found, report.written) == (4, 1)
    assert dict(report.reasons) == {"unsupported": 1, "no_repeats": 1, "bad_metadata": 1}


def test_pictures_behind_links_are_the_folder_s(tmp_path: Path) -> None:
    """A hub's cache is links into a store; a link back up is walked once."""
    store = files_of(tmp_path / "blobs", {"abc": None, "def": '{"file_name": "a.png", "text": "a"}'})
    root = tmp_path / "snapshot"
    root.mkdir()
    (root / "a.png").symlink_to(store / "abc")
    (root / "metadata.jsonl").symlink_to(store / "def")
    (root / "self").symlink_to(root)
    (root / "loop.png").symlink_to(root / "loop.png")
    found = told(root)
    assert found["a.png"] == (["a"], 1)
    report = build(root, tmp_path / "out", BuildConfig())
    assert report.written == 1
    assert set(report.reasons) <= {"no_caption", "unreadable"}


def test_names_and_captions_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    root = files_of(tmp_path / "in", {"a.png": None, "a.txt": "a", "b.png": None, "b.txt": b"caf\xe9", "c.png": None})
    (root / "c.txt").mkdir()
    try:
        os.rename(os.fsencode(root / "c.png"), os.fsencode(root) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system holds no such name")
    report = build(root, tmp_path / "out", BuildConfig())
    assert (report.written, dict(report.reasons)) == (1, {"not_utf8": 1, "no_caption": 1})
    assert {b["name"]: b["error"] for b in report.bad}["b.png"].startswith("b.txt: byte 0xe9")
    with_all = build(root, tmp_path / "all", BuildConfig(captions_from="folder"))
    assert with_all.written == 3  # no text was opened
    keys = [k for k, _ in Shards(Manifest.read(tmp_path / "all"), "train")]
    assert "caf_udce9" in keys


def test_bucket_counts_leave_out_what_was_left_out(tmp_path: Path) -> None:
    from ldm.data.buckets import BucketConfig
    from tests.unit.data.test_build import noise

    files: dict[str, bytes | str | None] = {}
    for i in range(9):
        files[f"w{i}.jpg"] = noise(130, 64)
        files[f"t{i}.jpg"] = noise(64, 130) if i != 4 else noise(64, 130)[:900]  # the header is whole
        files |= {f"w{i}.txt": "w", f"t{i}.txt": "t"}
    del files["w0.txt"], files["t0.txt"]
    root = files_of(tmp_path / "in", files)
    config = BuildConfig(buckets=BucketConfig(size=64, step=32, least=2), workers=1)
    report = build(root, tmp_path / "out", config)
    assert dict(report.reasons) == {"no_caption": 2, "damaged": 1}
    shown = {b: e["pictures"] for b, e in report.manifest.notes["buckets"].items()}
    held: dict[str, int] = {}
    for shard in report.manifest.shards:
        assert shard.bucket is not None
        name = f"{shard.bucket[0]}x{shard.bucket[1]}"
        held[name] = held.get(name, 0) + shard.samples
    assert shown == held
    assert sum(shown.values()) == report.written == 15


def test_frames_are_said(tmp_path: Path) -> None:
    from PIL import Image

    root = tmp_path / "in"
    root.mkdir()
    frames = [Image.new("RGB", (8, 8), (c, 0, 0)) for c in (250, 10)]
    frames[0].save(root / "a.gif", save_all=True, append_images=frames[1:])
    (root / "a.txt").write_text("a")
    assert build(root, tmp_path / "out", BuildConfig()).remarks == ("a.gif: the first of 2 frames or pages",)


def test_pictures_under_other_names_are_listed(tmp_path: Path) -> None:
    """What downloads leave: no suffix, or one that no program knows."""
    jpeg = b"\xff\xd8\xff\xe0\0\x10JFIF"
    files: dict[str, bytes | str | None] = {"a.png": None, "photo": jpeg, "b.jpg_large": jpeg, "c.jpg?w=10": jpeg}
    files |= {"d.webp!m": b"RIFF\0\0\0\0WEBP", "e": b"text", "f.dat": b"GIF89a", "g.txt": jpeg, "h.bin": jpeg}
    root = files_of(tmp_path / "in", files)
    problems = {i.name: i.problem for i in find(root) if i.problem is not None}
    assert set(problems) == {"photo", "b.jpg_large", "c.jpg?w=10", "d.webp!m", "f.dat"}
    assert problems["photo"] == ("suffix", "a JPEG by its content; name it .jpg")


def test_folders_that_cannot_be_opened_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = files_of(tmp_path / "in", {"a.png": None, "closed/b.png": None})
    scan = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert told(root) == {"a.png": ([], 1), "closed": "unreadable"}


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    root = files_of(tmp_path / "in", {"a.png": None, "a.txt": "a", "pipe.txt": "p", "gone.txt": "g"})
    os.mkfifo(root / "pipe.png")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    report = build(root, tmp_path / "out", BuildConfig())
    assert {b["name"]: b["reason"] for b in report.bad} == {"pipe.png": "unreadable", "gone.png": "unreadable"}


def test_caption_members_survive_a_build(tmp_path: Path) -> None:
    """Several lines are several captions, of any line end."""
    root = files_of(tmp_path / "in", {"a.png": None, "a.txt": "one\rtwo\r\n\r\nthree\u2028still".encode("utf-16")})
    samples = dict(Shards(build(root, tmp_path / "out", BuildConfig()).manifest, "train"))
    assert captions_of(samples["a"])[0].texts == ("one", "two", "three\u2028still")
