"""`ldm data index` over folders as downloads leave them, read-only folders and addresses."""

import errno
import gzip
import io
import json
import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from ldm.cli.data import main
from ldm.data import indexing
from ldm.data.buckets import BucketConfig
from ldm.data.decode import BadSample
from ldm.data.indexing import index
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.samples import Samples
from ldm.data.shards import Shards
from tests.unit.data.pictures import color_of, png
from tests.unit.data.tarred import Member, pack, pairs


def keys(data: Path | str) -> list[str]:
    return [k for k, _ in Shards(Manifest.read(data), "all")]


def scored(numbers: range) -> list[Member]:
    """Pictures with a score in their json."""
    found: list[Member] = []
    for i in numbers:
        found += [
            (f"{i:05d}.png", png(color_of(i))),
            (f"{i:05d}.json", json.dumps({"caption": "c", "score": i}).encode()),
        ]
    return found


def problems(results: list[indexing.Indexed]) -> str:
    return "\n".join(p for r in results for p in r.problems)


def test_what_a_download_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever has a picture and words is used; every tar that has not is named, and ends no other."""
    whole = pack(tmp_path / "00000.tar", pairs(range(6))).read_bytes()
    spoiled = {
        "00001.tar": b"",
        "00002.tar": gzip.compress(whole),
        "00003.tar": b"<!DOCTYPE html><title>403 Forbidden</title>",
        "00004.tar": whole[: len(whole) // 2],
        "00005__incomplete.tar": whole[:700],
        "00006.tar.gz": gzip.compress(whole),
        "00007.tar": bytes(10240),
    }
    for name, data in spoiled.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "00008.tar").mkdir()
    (tmp_path / "00009.tar").symlink_to(tmp_path / "nowhere.tar")
    (tmp_path / "00000_stats.json").write_text("{")
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "._00000.tar").write_bytes(b"\0\5\x16\7")
    pack(tmp_path / "sub" / "00010.TAR", pairs(range(6, 7)))
    pack(tmp_path / "sub" / "00010.tar", pairs(range(7, 8)))
    assert main(["index", str(tmp_path), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    for name in (*spoiled, "00008.tar", "00009.tar"):
        assert f"problem: {name}: " in said
    assert "._00000.tar" not in said
    listed = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {e["shard"]: e["reason"] for e in listed} == {
        "00001.tar": "not_a_tar",
        "00002.tar": "not_a_tar",
        "00003.tar": "not_a_tar",
        "00004.tar": "truncated",
        "00005__incomplete.tar": "truncated",
        "00006.tar.gz": "compressed",
        "00007.tar": "empty",
        "00008.tar": "unreadable",
        "00009.tar": "unreadable",
    }
    half = [f"{i:05d}" for i in range(6)][: len(keys(tmp_path)) - 9]
    assert keys(tmp_path) == [f"{i:05d}" for i in range(6)] + half + ["00000", "00006", "00007"]


def test_a_spoiled_parquet_ends_no_other(tmp_path: Path) -> None:
    """Its fields count as missing, and it is named; the other tars are filtered by theirs."""
    for t in range(4):
        numbers = range(4 * t, 4 * t + 4)
        pack(tmp_path / f"{t}.tar", pairs(numbers))
        table = pyarrow.table({"key": [f"{i:05d}" for i in numbers], "score": [i % 4 for i in numbers]})
        pyarrow.parquet.write_table(table, tmp_path / f"{t}.parquet")
    (tmp_path / "1.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-9])
    pyarrow.parquet.write_table(pyarrow.table({"url": ["a"], "score": [3]}), tmp_path / "2.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"key": ["other"], "score": [3]}), tmp_path / "3.parquet")
    _, results = index(tmp_path, where="score >= 2")
    assert keys(tmp_path) == ["00002", "00003"]
    said = problems(results)
    assert "1.tar: " in said
    assert "not readable as parquet" in said
    assert "no column 'key'" in said
    assert "3.tar: the parquet beside it has none of its keys" in said


def test_json_that_nobody_can_read_ends_nothing(tmp_path: Path) -> None:
    odd: dict[str, bytes] = {
        "cut": b'{"score": 1',
        "list": b"[1]",
        "latin": b'{"caption": "caf\xe9", "score": 9}',
        "deep": b"[" * 100_000,
        "digits": b'{"score": ' + b"9" * 5000 + b"}",
        "words": b'{"score": "many"}',
        "null": b'{"score": null}',
        "empty": b"",
    }
    members = scored(range(2))
    for name, data in odd.items():
        members += [(f"{name}.png", png((1, 2, 3))), (f"{name}.json", data)]
    pack(tmp_path / "0.tar", members)
    pack(tmp_path / "1.tar", scored(range(2, 4)))
    index(tmp_path, where="max(score, 0) >= 1 and len(caption) > 0")
    assert keys(tmp_path) == ["00001", "00002", "00003"]
    index(tmp_path)
    samples = Samples(Manifest.read(tmp_path), "train", size=8)
    found: dict[str, BadSample | None] = {samples.key(i): samples.touch(i) for i in range(len(samples))}
    assert [k for k, v in found.items() if v is None] == ["00000", "00001", "00002", "00003"]


def test_samples_without_any_picture_are_an_error(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", [("a.txt", b"a"), ("b.input.jpg", png((1, 2, 3)))])
    with pytest.raises(ValueError, match="none of the 2 samples in 1 tars has a picture"):
        index(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    pack(tmp_path / "1.tar", pairs(range(1)))
    _, results = index(tmp_path)
    assert "0.tar: 2 samples without a picture" in problems(results)
    with pytest.raises(ValueError, match="no usable sample in 2 tars"):
        index(tmp_path, where="width > 5")


def test_a_set_of_which_no_sample_can_be_used_is_no_success(tmp_path: Path) -> None:
    from ldm.data.inspection import inspect

    pack(tmp_path / "set" / "0.tar", [("a.png", b"broken"), ("a.txt", b"a"), ("b.png", b""), ("b.txt", b"b")])
    manifest, _ = index(tmp_path / "set")
    with pytest.raises(ValueError, match=r"none of 2 samples can be used: 1 \w+, 1 \w+"):
        inspect(manifest, tmp_path / "look")
    assert (tmp_path / "look" / "index.html").is_file()


def test_tars_that_went_away_are_named(tmp_path: Path) -> None:
    for t in range(2):
        pack(tmp_path / f"{t}.tar", pairs(range(3 * t, 3 * t + 3)))
    index(tmp_path)
    (tmp_path / "1.tar").unlink()
    _, results = index(tmp_path)
    assert "1.tar: in the earlier manifest, not here any more" in problems(results)
    assert keys(tmp_path) == ["00000", "00001", "00002"]


def test_a_build_s_list_of_pictures_stays(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", pairs(range(2)))
    (tmp_path / "1.tar").write_bytes(b"")
    mine = '{"name": "a.jpg", "key": "a", "reason": "damaged", "error": "x"}'
    (tmp_path / "quarantine.jsonl").write_text(mine + "\n")
    for _ in range(2):
        assert main(["index", str(tmp_path), "--workers", "1"]) == 0
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert lines[0] == mine
    assert [json.loads(line)["shard"] for line in lines[1:]] == ["1.tar"]


def test_keys_of_several_tars(tmp_path: Path) -> None:
    for t in range(3):
        pack(tmp_path / f"{t}.tar", pairs(range(2 * t, 2 * t + 3)))
    _, results = index(tmp_path)
    said = indexing.repeated(results)
    assert said is not None
    assert said.startswith("2 keys come in more than one tar (as in ")
    assert len(keys(tmp_path)) == 9


def test_a_process_that_dies_is_one_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for t in range(4):
        pack(tmp_path / f"{t}.tar", pairs(range(2 * t, 2 * t + 2)))
    monkeypatch.setattr(indexing, "_index_one", dies)
    _, results = index(tmp_path, workers=2)
    assert problems(results) == "2.tar: the process that read it died"
    assert keys(tmp_path) == ["00000", "00001", "00002", "00003", "00006", "00007"]


ours = indexing._index_one


def dies(job: indexing._Job) -> indexing.Indexed:
    if job.tar.name == "2.tar":
        os._exit(1)
    return ours(job)


def test_manifest_and_indexes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tars lie where they are; nothing is written there."""
    tars, out = tmp_path / "tars", tmp_path / "out"
    pack(tars / "a" / "0.tar", scored(range(6)))
    pack(tars / "b" / "0.tar", scored(range(6, 12)))
    before = sorted(tars.rglob("*"))
    assert main(["index", str(tars), "--out", str(out), "--where", "score > 2", "--workers", "1"]) == 0
    assert sorted(tars.rglob("*")) == before
    assert keys(out) == [f"{i:05d}" for i in range(3, 12)]
    monkeypatch.chdir(tmp_path)
    assert main(["index", "tars", "--out", "other", "--workers", "1"]) == 0
    monkeypatch.chdir("/")
    assert len(keys(tmp_path / "other")) == 12
    assert len(Loader(DataConfig(path=str(out), size=8), seed=0, micro_batch=9).batch(0, 0)["key"]) == 9


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    pack(tmp_path / "tars" / "0.tar", pairs(range(3)))
    (tmp_path / "ro").mkdir()
    steps = (["--bind", str(tmp_path / "tars"), str(tmp_path / "ro")], ["-o", "remount,ro,bind", str(tmp_path / "ro")])
    if any(subprocess.run(["mount", *s], capture_output=True).returncode for s in steps):
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ValueError, match=r"cannot be written \(Read-only file system\): `--out FOLDER`"):
            index(tmp_path / "ro")
        index(tmp_path / "ro", out=tmp_path / "out")
        assert keys(tmp_path / "out") == ["00000", "00001", "00002"]
    finally:
        subprocess.run(["umount", str(tmp_path / "ro")], check=True)


