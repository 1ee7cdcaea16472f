"""`ldm data build`, `index` and `inspect` on folders as people have them."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from ldm.cli.data import main
from ldm.data.build import BuildConfig, build
from ldm.data.captions import captions_of
from ldm.data.decode import metadata
from ldm.data.filters import compile_filter
from ldm.data.indexing import index
from ldm.data.inspection import inspect
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.shards import Shards
from ldm.data.sources import CaptionsFrom
from ldm.data.write import ShardWriter
from tests.unit.data.pictures import png


def noise(width: int, height: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty good pictures and one of each bad kind."""
    root = tmp_path / "pictures"
    (root / "sub.dir").mkdir(parents=True)
    for i in range(19):
        (root / f"p{i:02d}.jpg").write_bytes(noise(40 + i, 30))
        (root / f"p{i:02d}.txt").write_text(f"picture {i}\nanother caption\n")
    (root / "sub.dir" / "a.b.png").write_bytes(png((1, 2, 3), (5, 9)))
    (root / "sub.dir" / "a.b.txt").write_text("dotted")
    bad = {
        "truncated.jpg": noise(64, 64)[:900],
        "zero.jpg": b"",
        "text.png": b"hello",
        "nocaption.jpg": noise(20, 20),
        "latin.jpg": noise(20, 20),
        "huge.png": png((0, 0, 0), (2000, 1500)),
    }
    for name, data in bad.items():
        (root / name).write_bytes(data)
        if name != "nocaption.jpg":
            (root / name).with_suffix(".txt").write_bytes(b"caf\xe9" if name == "latin.jpg" else b"a caption")
    return root


def test_build_reports_every_bad_picture(folder: Path, tmp_path: Path) -> None:
    report = build(folder, tmp_path / "out", BuildConfig(max_pixels=1_000_000))
    assert (report.found, report.written) == (26, 20)
    reasons = {entry["name"]: entry["reason"] for entry in report.bad}
    assert reasons == {
        "truncated.jpg": "damaged",
        "zero.jpg": "empty",
        "text.png": "unknown_format",
        "nocaption.jpg": "no_caption",
        "latin.jpg": "not_utf8",
        "huge.png": "huge",
    }
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert listed == list(report.bad)
    samples = dict(Shards(Manifest.read(tmp_path / "out"), "train"))
    assert samples["p03"]["jpg"] == (folder / "p03.jpg").read_bytes()  # untouched
    assert captions_of(samples["p03"])[0].texts == ("picture 3", "another caption")
    assert captions_of(samples["sub_dir/a_b"])[0].texts == ("dotted",)
    theirs = list(wds.WebDataset(str(tmp_path / "out" / "train-00000.tar"), shardshuffle=False))
    assert len(theirs) == 20
    assert theirs[3]["txt"] == b"picture 3"


def test_workers_change_nothing(folder: Path, tmp_path: Path) -> None:
    one = build(folder, tmp_path / "one", BuildConfig(max_pixels=1_000_000, heldout=0.3, size=24)).manifest
    two = build(folder, tmp_path / "two", BuildConfig(max_pixels=1_000_000, heldout=0.3, size=24, workers=2)).manifest
    assert one.shards == two.shards
    assert one.splits == ("heldout", "train")
    for _, members in Shards(one, "train"):
        fields = metadata(members)
        assert min(fields["width"], fields["height"]) == min(24, fields["original_height"], fields["original_width"])


def test_wrong_extensions_are_told_by_content(tmp_path: Path) -> None:
    """A PNG called jpg and a JPEG called webp are stored under their own names; foreign tars with them are read too."""
    root = tmp_path / "wrong"
    root.mkdir()
    (root / "a.jpg").write_bytes(png((9, 8, 7), (6, 6)))
    (root / "b.webp").write_bytes(noise(6, 6))
    for name in "ab":
        (root / f"{name}.txt").write_text(name)
    samples = dict(Shards(build(root, tmp_path / "out", BuildConfig()).manifest, "train"))
    assert "png" in samples["a"]
    assert "jpg" in samples["b"]
    with ShardWriter(tmp_path / "tar", "train") as writer:
        writer.add("c", {"jpg": png((9, 8, 7), (6, 6)), "txt": b"c"})
    Manifest(name="x", shards=tuple(writer.shards), folder=tmp_path / "tar").write()
    batch = Loader(DataConfig(path=str(tmp_path / "tar"), size=6), seed=0, micro_batch=1).batch(0, 0)
    assert ((batch["image"][0, :, 3, 3] + 1) * 127.5).round().int().tolist() == [9, 8, 7]


