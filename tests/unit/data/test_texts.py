"""Text of any editor; captions of any json."""

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from ldm.cli.sample import _prompts_in
from ldm.data.captions import captions_of
from ldm.data.decode import BadSample
from ldm.data.indexing import index
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.mixture import MixtureConfig, Source, without_texts
from ldm.data.shards import Shards
from ldm.data.texts import captions_in, lines, read_lines, text
from ldm.data.write import ShardWriter
from ldm.recipes.autoencoder import held_out
from tests.unit.data.pictures import png

SAID = "café 日本 🍎, red"


@pytest.mark.parametrize(
    "data",
    [
        SAID.encode(),
        codecs.BOM_UTF8 + SAID.encode(),
        SAID.encode("utf-16"),
        codecs.BOM_UTF16_BE + SAID.encode("utf-16-be"),
        codecs.BOM_UTF16_LE + SAID.encode("utf-16-le"),
        SAID.encode("utf-32"),
        codecs.BOM_UTF32_BE + SAID.encode("utf-32-be"),
        (SAID + "\r\n").encode("utf-16"),
    ],
)
def test_text_is_read_by_its_mark(data: bytes) -> None:
    assert text(data) == SAID
    assert captions_of({"txt": data})[0].texts == (SAID,)
    record = {"caption": None, "text": SAID}
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    assert captions_of({"json": json.dumps(record, ensure_ascii=False).encode(encoding)})[0].texts == (SAID,)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"caf\xe9", "byte 0xe9 at character 3"),
        ("a cat".encode("utf-16-le"), "zero bytes, as UTF-16 without a byte order mark"),
        (codecs.BOM_UTF16_LE + b"a\0b", "UTF-16"),
        (b"a" + b"\xed\xa0\x80", "byte 0xed"),
    ],
)
def test_what_is_no_text_is_said(data: bytes, what: str) -> None:
    with pytest.raises(BadSample, match=what) as info:
        text(data)
    assert info.value.reason == "not_utf8"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompt_files_of_any_editor(end: str, encoding: str, tmp_path: Path) -> None:
    """kohya-ss/sd-scripts#513. U+2028, form feeds and U+0085 are inside a line, not ends of it; a prompt has blanks."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(end.join(["a red apple", "", "  cat\u2028face\x0con\x85grass  "]).encode(encoding))
    assert read_lines(path) == ["a red apple", "cat\u2028face\x0con\x85grass"]
    assert _prompts_in(path) == ["a red apple", "cat face on grass"]


def test_a_prompt_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"odd\.txt.*byte 0xe9"):
        _prompts_in(path)
    with pytest.raises(ValueError, match=r"no\.txt"):
        read_lines(tmp_path / "no.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_lines(tmp_path)


def test_files_put_together_leave_no_marks_in_lines() -> None:
    assert lines("a\n\ufeffb\n\ufeff\n") == ["a", "b"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"caption": ["a cat", "a sleeping cat"]}, ("a cat", "a sleeping cat")),  # rom1504/img2dataset#244
        ({"caption": [None, "a cat", "", "  "]}, ("a cat",)),
        ({"caption": None, "text": "a cat"}, ("a cat",)),
        ({"caption": "", "text": ["a cat"]}, ("a cat",)),
        ({"caption": [], "text": "a cat"}, ("a cat",)),
        ({"caption": 7}, ("7",)),
        ({"caption": [1, 2.5]}, ("1", "2.5")),
        ({"captions": None, "caption": "a cat"}, ("a cat",)),
        ({"captions": "a cat"}, ("a cat",)),
        ({"captions": [None, "a cat", ["b", 0.5]]}, ("a cat", "b")),
        ({"captions": [], "caption": "a cat"}, ("a cat",)),
        ({"caption": None}, ("from the txt",)),
        ({"caption": float("nan")}, ("from the txt",)),
        ({}, ("from the txt",)),
    ],
)
def test_captions_of_any_json(record: dict[str, Any], expected: tuple[str, ...]) -> None:
    members = {"json": json.dumps(record).encode(), "txt": b"from the txt"}
    assert captions_of(members)[0].texts == expected


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"caption": {"en": "a cat"}}, "caption holds"),
        ({"caption": True}, "caption holds True"),
        ({"caption": ["a", {"b": 1}]}, "caption holds"),
        ({"captions": {"a": 1}}, "captions: "),
        ({"captions": [["a", "b"]]}, "captions hold"),
        ({"captions": [["a", -1]]}, "negative"),
        ({"captions": [["a", float("inf")]]}, "no number"),
        ({"captions": [["a", float("nan")]]}, "no number"),
    ],
)
def test_captions_that_are_none_are_refused_with_the_txt_of_str_beside_them(record: dict[str, Any], why: str) -> None:
    """img2dataset writes `str(value)` beside: those brackets are nothing to learn."""
    with pytest.raises(BadSample, match=why) as info:
        captions_of({"json": json.dumps(record).encode(), "txt": b"{'en': 'a cat'}"})
    assert info.value.reason == "bad_json"


def test_other_members_of_text() -> None:
    assert captions_of({"caption": b"a cat"})[0].texts == ("a cat",)
    assert captions_of({"text": b"a cat", "txt": b" "})[0].texts == ("a cat",)


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"a": 1', b"\xff", b"{}x"])
def test_broken_json_has_a_reason(data: bytes) -> None:
    with pytest.raises(BadSample) as info:
        captions_of({"json": data, "txt": b"a cat"})
    assert info.value.reason == "bad_json"


def test_half_a_surrogate_pair_is_no_caption() -> None:
    with pytest.raises(BadSample, match="lone surrogate U\\+D83C"):
        captions_in(json.loads('"\\ud83c"'), "caption")


def test_texts_that_are_not_used_cost_no_picture(tmp_path: Path) -> None:
    """Pictures alone, as the autoencoder trains on them: captions missing, broken, json broken."""
    members = [{"txt": b"caf\xe9"}, {"json": b"{"}, {}, {"txt": b"fine"}]
    with ShardWriter(tmp_path, "train") as writer:
        for i, more in enumerate(members):
            writer.add(f"{i}", {"png": png((i, i, i), (8, 8)), **more})
    Manifest(name="x", shards=tuple(writer.shards), folder=tmp_path).write()
    config = DataConfig(path=str(tmp_path), size=8, max_bad=1.0)
    used = Loader(config, seed=0, micro_batch=4)
    assert set(used.batch(0, 0)["key"]) == {"3"}
    alone = without_texts(config)
    assert isinstance(alone, DataConfig)
    batch = Loader(alone, seed=0, micro_batch=4).batch(0, 0)
    assert sorted(batch["key"]) == ["0", "1", "2", "3"]
    assert batch["caption"] == [""] * 4
    both = without_texts(MixtureConfig(sources=(Source(data=config), Source(data=config))))
    assert isinstance(both, MixtureConfig)
    assert [s.data.captions for s in both.sources] == ["none", "none"]
    with pytest.raises(ValueError, match="captions: none is for pictures"):
        DataConfig(path="x", size=8, captions="none", cached=True)
    assert held_out(alone, "train")["image"].shape == (4, 3, 8, 8)


def test_tars_of_formats_that_are_not_read_say_which(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train") as writer:
        writer.add("a", {"heic": b"x", "txt": b"a"})
        writer.add("b", {"png": png((1, 1, 1)), "txt": b"b"})
        writer.add("c", {"tga": b"", "txt": b"c"})
    _, results = index(tmp_path)
    assert "1 samples without a picture; there are members of HEIC, which is not read here" in results[0].problems[0]


def test_what_systems_leave_in_tars_is_no_sample(tmp_path: Path) -> None:
    """OpenNeuroOrg/openneuro#2520: macOS' tar packs ._NAME beside each NAME; zips from there bring __MACOSX."""
    import io
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("./._a.png", "./a.png", "./._a.txt", "./a.txt", "__MACOSX/._a.png", "__MACOSX/b.png", "Thumbs.db"):
            data = (
                png((1, 1, 1)) if name in ("./a.png", "__MACOSX/b.png") else b"\0\5\x16\7" if "_" in name else b"a cat"
            )
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    manifest, _ = index(tmp_path)
    samples = [members for _, members in Shards(manifest, "train")]
    assert len(samples) == 1
    assert captions_of(samples[0])[0].texts == ("a cat",)
