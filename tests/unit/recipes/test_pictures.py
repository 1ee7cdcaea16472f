"""Folders and built sets as fine-tuning, the prior and the judges take them: counted as `ldm data build` counts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.cli.finetune import parser, tree
from ldm.config.load import decode
from ldm.config.schema import RunConfig
from ldm.data.buckets import BucketConfig
from ldm.data.build import BuildConfig, build
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.evaluate import measure
from ldm.pipeline import Settings
from ldm.recipes import pictures, prior
from ldm.recipes.finetune import FinetuneTask
from ldm.recipes.prior import Prior
from tests import miniature
from tests.unit.recipes.drawing import Fake

COLORS = ("red", "green", "blue", "white")


def folder(root: Path, **named: str | None) -> Path:
    """Pictures by their path ("/" as "__"), all different, with captions beside those that have any."""
    for i, (name, caption) in enumerate(named.items()):
        path = root / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(miniature.picture(COLORS[i % 4], miniature.SHAPES[i // 4 % 4]))
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)
    return root


def counts(data: Path) -> set[tuple[int, int]]:
    """(repeats, samples) of the shards."""
    return {(s.repeats, s.samples) for s in Manifest.read(data).shards}


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    root = folder(tmp_path / "in", **{"3_red ball__a": None, "3_red ball__b": "x", "1_blue__c": None, "plain__d": "y"})
    return folder(root, **{"0_off__e": "z"})


@pytest.mark.parametrize("captions", [None, ["a sks ball"]])
def test_repeats_of_folders_are_those_of_a_build(kohya: Path, captions: list[str] | None, tmp_path: Path) -> None:
    build(kohya, tmp_path / "built", BuildConfig())
    pictures.prepare(kohya, tmp_path / "run", captions, 16)
    assert counts(tmp_path / "run") == counts(tmp_path / "built") == {(1, 2), (3, 2)}
    loader = Loader(DataConfig(path=str(tmp_path / "run"), size=16), seed=0, micro_batch=2)
    assert loader.steps_per_epoch == (2 + 3 * 2) // 2
    texts = [c for step in range(4) for c in loader.batch(step, 0)["caption"]]
    expected = ["a sks ball"] * 8 if captions else sorted(["red ball"] * 3 + ["x"] * 3 + ["blue", "y"])
    assert sorted(texts) == expected


def test_repeats_are_said_and_part_of_what_a_run_folder_holds(kohya: Path, tmp_path: Path, capsys: Any) -> None:
    pictures.prepare(kohya, tmp_path / "run", ["a ball"], 16)
    said = "".join(capsys.readouterr())
    assert "2 pictures come 3 times an epoch" in said
    assert "0_off/e.png: left out, no_repeats" in said
    assert "4 of 5 pictures are used; left out: 1 no_repeats" in said
    (kohya / "3_red ball").rename(kohya / "2_red ball")
    with pytest.raises(ValueError, match="holds other pictures or captions"):
        pictures.prepare(kohya, tmp_path / "run", ["a ball"], 16)


def test_pictures_without_a_caption_are_left_out_by_name(tmp_path: Path, capsys: Any) -> None:
    root = folder(tmp_path / "in", a="red", b=None, c="blue", d="", e="green")
    (root / "c.txt").write_bytes(b"caf\xe9")
    (root / "f.heic").write_bytes(b"x")
    pictures.prepare(root, tmp_path / "run", None, 16)
    said = "".join(capsys.readouterr())
    assert "b.png: left out, no_caption: b.png has no caption; write one into b.txt" in said
    assert "c.png: left out, not_utf8: c.txt: byte 0xe9" in said
    assert "f.heic: left out, unsupported: HEIC" in said
    assert "2 of 6 pictures are used; left out: 2 no_caption, 1 not_utf8, 1 unsupported" in said
    report = build(root, tmp_path / "built", BuildConfig())
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    ours = {(e["name"], e["reason"]) for e in map(json.loads, lines)}
    assert ours == {(e["name"], e["reason"]) for e in report.bad}
    pictures.prepare(root, tmp_path / "run", None, 16)  # again, as on resume
    with pytest.raises(ValueError, match=r"none of the pictures can be used: b\.png: left out, no_caption"):
        pictures.prepare(folder(tmp_path / "none", b=None), tmp_path / "x", None, 16)


def test_texts_are_not_opened_where_captions_are_given(tmp_path: Path) -> None:
    """DreamBooth, inversion and class pictures caption them all alike: nothing beside them matters."""
    root = folder(tmp_path / "in", a="red", b="blue", c="green")
    (root / "a.txt").write_bytes(b"caf\xe9")
    (root / "b.txt").unlink()
    (root / "b.txt").mkdir()
    (root / "metadata.csv").write_bytes(b"no,table\n\xff,\x00\n")
    found = pictures.check(root, 16)
    assert found.names == ("a.png", "b.png", "c.png")
    assert found.bad == ()
    assert found.remarks == ()


def test_animations_are_said(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (c, 0, 0)) for c in (250, 10)]
    frames[0].save(folder(tmp_path / "in", a=None) / "b.gif", save_all=True, append_images=frames[1:])
    assert "b.gif: the first of 2 frames or pages" in pictures.check(tmp_path / "in", 8).remarks
    assert len(pictures.first(tmp_path / "in", 16)) == 2


@pytest.fixture
def built(tmp_path: Path) -> Path:
    root = folder(tmp_path / "in", **{"2_x__a": "red\nalso red", "2_x__b": "green", "1_y__c": "blue"})
    build(root, tmp_path / "set", BuildConfig())
    return tmp_path / "set"


def test_a_built_set_is_a_folder_of_pictures(built: Path, tmp_path: Path) -> None:
    of_folder, of_set = pictures.check(tmp_path / "in", 16, own=True), pictures.check(built, 16, own=True)
    by_caption = lambda found: sorted(zip(found.captions, found.repeats, [p.tobytes() for p in found.pictures]))  # noqa: E731
    assert by_caption(of_set) == by_caption(of_folder)
    pictures.prepare(built, tmp_path / "run", ["a sks thing"], 16)
    assert counts(tmp_path / "run") == {(1, 1), (2, 2)}
    assert measure.folder_pictures(built).shape == (3, 3, 16, 16)
    (tmp_path / "in" / "manifest.json").write_text('{"name": "a web app"}')  # another program's
    assert not pictures.is_set(tmp_path / "in")
    assert len(pictures.check(tmp_path / "in", 16).names) == 3


def test_the_command_trains_on_a_built_set_where_it_lies(built: Path, tmp_path: Path) -> None:
    argv = ["lora", "--size", "64", "--prompt", "a tree", "--images"]
    config = decode(RunConfig, tree(parser().parse_args([*argv, str(built)])))
    assert isinstance(config.task, FinetuneTask)
    assert isinstance(config.data, DataConfig)
    assert config.task.images is None
    assert (config.data.path, config.data.split, config.data.buckets) == (str(built), "train", False)
    shaped = BuildConfig(buckets=BucketConfig(size=64, step=32, least=1), heldout=0.0)
    build(tmp_path / "in", tmp_path / "shaped", shaped)
    config = decode(RunConfig, tree(parser().parse_args([*argv, str(tmp_path / "shaped")])))
    assert isinstance(config.data, DataConfig)
    assert config.data.buckets
    config = decode(RunConfig, tree(parser().parse_args([*argv, str(tmp_path / "in")])))
    assert isinstance(config.task, FinetuneTask)
    assert config.task.images == tmp_path / "in"


def test_a_cache_is_no_set_of_pictures(built: Path) -> None:
    told = json.loads((built / "manifest.json").read_text())
    (built / "manifest.json").write_text(json.dumps({**told, "cached": {"size": 16}}))
    with pytest.raises(ValueError, match="holds cached latents; name the data set it was made from"):
        pictures.check(built, 16)
    with pytest.raises(ValueError, match="holds cached latents"):
        tree(parser().parse_args(["lora", "--images", str(built), "--size", "64"]))


def made(own: Path, count: int) -> list[int]:
    fake = Fake()
    prior.make(Prior(count=count, settings=Settings(batch=3)), "a dog", own, "base", fake)  # type: ignore[arg-type]
    return fake.drawn


def test_the_prior_counts_what_a_build_finds_and_can_read(tmp_path: Path) -> None:
    own = folder(tmp_path / "class", mine=None, sub__also=None, **{"2_dog__third": None})
    for name in ("._mine.png", ".x.png", "Thumbs.db"):
        (own / name).write_bytes(b"\0\5\x16\7")
    (own / "broken.png").write_bytes(b"no picture")
    (own / "phone.HEIC").write_bytes(b"x")
    (own / "mine.txt").write_bytes(b"\xff")
    assert made(own, 6) == [0, 1, 2]
    assert made(own, 6) == []
    (own / "class-00001.png").write_bytes((own / "class-00001.png").read_bytes()[:50])  # a full disk
    assert made(own, 6) == [1]
    assert len(pictures.check(own, 4).names) == 6


def test_the_prior_takes_a_built_set_as_it_is(built: Path, capsys: Any) -> None:
    before = sorted(p.name for p in built.iterdir())
    assert made(built, 100) == []
    assert "class pictures: the 3 of" in "".join(capsys.readouterr())
    assert sorted(p.name for p in built.iterdir()) == before


def test_the_judge_sees_what_training_sees_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    """A figure of the pictures that are left would be of another set."""
    root = folder(tmp_path / "in", a=None, b=None)
    (root / "._a.png").write_bytes(b"x")
    exif = Image.Exif()
    exif[0x0112] = 6
    half = Image.new("RGB", (16, 16))
    half.paste((255, 255, 255), (0, 0, 16, 8))
    half.save(root / "d.png", exif=exif)
    shown = measure.folder_pictures(root)
    assert shown.shape == (3, 3, 16, 16)
    assert np.array_equal(shown[2, 0].numpy() > 0, np.rot90(np.asarray(half.convert("L")) > 0, -1))
    (root / "c.png").write_bytes((root / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"c\.png: damaged.*remove or mend it"):
        measure.folder_pictures(root)