def test_a_full_disk_is_no_fault_of_a_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pack(tmp_path / "0.tar", pairs(range(3)))
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        index(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name != "0.tar"]


@pytest.fixture
def far(tmp_path: Path) -> Any:
    """Tars at an address, one of them spoiled."""
    system = fsspec.filesystem("memory")
    for name, numbers in (("a/0.tar", range(6)), ("b/0.tar", range(6, 12))):
        system.pipe_file(f"/bucket/set/{name}", pack(tmp_path / "x.tar", scored(numbers)).read_bytes())
    system.pipe_file("/bucket/set/b/1.tar", b"<html>")
    yield "memory://bucket/set"
    system.rm("/bucket", recursive=True)


def test_addresses(far: str, tmp_path: Path) -> None:
    """Read once where they are; manifest and indexes are here, and are trained from."""
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="an address is read only: `--out FOLDER`"):
        index(far)
    manifest, results = index(far, out=out, where="score >= 3")
    assert "b/1.tar: not a plain tar: a page" in problems(results)
    assert [s.file for s in manifest.shards] == [f"{far}/a/0.tar", f"{far}/b/0.tar"]
    assert keys(out) == [f"{i:05d}" for i in range(3, 12)]
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert written == ["a/0.index", "b/0.index", "manifest.json"]
    batch = Loader(DataConfig(path=str(out), size=8), seed=0, micro_batch=9).batch(0, 0)
    assert sorted(batch["key"]) == [f"{i:05d}" for i in range(3, 12)]
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"key": ["00001"], "similarity": [0.5]}), table)
    fsspec.filesystem("memory").pipe_file("/bucket/set/a/0.parquet", table.getvalue())
    index(far, out=tmp_path / "table", where="similarity > 0.3")
    assert keys(tmp_path / "table") == ["00001"]
    index(far + "/{a,b}/0.tar", out=tmp_path / "braces")
    assert len(keys(tmp_path / "braces")) == 12
    index(far + "/a/0.tar", out=tmp_path / "one")
    assert len(keys(tmp_path / "one")) == 6
    with pytest.raises(ValueError, match=r"no \.tar in it; .* give the names: memory://bucket/none/\{00000\.\.00099\}"):
        index("memory://bucket/none", out=tmp_path / "none")