def test_metadata_jsonl(tmp_path: Path) -> None:
    root = tmp_path / "hf"
    (root / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png((0, 0, 0)))
    for i in range(3):
        (root / "images" / f"{i}.png").write_bytes(png((i, i, i)))
    rows = [
        json.dumps({"file_name": "images/0.png", "text": "zero", "score": 5}),
        json.dumps({"file_name": "images/1.png", "text": ["one", "uno"]}),
        json.dumps({"file_name": "images/9.png", "text": "gone"}),
        json.dumps({"file_name": "../secret.png", "text": "outside"}),
        "{broken",
        json.dumps({"text": "nothing"}),
    ]
    (root / "metadata.jsonl").write_text("\n".join(rows))
    report = build(root, tmp_path / "out", BuildConfig())
    assert report.written == 2
    assert report.reasons == {"missing": 1, "outside": 1, "bad_metadata": 2, "no_caption": 1}
    samples = dict(Shards(report.manifest, "train"))
    assert metadata(samples["images/0"])["score"] == 5
    assert captions_of(samples["images/1"])[0].texts == ("one", "uno")


def test_metadata_csv(tmp_path: Path) -> None:
    root = tmp_path / "hf"
    (root / "train").mkdir(parents=True)
    for i in range(2):
        (root / "train" / f"{i}.png").write_bytes(png((i, i, i)))
    (root / "metadata.csv").write_text('file_name,text,artist\ntrain/0.png,"red, round",ann\ntrain/1.png,blue,bob\n')
    samples = dict(Shards(build(root, tmp_path / "out", BuildConfig()).manifest, "train"))
    assert captions_of(samples["train/0"])[0].texts == ("red, round",)
    assert metadata(samples["train/1"])["artist"] == "bob"


