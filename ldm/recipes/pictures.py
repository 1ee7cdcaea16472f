"""A folder of pictures becomes a data set: checked first, then written as shards with the captions of the method."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldm import dist
from ldm.checkpoint import files
from ldm.data import decode
from ldm.data.bad import BadSample
from ldm.data.captions import TEXTS, captions_of
from ldm.data.images import pixels, resize
from ldm.data.manifest import NAME, Manifest, Shard
from ldm.data.shards import Shards
from ldm.data.sources import Item, captions_beside, find, read
from ldm.data.write import ShardWriter
from ldm.objectives.masked import LOSS_WEIGHT
from ldm.recipes.picture_masks import Masks

FEW = 3
"""Fewer pictures of a subject than this are warned of: the model then learns the picture, not what is in it."""
MOST_SAID = 30
"""Remarks that are printed; the file has all."""


@dataclass(frozen=True)
class Entry:
    """A picture of a folder or of a built data set, not read yet; `repeats` by its folder's name or its shard."""

    name: str
    repeats: int
    data: Callable[[], bytes]
    captions: Callable[[], list[tuple[str, float]]]
    path: Path | None = None

    def open(self, at_least: tuple[int, int] | None = None) -> Image.Image:
        """Upright RGB. Raises BadSample."""
        return decode.picture(self.data(), at_least=at_least)


