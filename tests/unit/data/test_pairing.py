"""Partners found where published sets and people have them; what lacks one, or is one of nothing, is reported."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli.__main__ import main
from ldm.data.buckets import BucketConfig
from ldm.data.build import BuildConfig, build
from ldm.data.loader import DataConfig, Loader
from ldm.data.pairs import Picture, Small, Stored, StoredMask
from ldm.data.shards import Shards
from tests.unit.data.paired import hole, noise, png_of


def put(folder: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else png_of(value)
        )
    return folder


def made(source: Path, out: Path, **told: Any) -> tuple[dict[str, dict[str, bytes]], list[tuple[str, str]]]:
    """What became of each picture: members by key, and (key, reason) of the bad."""
    report = build(source, out, BuildConfig(**({"require_captions": False} | told)))
    members = dict(Shards(report.manifest, "all"))
    return members, [(b["name"], b["reason"]) for b in report.bad]


def kinds(members: dict[str, dict[str, bytes]]) -> dict[str, list[str]]:
    return {key: sorted(m for m in found if m not in ("json", "txt")) for key, found in sorted(members.items())}


@pytest.mark.parametrize(
    ("place", "where"),
    [
        ("{}.condition.png", None),
        ("{}_condition.png", None),
        ("{}-edges.png", "-edges"),
        ("{}.CONDITION.PNG", None),
        ("conditioning_images/{}.png", None),
        ("condition/{}.png", None),
        ("lines/{}.png", "lines/"),
    ],
)
def test_partners_by_suffix_and_folder(tmp_path: Path, place: str, where: str | None) -> None:
    """With captions beside the pictures; bytes are kept."""
    files: dict[str, Any] = {}
    for i in range(3):
        files |= {f"photo{i}.png": noise(i), f"photo{i}.txt": f"photo {i}", place.format(f"photo{i}"): noise(50 + i)}
    found, bad = made(put(tmp_path / "in", files), tmp_path / "out", pairs={"condition": where}, require_captions=True)
    assert bad == []
    assert kinds(found) == {f"photo{i}": ["condition.png", "png"] for i in range(3)}
    for i in range(3):
        assert found[f"photo{i}"]["condition.png"] == png_of(noise(50 + i))
        assert found[f"photo{i}"]["png"] == png_of(noise(i))
        assert found[f"photo{i}"]["txt"] == f"photo {i}".encode()


def test_folders_side_by_side_and_below(tmp_path: Path) -> None:
    files = {"images/a/0.png": noise(0), "conditioning_images/a/0.png": noise(1), "images/1.png": noise(2)}
    files |= {
        "conditioning_images/1.png": noise(3),
        "b/2.png": noise(4),
        "b/masks/2.png": hole(),
        "masks/a/0.png": hole(),
    }
    folder = put(tmp_path / "in", files | {"masks/1.png": hole(), "conditioning_images/b/2.png": noise(5)})
    found, bad = made(folder, tmp_path / "out", pairs={"condition": None, "mask": None})
    assert bad == []
    assert kinds(found) == {k: ["condition.png", "mask.png", "png"] for k in ("images/a/0", "images/1", "b/2")}


def test_nothing_without_a_partner_or_a_picture_is_passed_over(tmp_path: Path) -> None:
    files = {"a.png": noise(0), "a.condition.png": noise(1), "b.png": noise(2), "c.condition.png": noise(3)}
    files |= {"d.png": noise(4), "d.condition.png": noise(5), "d_condition.png": noise(6)}
    report = build(
        put(tmp_path / "in", files), tmp_path / "out", BuildConfig(pairs={"condition": None}, require_captions=False)
    )
    assert report.written == 1
    told = {b["name"]: (b["reason"], b["error"]) for b in report.bad}
    assert told == {
        "b.png": (
            "no_partner",
            "no condition; looked for NAME.condition.*, NAME_condition.*; folders condition, conditions, "
            "conditioning_images, condition_images, control_images, conditioning, control; columns conditioning_image, "
            "condition, condition_image, control_image, control, source",
        ),
        "c.condition.png": ("no_partner", "a condition by its name, of no picture"),
        "d.png": ("no_partner", "2 files for condition: d.condition.png, d_condition.png; one is wanted"),
    }
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert {json.loads(line)["name"] for line in lines} == set(told)


def test_without_pairs_every_picture_is_a_sample_as_before(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", {"a.png": noise(0), "a.condition.png": noise(1)})
    found, _ = made(folder, tmp_path / "out")
    assert kinds(found) == {"a": ["png"], "a_condition": ["png"]}


FILL50K = '{{"text": "circle {i}", "image": "images/{i}.png", "conditioning_image": "conditioning_images/{i}.png"}}\n'
CONTROLNET = '{{"source": "source/{i}.png", "target": "target/{i}.png", "prompt": "circle {i}"}}\n'
HUGGING = (
    '{{"file_name": "images/{i}.png", "conditioning_image_file_name": "conditioning/{i}.png", "text": "circle {i}"}}\n'
)
PIX2PIX = '{{"original_image": "a/{i}.png", "edit_prompt": "circle {i}", "edited_image": "b/{i}.png", "n": {i}}}\n'
PIX2PIX_NAMES = (
    '{{"input_image_file_name": "a/{i}.png", "edit_prompt": "circle {i}", "edited_image_file_name": "b/{i}.png"}}\n'
)


@pytest.mark.parametrize(
    ("table", "line", "name", "picture", "partner"),
    [
        ("train.jsonl", FILL50K, "condition", "images", "conditioning_images"),
        ("prompt.jsonl", CONTROLNET, "condition", "target", "source"),
        ("metadata.jsonl", HUGGING, "condition", "images", "conditioning"),
        ("metadata.jsonl", PIX2PIX, "original", "b", "a"),
        ("metadata.jsonl", PIX2PIX_NAMES, "original", "b", "a"),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_partners_by_column(
    tmp_path: Path, table: str, line: str, name: str, picture: str, partner: str, whole: bool
) -> None:
    """As a table that is named, and where metadata.jsonl is found in its folder."""
    files: dict[str, Any] = {table: "".join(line.format(i=i) for i in range(3))}
    for i in range(3):
        files |= {f"{picture}/{i}.png": noise(i), f"{partner}/{i}.png": noise(50 + i)}
    folder = put(tmp_path / "in", files)
    if whole and table != "metadata.jsonl":
        return
    found, bad = made(folder if whole else folder / table, tmp_path / "out", pairs={name: None}, require_captions=True)
    assert bad == []
    assert sorted(found) == [f"{picture}/{i}" for i in range(3)]
    for i in range(3):
        members = found[f"{picture}/{i}"]
        assert members["png"] == png_of(noise(i))
        assert members[f"{name}.png"] == png_of(noise(50 + i))
        assert members["txt"] == f"circle {i}".encode()


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = "file_name,after,before,what\nx.png,b.png,a.png,make it blue\n"
    folder = put(tmp_path / "in", {"metadata.csv": rows, "a.png": noise(0), "b.png": noise(1)})
    told = {"pairs": {"original": "before"}, "image_column": "after", "caption_column": "what"}
    found, bad = made(folder / "metadata.csv", tmp_path / "out", require_captions=True, **told)
    assert bad == []
    assert found["b"]["original.png"] == png_of(noise(0))
    assert found["b"]["txt"] == b"make it blue"
    _, bad = _bad(folder / "metadata.csv", tmp_path / "other", **(told | {"image_column": "afterwards"}))
    assert "no afterwards; it has file_name, after, before, what" in bad


def _bad(source: Path, out: Path, **told: Any) -> tuple[str, str]:
    with pytest.raises(ValueError, match="can be used") as error:
        build(source, out, BuildConfig(**told))
    return str(error.value), (out / "quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"conditioning_image": "gone.png"}, "metadata.jsonl:1: conditioning_image: no such file"),
        ({"conditioning_image": "../a.png"}, "metadata.jsonl:1: conditioning_image: '../a.png' leaves the folder"),
        ({"conditioning_image": None}, "metadata.jsonl:1: conditioning_image is None, no file's name"),
        ({}, "no condition; looked for column conditioning_image"),
    ],
)
def test_a_row_without_its_partner(tmp_path: Path, row: dict[str, Any], line: str) -> None:
    files = {"metadata.jsonl": json.dumps({"file_name": "a.png", "text": "a", **row}), "a.png": noise(0)}
    said, listed = _bad(put(tmp_path / "in", files), tmp_path / "out", pairs={"condition": "conditioning_image"})
    assert line in listed
    assert "none of 1 pictures" in said


def test_pictures_inside_a_parquet_file(tmp_path: Path) -> None:
    """As `datasets` writes them: {bytes, path}, in several groups of rows; a row without a partner is listed."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cell = lambda i: {"bytes": png_of(noise(i)), "path": None}  # noqa: E731
    mask = {"bytes": png_of(hole()), "path": "m.png"}
    columns = {
        "img_id": pa.array([str(i) for i in range(5)]),
        "source_img": pa.array([None if i == 3 else cell(50 + i) for i in range(5)], image),
        "mask_img": pa.array([mask] * 5, image),
        "instruction": pa.array([f"edit {i}" for i in range(5)]),
        "target_img": pa.array([cell(i) for i in range(5)], image),
    }
    path = tmp_path / "train-00000.parquet"
    parquet.write_table(pa.table(columns), path, row_group_size=2)
    told = {"pairs": {"original": None, "mask": None}, "require_captions": True}
    found, bad = made(path, tmp_path / "out", **told)
    assert bad == [("train-00000-0000004", "missing")]
    assert sorted(found) == [f"train-00000-{i + 1:07d}" for i in (0, 1, 2, 4)]
    for i in (0, 1, 2, 4):
        members = found[f"train-00000-{i + 1:07d}"]
        assert members["png"] == png_of(noise(i))
        assert members["original.png"] == png_of(noise(50 + i))
        assert members["txt"] == f"edit {i}".encode()
        assert json.loads(members["json"])["img_id"] == str(i)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(members["mask.png"]))), hole())
    _, listed = _bad(path, tmp_path / "none", require_captions=False)
    assert (
        "no file_name; it has img_id, source_img, mask_img, instruction, target_img; pictures are inside it:" in listed
    )
    alone, _ = made(path, tmp_path / "alone", image_column="target_img")
    assert kinds(alone) == {f"train-00000-{i + 1:07d}": ["png"] for i in range(5)}