@pytest.mark.parametrize(("source", "expected"), [("folder", {"red panda", "cat"}), ("name", {"a big one", "b"})])
def test_imagefolders(tmp_path: Path, source: CaptionsFrom, expected: set[str]) -> None:
    """A folder a class, as HF's imagefolder and torchvision's: the folder's or the file's name is the caption."""
    for name in ("red_panda/a_big-one.png", "cat/b.png"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(png((1, 2, 3)))
    manifest = build(tmp_path / "set", tmp_path / "out", BuildConfig(captions_from=source)).manifest
    assert {captions_of(m)[0].texts[0] for _, m in Shards(manifest, "train")} == expected


def test_look_alikes_are_found(tmp_path: Path) -> None:
    """A picture again at another size and quality is one; others are not, however they are stored."""
    root = tmp_path / "set"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        small.resize((200, 160), Image.Resampling.BICUBIC).save(root / f"p{i}.png")
        (root / f"p{i}.txt").write_text(f"picture {i} of six")
    again = Image.open(root / "p2.png").resize((100, 80), Image.Resampling.BICUBIC)
    again.save(root / "again.jpg", quality=92)
    (root / "again.txt").write_text("picture 2 once more")
    manifest = build(root, tmp_path / "out", BuildConfig()).manifest
    summary = inspect(manifest, tmp_path / "look")
    assert [sorted(group) for group in summary["look_alikes"]] == [["again", "p2"]]
    assert summary["look_alike_groups"] == 1
    assert summary["caption_words"]["median"] == 4
    assert summary["aspect"] == dict.fromkeys(("min", "p5", "median", "p95", "max"), 1.25)
    assert (summary["width"]["min"], summary["width"]["max"]) == (100, 200)
    assert "again, p2" in (tmp_path / "look" / "index.html").read_text()


def test_a_tar_of_no_bytes_is_reported(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train") as writer:
        writer.add("c", {"png": png((9, 8, 7)), "txt": b"c"})
    (tmp_path / "zero.tar").write_bytes(b"")
    manifest, results = index(tmp_path)
    assert [s.file for s in manifest.shards] == [writer.shards[0].file]
    assert any("zero.tar" in p for r in results for p in r.problems)


def test_kohya_folders_and_duplicate_names(tmp_path: Path) -> None:
    root = tmp_path / "kohya" / "10_sks dog"
    root.mkdir(parents=True)
    (root / "a.png").write_bytes(png((1, 1, 1)))
    (root / "a.jpg").write_bytes(noise(9, 9))
    (root / "b.png").write_bytes(png((2, 2, 2)))
    (root / "b.caption").write_text("sks dog on grass")
    samples = dict(Shards(build(tmp_path / "kohya", tmp_path / "out", BuildConfig()).manifest, "train"))
    assert len(samples) == 3
    texts = sorted(captions_of(m)[0].texts[0] for m in samples.values())
    assert texts == ["sks dog", "sks dog", "sks dog on grass"]
    loader = Loader(DataConfig(path=str(tmp_path / "out"), size=8), seed=0, micro_batch=3)
    assert loader.steps_per_epoch == 10
    assert set(Counter(k for s in range(10) for k in loader.batch(s, 0)["key"]).values()) == {10}


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        build(tmp_path / "none", tmp_path / "out", BuildConfig())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures found"):
        build(tmp_path / "empty", tmp_path / "out", BuildConfig())
    (tmp_path / "empty" / "x.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 1 pictures can be used"):
        build(tmp_path / "empty", tmp_path / "out", BuildConfig())
    build(folder, tmp_path / "out2", BuildConfig())
    with pytest.raises(ValueError, match="holds a data set already"):
        build(folder, tmp_path / "out2", BuildConfig())
    with pytest.raises(ValueError, match="heldout"):
        BuildConfig(heldout=1.5)


def test_index_of_existing_tars(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "out", BuildConfig(max_pixels=1_000_000, shard_samples=8))
    tars = tmp_path / "tars"
    tars.mkdir()
    for path in (tmp_path / "out").glob("*.tar"):
        shutil.copy(path, tars)
    manifest, _ = index(tars)
    assert manifest.shards == Manifest.read(tmp_path / "out").shards
    (tars / "manifest.json").unlink()
    manifest, results = index(tars, where="width >= 50 and width < 55", split="wide")
    assert manifest.samples("wide") == 5
    assert sum(r.left_out for r in results) == 15
    first = tars / "train-00000.tar"
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    (tars / "junk.tar").write_bytes(b"junk" * 999)
    manifest, results = index(tars, workers=2)
    problems = " ".join(p for r in results for p in r.problems)
    assert "truncated after" in problems
    assert "junk.tar" in problems
    assert 12 < manifest.samples() < 20
    assert "wide" in manifest.splits  # an earlier manifest's word stays
    for _, members in Shards(manifest, "train"):
        captions_of(members)


def test_filters_are_data() -> None:
    keep = compile_filter("width >= 256 and (pwatermark < 0.5 or source in ['a', 'b']) and not nsfw")
    assert keep({"width": 300, "pwatermark": 0.1})
    assert keep({"width": 300, "source": "b"})
    assert not keep({"width": 300, "pwatermark": None})
    assert not keep({"width": 100, "pwatermark": 0.1})
    assert compile_filter("max(width / height, height / width) < 2")({"width": 3, "height": 2})
    for text in ("__import__('os')", "a.b", "[x for x in y]", "lambda: 1", "2 ** 9", "width >", "f'{a}'"):
        with pytest.raises(ValueError, match="filter"):
            compile_filter(text)


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["build", str(folder), out, "--workers", "1", "--max-pixels", "1000000"]) == 0
    text = capsys.readouterr().out
    assert "left out: truncated.jpg: damaged" in text
    assert "20 of 26 pictures in 1 shards (20 train)" in text
    assert main(["inspect", out, "--out", str(tmp_path / "look")]) == 0
    summary = json.loads((tmp_path / "look" / "statistics.json").read_text())
    assert summary["samples"] == 20
    assert summary["width"]["max"] == 58
    assert (tmp_path / "look" / "index.html").read_text().count("<img") == 1
    with Image.open(tmp_path / "look" / "contact.png") as sheet:
        assert sheet.width == 12 * 136
    assert main(["index", out, "--workers", "1"]) == 0
    with pytest.raises(ValueError, match="give --vae, --text or both"):
        main(["encode", out, str(tmp_path / "cache"), "--size", "64"])
    with pytest.raises(SystemExit):
        main(["bild"])