@dataclass(frozen=True)
class Found:
    """Pictures by name, upright RGB, with their own captions and repeats, what was left out, and what was said.

    `masks` (L) are theirs, white where they are learned; none without a masked loss.
    """

    names: tuple[str, ...]
    pictures: tuple[Image.Image, ...]
    captions: tuple[tuple[tuple[str, float], ...], ...]
    remarks: tuple[str, ...]
    repeats: tuple[int, ...] = ()
    bad: tuple[dict[str, str], ...] = ()
    masks: tuple[Image.Image, ...] = ()

    @property
    def summary(self) -> str:
        """How many are used, and what was left out by reason."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(b["reason"] for b in self.bad).most_common())
        left = f"; left out: {reasons}" if reasons else ""
        return f"{len(self.names)} of {len(self.names) + len(self.bad)} pictures are used{left}"


def is_set(path: Path) -> bool:
    """Whether a path is a built data set: its folder or its manifest."""
    place = path / NAME if path.is_dir() else path
    if place.name != NAME or not place.is_file():
        return False
    with contextlib.suppress(ValueError):
        return bool(Manifest.read(place).shards)
    return False  # another program's manifest.json among pictures


def entries(folder: Path, *, own: bool = False) -> list[Entry]:
    """The pictures of a folder, as `ldm data build` finds them, or of a built data set.

    Captions are looked for only if they are `own`. Raises ValueError when there is no folder or no picture.
    """
    if not is_set(folder):
        return [of_item(item) for item in find(folder, "files" if own else "none")]
    manifest = Manifest.read(folder)
    if manifest.cached is not None:
        raise ValueError(f"images {str(folder)!r}: holds cached latents; name the data set it was made from")
    shards = Shards(manifest, "train" if "train" in manifest.splits else "all")
    return [_of_sample(shards, i) for i in range(len(shards))]


def of_item(item: Item) -> Entry:
    """The picture of an item that `find` gave."""
    return Entry(item.name, item.repeats, lambda: read(item), lambda: captions_beside(item), item.path)


def _of_sample(shards: Shards, sample: int) -> Entry:
    def captions() -> list[tuple[str, float]]:
        found = captions_of(shards.read(sample, only=("json", *TEXTS))[1])[0]
        return list(zip(found.texts, found.weights, strict=True))

    repeats = shards.shards[shards.locate(sample)[0]].repeats
    return Entry(shards.key(sample), repeats, lambda: decode.image_member(shards.read(sample)[1]), captions)


def first(folder: Path, count: int) -> list[Image.Image]:
    """The first pictures of a folder or built set that can be read."""
    found: list[Image.Image] = []
    for entry in entries(folder):
        if len(found) == count:
            break
        with contextlib.suppress(BadSample):
            found.append(entry.open())
    return found


def check(folder: Path, size: int, *, own: bool = False, masks: str | None = None) -> Found:
    """Read all pictures of a folder or built set and look for trouble: few, small, damaged, the same twice.

    With `own` captions, one without any is left out. `masks`: where those of a masked loss are
    (`ldm.recipes.picture_masks`); a picture without one is learned whole, and it is said. Raises ValueError when there
    is no folder or no picture is left.
    """
    kept: list[tuple[Entry, decode.Decoded, tuple[tuple[str, float], ...]]] = []
    bad: list[dict[str, str]] = []
    places = None if masks is None else Masks(masks, folder)
    found_masks: list[Image.Image] = []
    for entry in entries(folder, own=own):
        if places is not None and places.taken(entry.path):
            continue
        try:
            captions = tuple(entry.captions()) if own else ()
            if own and not captions:
                beside = Path(entry.name).with_suffix(".txt").name
                raise BadSample("no_caption", f"{entry.name} has no caption; write one into {beside}")
            picture = decode.decoded(entry.data())
            if places is not None:
                found_masks.append(places.of(entry.path, entry.data, picture.image.size))
            kept.append((entry, picture, captions))
        except BadSample as error:
            bad.append({"name": entry.name, "reason": error.reason, "error": error.detail})
    remarks = [f"{b['name']}: left out, {b['reason']}: {b['error']}" for b in bad]
    if not kept:
        raise ValueError(f"images {str(folder)!r}: none of the pictures can be used: {'; '.join(remarks[:3])}")
    remarks += [f"{e.name}: the first of {d.frames} frames or pages" for e, d, _ in kept if d.frames > 1]
    remarks += [] if places is None else places.remarks(len(kept))
    names, pictures = [e.name for e, _, _ in kept], [d.image for _, d, _ in kept]
    small = [f"{n} ({p.width}x{p.height})" for n, p in zip(names, pictures, strict=True) if min(p.size) < size]
    if small:
        remarks.append(f"smaller than {size} pixels, will be blurred: {', '.join(small[:5])}")
    if len(pictures) < FEW:
        remarks.append(f"only {len(pictures)} picture(s); {FEW} to 10 different ones of a subject work better")
    remarks += _duplicates(names, pictures)
    repeats = tuple(e.repeats for e, _, _ in kept)
    for times, n in sorted(Counter(r for r in repeats if r > 1).items()):
        remarks.append(f"{n} pictures come {times} times an epoch: repeats by their folder's name")
    captions_of_all = tuple(c for _, _, c in kept)
    return Found(
        tuple(names), tuple(pictures), captions_of_all, tuple(remarks), repeats, tuple(bad), tuple(found_masks)
    )  # fmt: skip


def _duplicates(names: Sequence[str], pictures: Sequence[Image.Image]) -> list[str]:
    """Pairs whose 16 x 16 miniatures hardly differ (under 1.5 grey levels in the mean)."""
    tiny = np.stack([np.asarray(p.resize((16, 16), Image.Resampling.BOX), np.float32) for p in pictures])
    found = []
    for i in range(1, len(tiny)):
        near = np.flatnonzero(np.abs(tiny[:i] - tiny[i]).mean((1, 2, 3)) < 1.5)
        if len(near):
            found.append(f"{names[i]} looks the same as {names[near[0]]}: a duplicate counts twice")
    return found


def held_out(names: Sequence[str], share: float) -> set[int]:
    """The places of the pictures that validate, by hashes of their names: at least one, at most all but one."""
    if not share:
        return set()
    order = sorted(range(len(names)), key=lambda i: hashlib.sha1(names[i].encode()).hexdigest())
    return set(order[: max(1, min(len(names) - 1, round(share * len(names))))])


def write(found: Found, out: Path, captions: Sequence[str] | None, size: int, share: float = 0.0) -> None:
    """Write shards into `out`, unless they are there already, and what was left out into quarantine.jsonl.

    All pictures get `captions`, each as likely as the others, or their own with None; those of as many repeats share
    shards. With `share` so many of them are the split "test". Raises ValueError when `out` holds other pictures.
    """
    told = _fingerprint(found, captions, size, share)
    apart = held_out(found.names, share)
    note = out / "pictures.json"
    if note.is_file() and (out / NAME).is_file():
        if json.loads(note.read_text(encoding="utf-8"))["fingerprint"] != told:
            raise ValueError(f"{out}: holds other pictures or captions; take another `out` or remove the folder")
        return
    out.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    parts = {("test" if i in apart else "train", times) for i, times in enumerate(found.repeats)}
    for split, times in sorted(parts, key=lambda part: (part[0] == "test", part[1])):
        with ShardWriter(out, split if times == 1 else f"{split}-r{times}", split=split, repeats=times) as writer:
            for i, (name, picture) in enumerate(zip(found.names, found.pictures, strict=True)):
                if found.repeats[i] != times or (i in apart) != (split == "test"):
                    continue
                pairs = [[c, 1.0] for c in captions] if captions is not None else [list(c) for c in found.captions[i]]
                record = {"captions": pairs, "original_width": picture.width, "original_height": picture.height}
                key = f"{i:05d}-{hashlib.sha1(name.encode()).hexdigest()[:8]}"
                members = {"png": _png(picture, size), "json": json.dumps(record).encode()}
                if found.masks:
                    members[f"{LOSS_WEIGHT}.png"] = _png(found.masks[i], size)
                writer.add(key, members)
        shards += writer.shards
    Manifest(name=out.name, shards=tuple(shards), folder=out).write()
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in found.bad]
    files.write_text(out / "quarantine.jsonl", "".join(lines))
    files.write_text(note, json.dumps({"fingerprint": told, "names": found.names, "remarks": found.remarks}, indent=1))


def _png(picture: Image.Image, size: int) -> bytes:
    """Its short side at most `size`."""
    if min(picture.size) > size:
        picture = resize(picture, (size, size), "crop")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _fingerprint(found: Found, captions: Sequence[str] | None, size: int, share: float) -> str:
    total = hashlib.blake2b(digest_size=8)
    told = [found.names, found.captions if captions is None else list(captions), size]
    told += [found.repeats] if set(found.repeats) != {1} else []
    told += [share] if share else []
    total.update(json.dumps(told).encode())
    for picture in found.pictures:
        total.update(pixels(picture).tobytes())
    for mask in found.masks:
        total.update(mask.tobytes())
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


def prepare(
    folder: Path,
    out: Path,
    captions: Sequence[str] | None,
    size: int,
    share: float = 0.0,
    masks: str | None = None,
) -> None:
    """Check a folder or built set, say what is wrong with it, and write its shards into `out`; collective.

    `share`: of the pictures, as `write` has it. `masks` as `check` takes it.
    """

    def work() -> None:
        found = check(folder, size, own=captions is None, masks=masks)
        for remark in found.remarks[:MOST_SAID]:
            dist.say(f"images {folder}: {remark}")
        if len(found.remarks) > MOST_SAID:
            dist.say(f"images {folder}: {len(found.remarks) - MOST_SAID} remarks more in {out / 'pictures.json'}")
        if found.bad:
            dist.say(f"images {folder}: {found.summary}")
        write(found, out, captions, size, share)

    on_first(work)