def test_shrinking_keeps_partners_in_place(tmp_path: Path) -> None:
    """Pictures of 64 x 48 to 12 on the short side; the mask's box stays where it is painted."""
    picture = np.zeros((48, 64, 3), np.uint8)
    mask = np.zeros((48, 64), np.uint8)
    mask[8:24, 12:40] = 255
    picture[mask > 0] = 255
    files = {"a.png": picture, "a_mask.png": mask, "a.condition.png": picture[::2, ::2], "a.original.png": picture}
    folder = put(tmp_path / "in", files)
    pairs = {"mask": None, "condition": None, "original": None}
    found, _ = made(folder, tmp_path / "out", pairs=pairs, size=12)
    shown = {
        m: np.asarray(Image.open(io.BytesIO(found["a"][m]))) for m in ("mask.png", "original.png", "condition.png")
    }
    assert {m: v.shape for m, v in shown.items()} == {
        "mask.png": (12, 16), "original.png": (12, 16, 3), "condition.png": (12, 16, 3)
    }  # fmt: skip
    expected = mask[2::4, 2::4]
    assert np.array_equal(shown["mask.png"], expected)
    assert np.abs(shown["original.png"][:, :, 0].astype(int) - expected).mean() < 16
    data = DataConfig(
        path=str(tmp_path / "out"), size=8, crop="random", require_captions=False,
        pairs={"inpaint_mask": StoredMask(), "original": Stored()},
    )  # fmt: skip
    batch = Loader(data, seed=1, micro_batch=1).batch(0, 0)
    assert ((batch["image"] + 1) / 2 - batch["original"]).abs().max() < 0.02


