"""Makes the shards of this folder: `python ldm/assets/emoji/build.py FLUENT EMOJIBASE [OUT]`.

FLUENT is the unpacked npm package @lobehub/fluent-emoji-3d 1.1.0 (assets/*.webp, RGBA 256 px, named by code points),
EMOJIBASE the unpacked npm package emojibase-data 17.0.0 (en/data.json, meta/groups.json). The package never imports
this file; the same inputs and Pillow give the same bytes. Flags and components are left out.

A concept is an emoji without skin tone and gender; concepts whose pictures are near-duplicates, and the clock faces,
count as one when splitting. `heldout` takes one concept in twenty of every group; `compositional` one in ten of the
(concept, tone, gender) combinations of people in the remaining ones, as long as every (concept, tone), (concept,
gender) and (tone, gender) pair still occurs in `train`.

The package names most medium-light pictures as medium and the other way round (288 of 304 pairs; couples and
technologists are right): of such a pair the lighter picture is taken as medium-light.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data import decode
from ldm.data.manifest import Manifest
from ldm.data.write import ShardWriter

SIZE = 128
QUALITY = 85
TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")
TONE_CODES = {"1f3fb": 1, "1f3fc": 2, "1f3fd": 3, "1f3fe": 4, "1f3ff": 5}
TO_NEUTRAL = {
    "1f468": "1f9d1",
    "1f469": "1f9d1",
    "1f466": "1f9d2",
    "1f467": "1f9d2",
    "1f474": "1f9d3",
    "1f475": "1f9d3",
}
# Code points of their own for one role by gender: (neutral, gender).
ROLES = {
    "1f934": ("1fac5", "man"), "1f478": ("1fac5", "woman"),
    "1f57a": ("1f483", "man"), "1f483": ("1f483", "woman"),
    "1f385": ("1f9d1-1f384", "man"), "1f936": ("1f9d1-1f384", "woman"),
    "1f46b": ("1f9d1-1f91d-1f9d1", ""), "1f46c": ("1f9d1-1f91d-1f9d1", "man"), "1f46d": ("1f9d1-1f91d-1f9d1", "woman"),
}  # fmt: skip
PEOPLE = {
    "person",
    "person-gesture",
    "person-role",
    "person-fantasy",
    "person-activity",
    "person-sport",
    "person-resting",
}
KEEP_IN_TRAIN = {"1f34e", "1f60e"}  # red apple, smiling face with sunglasses
PLAIN_GROUPS = {
    "animals-nature",
    "food-drink",
    "travel-places",
    "objects",
    "people-body",
    "smileys-emotion",
    "activities",
}


@dataclass
class Emoji:
    """One picture with what its captions and its split need."""

    key: str
    label: str
    tags: list[str]
    group: str
    subgroup: str
    tones: tuple[int, ...]
    gender: str
    concept: str
    split: str = "train"
    tokens: set[str] = field(default_factory=set)

    @property
    def combination(self) -> tuple[str, tuple[int, ...], str]:
        return self.concept, self.tones, self.gender


# Pictures of all five tones named in another order in the package: true tone code -> file's tone code.
PERMUTED = {"1f6b5": {"1f3fb": "1f3ff", "1f3fc": "1f3fe", "1f3fd": "1f3fc", "1f3fe": "1f3fd", "1f3ff": "1f3fb"}}


def lightness(path: Path) -> float:
    """Mean of the opaque pixels' channels."""
    colours, opacity = decode.layers(path.read_bytes())
    values = np.asarray(colours, np.float64)
    return float((values if opacity is None else values[np.asarray(opacity) > 128]).mean())


def true_tones(files: dict[str, Path]) -> dict[str, Path]:
    """The files by their true code: undoes the package's exchange of the medium-light and medium tones."""
    right = dict(files)
    for code, path in files.items():
        base = "-".join(c for c in code.split("-") if c not in TONE_CODES)
        if base in PERMUTED:
            right.update({f"{base}-{true}": files[f"{base}-{named}"] for true, named in PERMUTED[base].items()})
        elif {c for c in code.split("-") if c in TONE_CODES} == {"1f3fc"}:
            other = code.replace("1f3fc", "1f3fd")
            if other in files and lightness(path) < lightness(files[other]):
                right[code], right[other] = files[other], path
    return right


