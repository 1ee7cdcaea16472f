"""Looks at a data set: statistics, duplicates, a contact sheet and a page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ldm.data import decode
from ldm.data.buckets import name
from ldm.data.captions import captions_of, uniform
from ldm.data.decode import BadSample
from ldm.data.manifest import Manifest, printable
from ldm.data.pairs import Pair, delivered, make
from ldm.data.partners import partners_in
from ldm.data.samples import Samples
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
    partners: Counter[str] = field(default_factory=Counter)

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
            "partners": dict(sorted(self.partners.items())),
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
    pairs: Mapping[str, Pair] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write contact.png, statistics.json and index.html into `out`; gives the statistics.

    At most `limit` samples, evenly spaced, are looked at; by bucket those are counted that can be used. Stored partners
    stand beside their pictures, and with `pairs` those that training would see, of the middle. Raises ValueError,
    when all is written, if none can be used.
    """
    shards = Shards(manifest, split)
    ids = np.unique(np.linspace(0, len(shards) - 1, min(limit, len(shards))).astype(int)).tolist()
    shown = {ids[i] for i in np.linspace(0, len(ids) - 1, min(pictures, len(ids))).astype(int)}
    figures = Statistics(total=len(shards))
    tiles: list[tuple[Image.Image, str]] = []
    seen = Samples(manifest, split, size=THUMB, memory=0, require_captions=False, pairs=pairs) if pairs else None
    for number, sample in enumerate(ids, 1):
        figures.looked_at += 1
        key = printable(shards.key(sample))
        try:
            members = shards.read(sample)[1]
            picture, caption = _look(key, members, figures)
            beside = partners_in(members)
            strip = [picture] if seen is None else _seen(seen, sample, pairs or {})
            figures.partners.update(beside.keys())
            bucket = shards.shards[shards.locate(sample)[0]].bucket
            if bucket is not None:
                figures.buckets[name(bucket)] += 1
            if sample in shown:
                strip += [] if seen else [_thumbnail(decode.picture(members[m])) for m in beside.values()]
                tiles.append((side_by_side(strip), caption))
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
    return _thumbnail(picture), captions.texts[0]


def _thumbnail(picture: Image.Image) -> Image.Image:
    picture.thumbnail((THUMB, THUMB))
    return picture


def _seen(samples: Samples, sample: int, pairs: Mapping[str, Pair]) -> list[Image.Image]:
    """A sample's picture and its pairs as training sees them. Raises BadSample."""
    samples.begin([sample])
    if (problem := samples.touch(sample)) is not None:
        raise problem
    crops = samples.crop([sample])
    made = make(pairs, crops.pixels, crops.partners, lambda _, purpose: uniform(0, sample, purpose))
    shown = [Image.fromarray(np.ascontiguousarray(crops.pixels[0]))]
    for name_, pair in pairs.items():
        values = delivered(pair, made[name_])[0].mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        shown.append(Image.fromarray(values if values.shape[2] == 3 else values[:, :, 0]).convert("RGB"))
    return shown


def side_by_side(pictures: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Pictures in a row on white, their middles at one height."""
    if len(pictures) == 1:
        return pictures[0]
    size = sum(p.width for p in pictures) + gap * (len(pictures) - 1), max(p.height for p in pictures)
    row, left = Image.new("RGB", size, (255, 255, 255)), 0
    for picture in pictures:
        row.paste(picture, (left, (size[1] - picture.height) // 2))
        left += picture.width + gap
    return row


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
    """Thumbnails in a grid with the beginnings of their captions; strips of several take as many columns."""
    width = max([THUMB, *(picture.width for picture, _ in tiles)])
    columns = max(1, columns * THUMB // width)
    letters = 21 * width // THUMB
    rows = max(1, -(-len(tiles) // columns))
    sheet = Image.new("RGB", (columns * (width + 8), rows * (THUMB + _TEXT)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(tiles):
        left, top = i % columns * (width + 8) + 4, i // columns * (THUMB + _TEXT) + 4
        sheet.paste(picture, (left + (width - picture.width) // 2, top + (THUMB - picture.height) // 2))
        shown = caption if len(caption) <= letters else caption[: letters - 3] + "..."
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
