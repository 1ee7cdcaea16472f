"""Instruction edits from a set's own fields: two pictures of one thing that differ in one field alone, and its name.

Of the shipped emoji these are another skin tone or gender of the same concept: "make the skin dark", "make it a woman".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data import decode
from ldm.data.captions import captions_of
from ldm.data.manifest import Manifest, json_line
from ldm.data.shards import Shards
from ldm.data.write import ShardWriter

ORIGINAL = "original"
"""The member that holds the picture before the edit."""


@dataclass(frozen=True)
class Change:
    """A field of samples' json that an edit changes, and what is said of it: templates with {} for the new value.

    `words` of a value are said instead of it: the first that the caption of the edited picture has, or else the last.
    """

    field: str
    templates: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]

    def said(self, value: str, caption: str) -> list[str]:
        """The instructions, the plain one first."""
        words = self.words.get(value, (value,))
        word = next((w for w in words if re.search(rf"\b{re.escape(w)}\b", caption)), words[-1])
        return [template.format(word) for template in self.templates]


EMOJI = (
    Change("tone", ("make the skin {}", "change the skin tone to {}", "give it {} skin"), {"": ("yellow",)}),
    Change(
        "gender",
        ("make it a {}", "turn it into a {}", "change it to a {}"),
        {"": ("child", "person"), "man": ("boy", "man"), "woman": ("girl", "woman")},
    ),
)
SAME = ("concept", "profession")


@dataclass(frozen=True)
class _Sample:
    key: str
    fields: dict[str, Any]
    caption: str
    split: str
    place: tuple[Shards, int]

    def picture(self) -> tuple[str, bytes]:
        members = self.place[0].read(self.place[1], only=decode.IMAGES)[1]
        return next((suffix, members[suffix]) for suffix in decode.IMAGES if suffix in members)


def write_edits(
    source: Manifest,
    out: Path,
    *,
    changes: Sequence[Change] = EMOJI,
    same: Sequence[str] = SAME,
    also: Mapping[str, tuple[str, ...]] | None = None,
) -> Manifest:
    """Write a set of edits into `out`: the edited picture, `original.*`, and instructions as captions.

    A sample's json has `edit` (the field), `from`, `to`, `original_key`, `edited_key` and the two captions. Each split
    has the edits whose edited picture it holds, of originals of the split itself and of those that `also` names
    (compositional: also of train's). Pictures that are not told apart by their fields are left out. Raises ValueError
    if `out` holds a data set, or if there are no edits.
    """
    if (out / "manifest.json").exists():
        raise ValueError(f"out {str(out)!r} holds a data set already; choose another folder or remove it")
    also = {"compositional": ("train",)} if also is None else also
    samples = [s for split in source.splits for s in _samples(source, split)]
    fields = [change.field for change in changes]
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[_Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        thing = tuple(sample.fields.get(name) for name in same)
        groups[thing][tuple(sample.fields.get(name) for name in fields)].append(sample)
    shards, count = [], 0
    for split in source.splits:
        from_splits = {split, *also.get(split, ())}
        with ShardWriter(out, split, split=split) as writer:
            for edited in samples:
                if edited.split != split:
                    continue
                group = groups[tuple(edited.fields.get(name) for name in same)]
                for change, original in _originals(edited, group, changes):
                    if original.split in from_splits:
                        writer.add(f"{original.key}_to_{edited.key}", _members(change, original, edited))
                        count += 1
        shards += writer.shards
    if not count:
        raise ValueError(f"data {source.name!r}: no two pictures differ in one of {fields} alone")
    notes = {k: v for k, v in source.notes.items() if k != "buckets"}
    manifest = Manifest(name=f"{source.name}-edits", shards=tuple(shards), folder=out, notes=notes)
    manifest.write()
    return manifest


def _samples(source: Manifest, split: str) -> Iterator[_Sample]:
    shards = Shards(source, split)
    for i in range(len(shards)):
        key, members = shards.read(i, without=decode.IMAGES)
        captions, fields = captions_of(members, required=False)
        yield _Sample(key, fields, captions.texts[0], split, (shards, i))


def _originals(
    edited: _Sample, group: Mapping[tuple[Any, ...], list[_Sample]], changes: Sequence[Change]
) -> Iterator[tuple[Change, _Sample]]:
    """What an edited picture may have been, each with the one field that is another."""
    here = tuple(edited.fields.get(change.field) for change in changes)
    if len(group[here]) > 1:
        return
    for there, found in group.items():
        differ = [change for change, a, b in zip(changes, here, there, strict=True) if a != b]
        if len(differ) == 1 and len(found) == 1:
            yield differ[0], found[0]


def _members(change: Change, original: _Sample, edited: _Sample) -> dict[str, bytes]:
    value = edited.fields.get(change.field)
    said = change.said(str(value or ""), edited.caption)
    record = {
        "captions": [[text, 2 if i == 0 else 1] for i, text in enumerate(said)],
        "edit": change.field,
        "from": original.fields.get(change.field),
        "to": value,
        "original_key": original.key,
        "edited_key": edited.key,
        "original_caption": original.caption,
        "edited_caption": edited.caption,
    }
    (after, picture), (before, first) = edited.picture(), original.picture()
    return {after: picture, f"{ORIGINAL}.{before}": first, "json": json_line(record).encode()}