def fraction(text: str) -> float:
    """A number in [0, 1) that belongs to the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / (1 << 56)


def bare(code: str) -> str:
    """Code points lower-case without the emoji variation selector."""
    return "-".join(c for c in code.lower().split("-") if c != "fe0f")


def concept_of(code: str) -> tuple[str, str]:
    """(concept, gender) of a bare code."""
    points = [c for c in code.split("-") if c not in TONE_CODES and c != "200d"]
    gender = "woman" if "2640" in points[1:] else "man" if "2642" in points[1:] else ""
    points = points[:1] + [c for c in points[1:] if c not in ("2640", "2642")]
    if points[0] in ROLES and len(points) == 1:
        concept, own = ROLES[points[0]]
        return concept, gender or own
    adults = [c for c in points if c in ("1f468", "1f469", "1f9d1")]
    if points[0] in TO_NEUTRAL and not gender and len(set(adults)) < 2:
        gender = {"1f468": "man", "1f466": "man", "1f474": "man"}.get(points[0], "woman")
    if len(adults) > 1 and any(c in ("1f466", "1f467", "1f9d2") for c in points):
        return "1f46a", ""  # all families
    if "1f48b" in points or "2764" in points:
        return ("1f48f" if "1f48b" in points else "1f491") if len(adults) > 1 else "-".join(points), gender
    return "-".join(TO_NEUTRAL.get(c, c) for c in points), gender


def caption_of(label: str) -> str:
    """Emojibase's label as one would say it: "man: dark skin tone, beard" -> "man with beard, dark skin tone"."""
    label = label.replace("“", '"').replace("”", '"').replace("’", "'")
    head, colon, rest = label.partition(": ")
    if not colon:
        return label
    parts = rest.split(", ")
    tones = [p for p in parts if p.endswith("skin tone")]
    others = [p for p in parts if not p.endswith("skin tone")]
    if head in ("keycap", "family", "kiss", "couple with heart"):
        joint = {"keycap": " ", "family": " with "}.get(head, " of ")
        text = head + (joint + " and ".join(others) if others else "")
    elif others == ["bald"]:
        text = f"bald {head}"
    else:
        text = head + (" with " + " and ".join(others) if others else "")
    return f"{text}, {' and '.join(tones)}" if tones else text


def article(text: str) -> str:
    """The text with its indefinite article."""
    return ("an " if re.match(r"[aeio]|u(?!ni)", text, re.I) else "a ") + text


def captions_of(emoji: Emoji) -> list[list[Any]]:
    """Captions with weights; the plain one first."""
    plain = emoji.label
    said = (
        article(plain)
        if emoji.group in PLAIN_GROUPS and not re.match(r"\w+s\b(?!s)|people|men|women", plain)
        else plain
    )
    words = set(re.findall(r"\w+", plain.lower()))
    tags = [t for t in emoji.tags if not set(re.findall(r"\w+", t.lower())) & words and len(t) > 2][:3]
    choices = [[plain, 4], [said, 2], [f"3d emoji of {said}", 2]]
    if tags:
        choices.append([", ".join([plain, *tags]), 2])
    merged: dict[str, int] = {}
    for text, weight in choices:
        merged[text] = merged.get(text, 0) + weight
    return [[text, weight] for text, weight in merged.items()]


def read(emojibase: Path, files: dict[str, Path]) -> list[Emoji]:
    """The captioned emoji that have a picture, flags and components left out, in Unicode's order."""
    data = json.loads((emojibase / "en/data.json").read_text())
    meta = json.loads((emojibase / "meta/groups.json").read_text())
    found: list[Emoji] = []
    for entry in data:
        group = meta["groups"].get(str(entry.get("group")))
        if group in (None, "flags", "component"):
            continue
        for form in [entry, *entry.get("skins", [])]:
            key = bare(form["hexcode"])
            if key not in files:
                continue
            tone = form.get("tone", ())
            tones = tuple(tone) if isinstance(tone, list) else (tone,) if tone else ()
            concept, gender = concept_of(key)
            subgroup = meta["subgroups"][str(entry["subgroup"])]
            tags = entry.get("tags", [])
            found.append(Emoji(key, caption_of(form["label"]), tags, group, subgroup, tones, gender, concept))
    return found


