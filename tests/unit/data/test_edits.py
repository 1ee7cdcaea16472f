"""Instruction edits of the emoji against their own fields, and of a small set counted by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.cli.__main__ import main
from ldm.config.load import decode
from ldm.data.edits import EMOJI, write_edits
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest, merge, resolve
from ldm.data.shards import Shards
from ldm.data.write import ShardWriter
from tests.unit.data.paired import noise, png_of


def small_set(folder: Path, rows: list[tuple[str, str, str, str, str]]) -> Manifest:
    """(split, key, concept, tone, gender) of each; its picture is noise of its number."""
    parts = []
    for split in sorted({row[0] for row in rows}):
        with ShardWriter(folder, split, split=split) as writer:
            for i, (own, key, concept, tone, gender) in enumerate(rows):
                if own == split:
                    record = {"captions": [f"{gender or 'person'} {concept}"], "concept": concept, "tone": tone}
                    told = json.dumps(record | {"gender": gender, "profession": ""}).encode()
                    writer.add(key, {"png": png_of(noise(i)), "json": told})
        parts.append(Manifest(name="small", shards=tuple(writer.shards), folder=folder))
    return merge(parts)


ROWS = [
    ("train", "a", "cook", "", ""),
    ("train", "b", "cook", "dark", ""),
    ("train", "c", "cook", "dark", "woman"),
    ("train", "d", "tree", "", ""),
    ("train", "e", "pair", "", ""),
    ("train", "f", "pair", "", ""),
    ("train", "g", "pair", "dark", ""),
    ("compositional", "h", "cook", "", "woman"),
]


def test_edits_of_a_small_set_by_hand(tmp_path: Path) -> None:
    """One field differs: a-b by tone, b-c by gender, h-c by tone, h-a by gender; e and f are not told apart."""
    manifest = write_edits(small_set(tmp_path / "set", ROWS), tmp_path / "out")
    found: dict[str, dict[str, Any]] = {}
    for split in manifest.splits:
        for key, members in Shards(manifest, split):
            found[f"{split} {key}"] = members
    assert sorted(found) == [
        "compositional a_to_h", "compositional c_to_h", "train a_to_b", "train b_to_a", "train b_to_c", "train c_to_b",
    ]  # fmt: skip
    told = {key.split()[1]: json.loads(members["json"]) for key, members in found.items()}
    assert told["a_to_b"]["captions"][0][0] == "make the skin dark"
    assert told["b_to_a"]["captions"][0][0] == "make the skin yellow"
    assert told["b_to_c"]["captions"][0][0] == "make it a woman"
    assert told["c_to_b"]["captions"][0][0] == "make it a person"
    assert told["a_to_h"] | {"captions": []} == {
        "captions": [], "edit": "gender", "from": "", "to": "woman", "original_key": "a", "edited_key": "h",
        "original_caption": "person cook", "edited_caption": "woman cook",
    }  # fmt: skip
    assert found["train a_to_b"]["png"] == png_of(noise(1))
    assert found["train a_to_b"]["original.png"] == png_of(noise(0))


def test_a_child_is_made_a_girl_not_a_woman() -> None:
    gender = EMOJI[1]
    assert gender.said("woman", "girl, dark skin tone")[0] == "make it a girl"
    assert gender.said("woman", "woman cook")[0] == "make it a woman"
    assert gender.said("", "child")[0] == "make it a child"
    assert gender.said("", "pregnant person")[0] == "make it a person"


def test_the_emojis_edits_change_what_they_say_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the fields of the two pictures; no edited picture of a held-out split is one of train's."""
    assert main(["data", "edits", "emoji", str(tmp_path / "edits")]) == 0
    assert "10923 edits (937 compositional, 408 heldout, 9578 train)" in capsys.readouterr().out
    source = Manifest.read(resolve("emoji"))
    fields, splits = {}, {}
    for split in source.splits:
        shards = Shards(source, split)
        for i in range(len(shards)):
            key, members = shards.read(i, only=("json",))
            fields[key], splits[key] = json.loads(members["json"]), split
    manifest = Manifest.read(tmp_path / "edits")
    for split in manifest.splits:
        edits = Shards(manifest, split)
        for i in range(0, len(edits), 5):
            told = json.loads(edits.read(i, only=("json",))[1]["json"])
            before, after = fields[told["original_key"]], fields[told["edited_key"]]
            differ = [n for n in ("concept", "profession", "tone", "gender") if before[n] != after[n]]
            assert differ == [told["edit"]]
            assert (before[told["edit"]], after[told["edit"]]) == (told["from"], told["to"])
            assert splits[told["edited_key"]] == split
            assert splits[told["original_key"]] in ({"train", split} if split == "compositional" else {split})
    with pytest.raises(ValueError, match="holds a data set already"):
        write_edits(source, tmp_path / "edits")
    pairs = {"original": {"kind": "stored"}}
    data = decode(DataConfig, {"path": str(tmp_path / "edits"), "size": 64, "flip": True, "pairs": pairs})
    batch = Loader(data, seed=0, micro_batch=8).batch(0, 0)
    assert batch["original"].shape == batch["image"].shape
    same = ((batch["image"] + 1) / 2 - batch["original"]).abs().mean((1, 2, 3))
    assert (same > 0.001).all()  # another picture
    assert same.mean() < 0.1  # of the same thing, flipped alike
    assert torch.equal(batch["original"].amax((1, 2, 3)), torch.ones(8))


def test_a_set_without_such_fields_is_named(tmp_path: Path) -> None:
    rows = [("train", "a", "cook", "", ""), ("train", "b", "tree", "dark", "")]
    with pytest.raises(ValueError, match=r"no two pictures differ in one of \['tone', 'gender'\] alone"):
        write_edits(small_set(tmp_path / "set", rows), tmp_path / "out")