@pytest.mark.parametrize(
    ("files", "reason", "line"),
    [
        ({"a_mask.png": np.zeros((12, 16), np.uint8)}, "flat_mask", "mask is all black: nothing would be painted"),
        ({"a_mask.png": noise(3)}, "no_mask", "mask is a picture in colour, no mask"),
        ({"a_mask.png": hole(12, 12)}, "partner_size", "mask is 12x12, its picture 16x12"),
        ({"a_mask.png": b"broken"}, "unknown_format", "mask: 6 bytes are no known picture format"),
    ],
)
def test_bad_partners_are_listed(tmp_path: Path, files: dict[str, Any], reason: str, line: str) -> None:
    folder = put(tmp_path / "in", {"a.png": noise(0), **files})
    said, listed = _bad(folder, tmp_path / "out", pairs={"mask": None}, require_captions=False)
    assert f"'{reason}': 1" in said
    assert line in listed


def test_masks_that_mark_by_transparency(tmp_path: Path) -> None:
    """MagicBrush's: the picture with the place of the edit erased."""
    erased = np.dstack([noise(0), 255 - hole()])
    folder = put(tmp_path / "in", {"a.png": noise(0), "a_mask.png": erased})
    found, _ = made(folder, tmp_path / "out", pairs={"mask": None}, masks="transparent")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found["a"]["mask.png"]))), hole())
    _, listed = _bad(folder, tmp_path / "white", pairs={"mask": None}, require_captions=False)
    assert "it is transparent in part: `ldm data build --masks transparent` takes that" in listed
    plain = put(tmp_path / "plain", {"a.png": noise(0), "a_mask.png": hole()})
    _, listed = _bad(plain, tmp_path / "none", pairs={"mask": None}, masks="transparent", require_captions=False)
    assert "mask has no transparency, which shall mark what is to be painted" in listed