class Listing(SimpleHTTPRequestHandler):
    """A folder as a plain web server lists it."""

    def log_message(self, *_: object) -> None:
        pass


def test_a_web_server_that_lists_its_folders(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    pack(tmp_path / "www" / "set" / "00000.tar", scored(range(4)))
    pack(tmp_path / "www" / "set" / "00001 (b).tar", scored(range(4, 8)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Listing, directory=str(tmp_path / "www")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/set"
        manifest, _ = index(f"{address}/", out=tmp_path / "out", where="score > 1")
        assert manifest.samples() == 6
        assert [Path(s.file).name for s in manifest.shards] == ["00000.tar", "00001%20%28b%29.tar"]
        with pytest.raises(ValueError, match=r"no \.tar in it; .*\{00000\.\.00099\}"):
            index(f"{address}/nowhere", out=tmp_path / "none")
    finally:
        server.shutdown()
        server.server_close()


def sized(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_counts_of_buckets_leave_out_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members: list[Member] = []
    for i in range(12):
        shape = (128, 64) if i % 2 else (64, 64)
        record = json.dumps({"caption": "c", "score": i}).encode()
        members += [(f"{i:05d}.png", sized(*shape) if i != 3 else b"broken"), (f"{i:05d}.json", record)]
    pack(tmp_path / "0.tar", members)
    config = BucketConfig(size=64, step=32, ratio=4, least=1)
    manifest, _ = index(tmp_path, buckets=config, where="score < 8")
    counts = {b: e["pictures"] for b, e in manifest.notes["buckets"].items()}
    assert sum(counts.values()) == manifest.samples() == 7
    assert sorted(counts.values()) == [3, 4]
    assert main(["inspect", str(tmp_path), "--out", str(tmp_path / "look")]) == 0
    said = capsys.readouterr().out
    for bucket, count in counts.items():
        assert f"bucket {bucket}: {count} pictures" in said
    _, results = index(tmp_path, buckets=config)
    assert "1 samples whose picture has no size are left out" in problems(results)
    assert sum(r.left_out for r in results) == 0


def test_indexing_a_bucketed_build_again_counts_anew(tmp_path: Path) -> None:
    from ldm.data.build import BuildConfig, build

    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(8):
        (root / f"{i}.png").write_bytes(sized(128 + i, 64) if i % 2 else sized(64 + i, 64))
        (root / f"{i}.txt").write_text("c")
    built = build(
        root, tmp_path / "set", BuildConfig(buckets=BucketConfig(size=64, step=32, ratio=4, least=1))
    ).manifest
    again, _ = index(tmp_path / "set", where="original_width < 70 or original_width > 132")
    assert sum(e["pictures"] for e in again.notes["buckets"].values()) == again.samples() < built.samples()
    assert "where" in again.notes
    assert "where" not in index(tmp_path / "set")[0].notes


def test_names_with_bytes_that_are_no_utf8_are_printed_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the way through reports, pages and json nothing stops at them."""
    odd = pack(tmp_path / "set" / "0.tar", [("caf\u00e9.png", b"broken"), *pairs(range(2))], encoding="latin-1")
    shutil.copy(odd, os.fsencode(tmp_path / "set") + b"/\xe9.tar")
    (tmp_path / "set" / "1.tar").write_bytes(b"")
    assert main(["index", str(tmp_path / "set"), "--workers", "1"]) == 0
    assert main(["inspect", str(tmp_path / "set"), "--out", str(tmp_path / "look")]) == 0
    capsys.readouterr().out.encode()
    assert "caf\\udce9" in (tmp_path / "look" / "index.html").read_text(encoding="utf-8")
    listed = tmp_path / "quarantine.jsonl"
    config = DataConfig(path=str(tmp_path / "set"), size=8, quarantine=str(listed))
    loader = Loader(config, seed=0, micro_batch=6)
    assert len(loader.batch(0, 0)["key"]) == 6
    assert {json.loads(line)["key"] for line in listed.read_text(encoding="utf-8").splitlines()} == {"caf\udce9"}
