"""Looks at a data set: statistics, duplicates, a contact sheet and a page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm.data import decode
from ldm.data.buckets import name
from ldm.data.captions import captions_of
from ldm.data.decode import BadSample
from ldm.data.manifest import Manifest, printable
from ldm.data.shards import Shards

THUMB = 128
_TEXT = 26


@dataclass
class Statistics:
    """Figures of the samples looked at."""

    total: int = 0
    looked_at: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    bad_keys: list[str] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    picture_bytes: list[int] = field(default_factory=list)
    captions_per_sample: list[int] = field(default_factory=list)
    caption_words: list[int] = field(default_factory=list)
    hashes: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    words: Counter[str] = field(default_factory=Counter)
    buckets: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """Plain figures."""
        aspects = [round(w / h, 4) for w, h in zip(self.widths, self.heights, strict=True)]
        groups = [keys for keys in look_alikes(self.hashes) if len(keys) > 1]
        return {
            "samples": self.total,
            "looked_at": self.looked_at,
            "bad": dict(self.bad),
            "bad_keys": self.bad_keys[:100],
            "buckets": dict(sorted(self.buckets.items())),
            "formats": dict(self.formats),
            "width": _spread(self.widths),
            "height": _spread(self.heights),
            "aspect": _spread(aspects),
            "picture_bytes": _spread(self.picture_bytes),
            "captions_per_sample": _spread(self.captions_per_sample),
            "caption_words": _spread(self.caption_words),
            "frequent_words": dict(self.words.most_common(30)),
            "look_alike_groups": len(groups),
            "look_alikes": [g[:8] for g in sorted(groups, key=len, reverse=True)[:20]],
        }


def inspect(
    manifest: Manifest,
    out: Path,
    *,
    split: str = "all",
    limit: int = 20_000,
    pictures: int = 96,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write contact.png, statistics.json and index.html into `out`; gives the statistics.

    At most `limit` samples, evenly spaced, are looked at; by bucket those are counted that can be used. Raises
    ValueError, when all is written, if none can.
    """
    shards = Shards(manifest, split)
    ids = np.unique(np.linspace(0, len(shards) - 1, min(limit, len(shards))).astype(int)).tolist()
    shown = {ids[i] for i in np.linspace(0, len(ids) - 1, min(pictures, len(ids))).astype(int)}
    figures = Statistics(total=len(shards))
    tiles: list[tuple[Image.Image, str]] = []
    for number, sample in enumerate(ids, 1):
        figures.looked_at += 1
        key = printable(shards.key(sample))
        try:
            picture, caption = _look(key, shards.read(sample)[1], figures)
            bucket = shards.shards[shards.locate(sample)[0]].bucket
            if bucket is not None:
                figures.buckets[name(bucket)] += 1
            if sample in shown:
                tiles.append((picture, caption))
        except BadSample as error:
            figures.bad[error.reason] += 1
            figures.bad_keys.append(f"{key}: {error}")
        if progress is not None:
            progress(number, len(ids))
    out.mkdir(parents=True, exist_ok=True)
    summary = figures.summary()
    (out / "statistics.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sheet = contact_sheet(tiles)
    sheet.save(out / "contact.png")
    (out / "index.html").write_text(_page(manifest.name, summary, sheet), encoding="utf-8")
    if figures.looked_at == sum(figures.bad.values()):
        reasons = ", ".join(f"{count} {reason}" for reason, count in figures.bad.most_common())
        raise ValueError(f"data {manifest.name!r}: none of {figures.looked_at} samples can be used: {reasons}")
    return summary


def _look(key: str, members: dict[str, bytes], figures: Statistics) -> tuple[Image.Image, str]:
    data = decode.image_member(members)
    picture = decode.picture(data)
    captions, _ = captions_of(members)
    extension = next(e for e in decode.IMAGES if e in members)
    figures.formats[extension] += 1
    figures.widths.append(picture.width)
    figures.heights.append(picture.height)
    figures.picture_bytes.append(len(data))
    figures.captions_per_sample.append(len(captions.texts))
    words = captions.texts[0].lower().split()
    figures.caption_words.append(len(words))
    figures.words.update(w.strip(",.") for w in words if len(w) > 2)
    figures.hashes[difference_hash(picture)].append(key)
    picture.thumbnail((THUMB, THUMB))
    return picture, captions.texts[0]


def difference_hash(picture: Image.Image) -> int:
    """256-bit perceptual hash: signs of horizontal differences of a 17 x 16 grey version."""
    grey = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def look_alikes(hashes: Mapping[int, list[str]]) -> list[list[str]]:
    """Keys in groups whose hashes differ, from one to the next, in few bits: as after resizing or compressing again.

    Few are at most 16 of the 256, and an eighth of the bits that are set in the two: plain pictures have few.
    """
    codes = list(hashes)
    if not codes:
        return []
    raw = np.frombuffer(b"".join(code.to_bytes(32, "big") for code in codes), np.uint8).reshape(-1, 32)
    bits = np.unpackbits(raw, axis=1).astype(np.float32)
    ones = bits.sum(1)
    group = list(range(len(codes)))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = i = group[group[i]]
        return i

    for start in range(0, len(codes), 512):
        part = slice(start, start + 512)
        both = ones[part, None] + ones
        near = both - 2 * (bits[part] @ bits.T) <= np.minimum(16, both / 8)
        for a, b in np.argwhere(np.triu(near, start + 1)).tolist():
            group[root(a + start)] = root(b)
    found: dict[int, list[str]] = defaultdict(list)
    for i, code in enumerate(codes):
        found[root(i)] += hashes[code]
    return list(found.values())


def contact_sheet(tiles: list[tuple[Image.Image, str]], columns: int = 12) -> Image.Image:
    """Thumbnails in a grid with the beginnings of their captions."""
    rows = max(1, -(-len(tiles) // columns))
    sheet = Image.new("RGB", (columns * (THUMB + 8), rows * (THUMB + _TEXT)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(tiles):
        left, top = i % columns * (THUMB + 8) + 4, i // columns * (THUMB + _TEXT) + 4
        sheet.paste(picture, (left + (THUMB - picture.width) // 2, top + (THUMB - picture.height) // 2))
        shown = caption if len(caption) <= 21 else caption[:18] + "..."
        draw.text((left, top + THUMB + 3), shown.encode("latin-1", "replace").decode("latin-1"), fill=(60, 60, 60))
    return sheet


def _spread(values: list[Any]) -> dict[str, float]:
    if not values:
        return {}
    names = ("min", "p5", "median", "p95", "max")
    points = np.percentile(np.asarray(values, float), [0, 5, 50, 95, 100])
    return {n: round(float(p), 3) for n, p in zip(names, points, strict=True)}


def _page(name: str, summary: dict[str, Any], sheet: Image.Image) -> str:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    rows = []
    for key, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = "; ".join(v if isinstance(v, str) else ", ".join(v) for v in value)
        rows.append(f"<tr><th>{html.escape(key.replace('_', ' '))}</th><td>{html.escape(str(value))}</td></tr>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1700px;color:#222}"
        "th{text-align:left;vertical-align:top;padding:.2rem 1.5rem .2rem 0;white-space:nowrap;color:#666;"
        "font-weight:500}td{overflow-wrap:anywhere}img{max-width:100%;border:1px solid #ddd;margin-top:1rem}</style>"
        f"<h1>{html.escape(name)}</h1><table>{''.join(rows)}</table>"
        f'<img alt="pictures of the data set with their captions" src="data:image/png;base64,{picture}"></html>\n'
    )
