"""A folder of pictures becomes a data set: checked first, then written as shards with the captions of the method."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldm import dist
from ldm.checkpoint import files
from ldm.data import decode
from ldm.data.images import pixels, resize
from ldm.data.manifest import Manifest
from ldm.data.sources import Item, captions_beside, find
from ldm.data.write import ShardWriter

FEW = 3
"""Fewer pictures of a subject than this are warned of: the model then learns the picture, not what is in it."""


@dataclass(frozen=True)
class Found:
    """Pictures by name, upright RGB, with their own captions, and what was said of them."""

    names: tuple[str, ...]
    pictures: tuple[Image.Image, ...]
    captions: tuple[tuple[tuple[str, float], ...], ...]
    remarks: tuple[str, ...]


def check(folder: Path, size: int) -> Found:
    """Read all pictures of a folder and look for trouble: few, small, damaged, the same twice.

    Raises ValueError when there is no folder or no picture that can be read.
    """
    names: list[str] = []
    pictures: list[Image.Image] = []
    captions: list[tuple[tuple[str, float], ...]] = []
    remarks: list[str] = []
    for item in find(folder):
        try:
            pictures.append(_open(item))
        except decode.BadSample as error:
            remarks.append(f"{item.name}: left out, {error}")
            continue
        names.append(item.name)
        captions.append(tuple(captions_beside(item)))
    if not pictures:
        raise ValueError(f"images {str(folder)!r}: none of the pictures can be read: {'; '.join(remarks[:3])}")
    small = [f"{n} ({p.width}x{p.height})" for n, p in zip(names, pictures, strict=True) if min(p.size) < size]
    if small:
        remarks.append(f"smaller than {size} pixels, will be blurred: {', '.join(small[:5])}")
    if len(pictures) < FEW:
        remarks.append(f"only {len(pictures)} picture(s); {FEW} to 10 different ones of a subject work better")
    remarks += _duplicates(names, pictures)
    return Found(tuple(names), tuple(pictures), tuple(captions), tuple(remarks))


def _open(item: Item) -> Image.Image:
    return decode.picture(item.path.read_bytes())


def _duplicates(names: Sequence[str], pictures: Sequence[Image.Image]) -> list[str]:
    """Pairs whose 16 x 16 miniatures hardly differ (under 1.5 grey levels in the mean)."""
    tiny = [np.asarray(p.resize((16, 16), Image.Resampling.BOX), np.float32) for p in pictures]
    found = []
    for i, a in enumerate(tiny):
        for j in range(i):
            if np.abs(a - tiny[j]).mean() < 1.5:
                found.append(f"{names[i]} looks the same as {names[j]}: a duplicate counts twice")
                break
    return found


def write(found: Found, out: Path, captions: Sequence[str] | None, size: int) -> None:
    """Write shards into `out`, unless they are there already.

    All pictures get `captions`, each as likely as the others, or their own with None. Raises ValueError when `out`
    holds other pictures, or a picture has no caption.
    """
    told = _fingerprint(found, captions, size)
    note = out / "pictures.json"
    if note.is_file() and (out / "manifest.json").is_file():
        if json.loads(note.read_text(encoding="utf-8"))["fingerprint"] != told:
            raise ValueError(f"{out}: holds other pictures or captions; take another `out` or remove the folder")
        return
    out.mkdir(parents=True, exist_ok=True)
    with ShardWriter(out, "train") as writer:
        for i, (name, picture) in enumerate(zip(found.names, found.pictures, strict=True)):
            pairs = [[c, 1.0] for c in captions] if captions is not None else [list(c) for c in found.captions[i]]
            if not pairs:
                raise ValueError(f"images: {name} has no caption; write one into {Path(name).with_suffix('.txt').name}")
            record = {"captions": pairs, "original_width": picture.width, "original_height": picture.height}
            key = f"{i:05d}-{hashlib.sha1(name.encode()).hexdigest()[:8]}"
            writer.add(key, {"png": _png(picture, size), "json": json.dumps(record).encode()})
    Manifest(name=out.name, shards=tuple(writer.shards), folder=out).write()
    files.write_text(note, json.dumps({"fingerprint": told, "names": found.names, "remarks": found.remarks}, indent=1))


def _png(picture: Image.Image, size: int) -> bytes:
    """Its short side at most `size`."""
    if min(picture.size) > size:
        picture = resize(picture, (size, size), "crop")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _fingerprint(found: Found, captions: Sequence[str] | None, size: int) -> str:
    total = hashlib.blake2b(digest_size=8)
    total.update(json.dumps([found.names, found.captions if captions is None else list(captions), size]).encode())
    for picture in found.pictures:
        total.update(pixels(picture).tobytes())
    return total.hexdigest()


def on_first(what: Callable[[], None]) -> None:
    """Do something on rank 0 while the others wait; its ValueError ends all of them."""
    problem: ValueError | None = None
    if dist.rank() == 0:
        try:
            what()
        except ValueError as error:
            problem = error
    if dist.from_first(int(problem is not None)):
        raise problem or ValueError("stopped; rank 0 tells why")


def prepare(folder: Path, out: Path, captions: Sequence[str] | None, size: int) -> None:
    """Check a folder, say what is wrong with it, and write its shards into `out`; collective."""

    def work() -> None:
        found = check(folder, size)
        for remark in found.remarks:
            dist.say(f"images {folder}: {remark}")
        write(found, out, captions, size)

    on_first(work)