def test_any_number_of_workers_gives_the_same_shards(tmp_path: Path) -> None:
    files: dict[str, Any] = {}
    for i in range(40):
        files |= {f"{i}.png": noise(i), f"{i}.condition.png": noise(50 + i)}
    folder = put(tmp_path / "in", files)
    one, three = (
        build(folder, tmp_path / str(n), BuildConfig(pairs={"condition": None}, require_captions=False, workers=n))
        for n in (1, 3)
    )
    assert one.written == 40
    assert one.manifest.shards == three.manifest.shards


def test_a_batch_of_a_bucket_has_partners_of_its_shape(tmp_path: Path) -> None:
    """Wide and tall pictures; the condition is the picture, the small one a quarter of the bucket's sides."""
    files: dict[str, Any] = {}
    for i in range(8):
        picture = noise(i, *((24, 48) if i % 2 else (48, 24)))
        files |= {f"{i}.png": picture, f"{i}.condition.png": picture}
    buckets = BucketConfig(size=16, step=4, least=1)
    told = BuildConfig(pairs={"condition": None}, require_captions=False, buckets=buckets, format="png")
    build(put(tmp_path / "in", files), tmp_path / "out", told)
    data = DataConfig(
        path=str(tmp_path / "out"), buckets=True, crop="random", flip=True, require_captions=False,
        pairs={"condition": Stored(), "small": Small(factor=4), "reference": Picture(size=5)},
    )  # fmt: skip
    shapes = set()
    for batch in itertools.islice(Loader(data, seed=1, micro_batch=2).batches(), 8):
        torch.testing.assert_close(batch["condition"], (batch["image"] + 1) / 2, rtol=0, atol=0.02)
        height, width = batch["image"].shape[2:]
        assert batch["small"].shape == (2, 3, height // 4, width // 4)
        assert batch["reference"].shape == (2, 3, 5, 5)
        shapes.add((height, width))
    assert len(shapes) == 2


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a.png": noise(0), "a.condition.png": noise(1), "b.png": noise(2), "a.txt": "an a", "b.txt": "a b"}
    folder = put(tmp_path / "in", files)
    assert main(["data", "build", str(folder), str(tmp_path / "out"), "--pair", "condition", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "left out: b.png: no_partner: no condition; looked for NAME.condition.*" in said
    assert "1 of 2 pictures in 1 shards" in said
    for pair, line in (
        ("Edges", "pair 'Edges': expected a name of small letters"),
        ("condition=a/b", "pair condition=a/b: expected a suffix (.condition, _condition), a folder"),
    ):
        assert main(["data", "build", str(folder), str(tmp_path / "other"), "--pair", pair]) != 0
        assert line in capsys.readouterr().err


@pytest.mark.parametrize("form", ["lines", "list"])
def test_the_table_of_controlnets_authors(tmp_path: Path, form: str) -> None:
    """fill50k as it is unpacked: prompt.json with source, target and prompt, one object a line; also as a list."""
    rows = [
        {"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": f"circle {i} with grey background"}
        for i in range(3)
    ]
    told = "\n".join(map(json.dumps, rows)) + "\n" if form == "lines" else json.dumps(rows)
    files: dict[str, Any] = {"prompt.json": told}
    files |= {f"source/{i}.png": noise(50 + i) for i in range(3)} | {f"target/{i}.png": noise(i) for i in range(3)}
    folder = put(tmp_path / "fill50k", files)
    found, bad = made(folder, tmp_path / "out", pairs={"condition": None}, require_captions=True)
    assert bad == []
    assert kinds(found) == {f"target/{i}": ["condition.png", "png"] for i in range(3)}
    for i in range(3):
        assert found[f"target/{i}"]["condition.png"] == png_of(noise(50 + i))
        assert json.loads(found[f"target/{i}"]["json"])["captions"] == [[rows[i]["prompt"], 1.0]]
    again, bad = made(folder / "prompt.json", tmp_path / "file", pairs={"condition": None}, require_captions=True)
    assert again == found


def test_a_prompt_json_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """ComfyUI writes one too; without pairs it is no table."""
    folder = put(tmp_path / "in", {"prompt.json": "{}", "a.png": noise(0), "a.txt": "a"})
    found, bad = made(folder, tmp_path / "out", require_captions=True)
    assert list(found) == ["a"]
    assert bad == []


def test_masks_of_a_picture_are_its_opacity_or_in_a_folder_anywhere(tmp_path: Path) -> None:
    """`--pair loss_weight=alpha` and an absolute folder: greys as they are, opaque pictures white."""
    grey = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    (tmp_path / "in").mkdir()
    (tmp_path / "apart").mkdir()
    Image.merge("RGBA", (Image.new("L", (64, 48)),) * 3 + (Image.fromarray(grey),)).save(tmp_path / "in" / "a.png")
    Image.new("RGB", (64, 48)).save(tmp_path / "in" / "b.png")
    for name in "ab":
        Image.fromarray(grey).save(tmp_path / "apart" / f"{name}.png")
    told = {"loss_weight": "alpha", "other": f"{tmp_path / 'apart'}/"}
    members, bad = made(tmp_path / "in", tmp_path / "out", pairs=told)
    assert bad == []
    for key, found in members.items():
        greys = {n: np.asarray(Image.open(io.BytesIO(found[f"{n}.png"])).convert("L")) for n in told}
        assert np.array_equal(greys["other"], grey)
        assert np.array_equal(greys["loss_weight"], grey if key.startswith("a") else np.full_like(grey, 255))
