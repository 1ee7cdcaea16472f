"""Checkpoint folders: complete or absent, damage found and named, retention that keeps the last good one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.checkpoint import files


def put(root: Path, step: int, keep: int = 2, text: str = "weights") -> Path:
    beside = files.staging(root, step)
    beside.mkdir(parents=True)
    (beside / "a.bin").write_text(f"{text} {step}")
    return files.publish(root, step, {"a.bin": files.describe(beside / "a.bin")}, keep)


def test_published_folders_are_whole_and_the_newest_stay(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        folder = put(tmp_path, step, keep=3)
        assert folder == tmp_path / f"step-{step}"
        assert files.damage(folder) is None
        assert (tmp_path / "latest").read_text() == folder.name
    assert files.steps(tmp_path) == [5, 10, 20, 100]
    assert files.newest(tmp_path) == tmp_path / "step-100"
    put(tmp_path, 110, keep=2)
    assert files.steps(tmp_path) == [100, 110]
    put(tmp_path, 120, keep=0)
    assert files.steps(tmp_path) == [100, 110, 120]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "a.bin").unlink(), "a.bin: missing"),
        (lambda f: (f / "a.bin").write_text("weigh"), "5 bytes, expected"),
        (lambda f: (f / "a.bin").write_text("weightt 20"), "SHA-256"),
        (lambda f: (f / files.MANIFEST).unlink(), "manifest.json"),
        (lambda f: (f / files.MANIFEST).write_text('{"files": '), "manifest.json"),
        (lambda f: (f / files.MANIFEST).write_text("[]"), "manifest.json"),
    ],
)
def test_a_damaged_newest_is_named_and_skipped(tmp_path: Path, harm: object, said: str) -> None:
    put(tmp_path, 10)
    harm(put(tmp_path, 20))  # type: ignore[operator]
    with pytest.warns(UserWarning, match=r"step-20 is damaged") as caught:
        assert files.newest(tmp_path) == tmp_path / "step-10"
    assert said in str(caught[0].message)
    assert (tmp_path / "step-20").is_dir()


def test_all_damaged_or_none_there(tmp_path: Path) -> None:
    assert files.newest(tmp_path / "nothing") is None
    (put(tmp_path, 10) / "a.bin").unlink()
    with pytest.warns(UserWarning, match="damaged"):
        assert files.newest(tmp_path) is None


def test_a_damaged_later_one_does_not_count_as_kept(tmp_path: Path) -> None:
    """A run that went back behind a damaged checkpoint keeps what it saves, down to keep=1."""
    put(tmp_path, 10, keep=1)
    (put(tmp_path, 20, keep=2) / "a.bin").unlink()
    put(tmp_path, 12, keep=1)
    with pytest.warns(UserWarning, match="step-20"):
        assert files.newest(tmp_path) == tmp_path / "step-12"
    put(tmp_path, 20, keep=1, text="whole again")
    assert files.damage(tmp_path / "step-20") is None
    assert files.steps(tmp_path) == [20]


def test_what_a_dead_process_left_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    put(tmp_path, 10)
    half = files.staging(tmp_path, 15)
    half.mkdir()
    (half / "a.bin").write_text("wei")
    assert files.newest(tmp_path) == tmp_path / "step-10"
    put(tmp_path, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-10", "step-20"]


def test_write_text_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.json"
    files.write_text(path, json.dumps({"a": 1}))

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, json.dumps({"a": 2}))
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["note.json"]


def test_a_folder_and_a_file_are_replaced_by_whole_ones_alone(tmp_path: Path) -> None:
    """Where writing fails, the old one stays as it was, and nothing lies beside it."""
    folder, file = tmp_path / "model", tmp_path / "model.safetensors"
    for text in ("first", "second"):
        with files.whole_folder(folder) as beside, files.whole_file(file) as new:
            assert folder.exists() == file.exists() == (text == "second")
            (beside / text).write_text(text)
            new.write_text(text)

    def fail(place: Path) -> None:
        (place / "part" if place.is_dir() else place).write_text("half")
        raise OSError("the disk is full")

    for whole in (files.whole_folder(folder), files.whole_file(file)):
        with pytest.raises(OSError, match="the disk is full"), whole as beside:
            fail(beside)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["model", "model.safetensors"]
    assert [p.name for p in folder.iterdir()] == ["second"]
    assert file.read_text() == "second"