def families(emojis: list[Emoji], pictures: dict[str, Image.Image]) -> dict[str, str]:
    """Concept -> the name of its family: near-duplicate pictures and clock faces must not straddle a split."""
    parent = {e.concept: e.concept for e in emojis}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    plain = [e for e in emojis if not e.tones]
    small = np.stack([np.asarray(pictures[e.key].resize((16, 16)), np.float32).ravel() for e in plain])
    for i, emoji in enumerate(plain):
        distance = np.sqrt(((small[i + 1 :] - small[i]) ** 2).mean(axis=1))
        for j in np.flatnonzero(distance < 8.0) + i + 1:
            a, b = sorted((root(emoji.concept), root(plain[j].concept)))
            parent[b] = a
    clocks = [e.concept for e in plain if e.subgroup == "time" and ("o'clock" in e.label or "thirty" in e.label)]
    for clock in clocks[1:]:
        parent[root(clock)] = root(clocks[0])
    return {name: root(name) for name in parent}


def split(emojis: list[Emoji], family: dict[str, str]) -> None:
    """Set `split` of each emoji."""
    keep = {family[c] for c in KEEP_IN_TRAIN}
    groups: dict[str, set[str]] = defaultdict(set)
    for emoji in emojis:
        groups[emoji.group].add(family[emoji.concept])
    held: set[str] = set()
    seen: set[str] = set()
    for group in sorted(groups):
        ranked = sorted(groups[group] - keep - seen, key=lambda name: fraction(f"heldout {name}"))
        held |= set(ranked[: round(len(groups[group]) / 20)])
        seen |= groups[group]
    for emoji in emojis:
        emoji.split = "heldout" if family[emoji.concept] in held else "train"
    people = [e for e in emojis if e.split == "train" and e.subgroup in PEOPLE and len(e.tones) < 2]
    genders: dict[str, set[str]] = defaultdict(set)
    tones: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for emoji in people:
        genders[emoji.concept].add(emoji.gender)
        tones[emoji.concept].add(emoji.tones)
    people = [e for e in people if len(genders[e.concept]) > 1 and len(tones[e.concept]) > 1]
    left: Counter[tuple[Any, ...]] = Counter(pair for e in people for pair in pairs(e))
    quota = round(len(people) / 10)
    for emoji in sorted(people, key=lambda e: fraction(f"compositional {e.key}")):
        if quota and all(left[pair] > 1 for pair in pairs(emoji)):
            emoji.split = "compositional"
            left.subtract(pairs(emoji))
            quota -= 1


def pairs(emoji: Emoji) -> list[tuple[Any, ...]]:
    """The attribute pairs that must stay in train."""
    return [(emoji.concept, emoji.tones), (emoji.concept, emoji.gender, "g"), (emoji.tones, emoji.gender)]


def picture(path: Path) -> Image.Image:
    """The picture at SIZE on white."""
    return decode.load(path).resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main(fluent: Path, emojibase: Path, out: Path) -> None:
    """Read, split, write."""
    files = true_tones({bare(p.stem): p for p in sorted((fluent / "assets").glob("*.webp"))})
    emojis = read(emojibase, files)
    pictures = {e.key: picture(files[e.key]) for e in emojis}
    names = {e.concept: e.label for e in reversed(emojis) if not e.tones}
    split(emojis, families(emojis, pictures))
    shards = []
    for name in ("train", "heldout", "compositional"):
        with ShardWriter(out, name, split=name, max_bytes=19_000_000) as writer:
            for emoji in (e for e in emojis if e.split == name):
                buffer = io.BytesIO()
                pictures[emoji.key].save(buffer, "WEBP", quality=QUALITY, method=6)
                record = {
                    "captions": captions_of(emoji),
                    "concept": names.get(emoji.concept, emoji.concept),
                    "group": emoji.group,
                    "subgroup": emoji.subgroup,
                    "tone": " ".join(TONES[t] for t in emoji.tones),
                    "gender": emoji.gender,
                    "profession": names.get(emoji.concept, "") if emoji.subgroup == "person-role" else "",
                }
                text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
                writer.add(emoji.key, {"webp": buffer.getvalue(), "json": text.encode()})
            shards += writer.close()
    Manifest(
        name="emoji", shards=tuple(shards), folder=out, notes={"size": SIZE, "license": "MIT, see LICENSE"}
    ).write()
    concepts = {s: len({e.concept for e in emojis if e.split == s}) for s in ("train", "heldout", "compositional")}
    sys.stdout.write(f"{dict(Counter(e.split for e in emojis))} pictures of {concepts} concepts\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else Path(__file__).parent)
