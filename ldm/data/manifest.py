"""`manifest.json`: the shards of a data set with their sizes, hashes, splits and what is cached in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ldm.data.remote import Remote, RemoteConfig, is_remote
from ldm.words import expanded, near

FORMAT = "ldm-data"
VERSION = 1
NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar. `file` and `index` are relative to the manifest's folder; `bucket` is (width, height) or None.

    Each of its samples comes `repeats` times in an epoch. `rows` is the digest of its index, which says what samples of
    the tar these are and in which order; None in manifests of versions up to 0.1.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    index: str
    split: str = "train"
    bucket: tuple[int, int] | None = None
    repeats: int = 1
    rows: str | None = None

    def __post_init__(self) -> None:
        if self.samples < 0 or self.bytes < 0:
            raise ValueError(f"shard {self.file!r}: samples and bytes must not be negative")
        if self.repeats < 1:
            raise ValueError(f"shard {self.file!r}: repeats must be at least 1, got {self.repeats}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A data set in a local folder or, read only, at an address.

    `cached` says what is cached and with which weights; None for plain pictures.
    """

    name: str
    shards: tuple[Shard, ...]
    folder: Path = field(default=Path(), compare=False)
    address: str | None = field(default=None, compare=False)
    cached: dict[str, Any] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> str:
        """What the shards' file names are relative to: the address or the folder."""
        return str(self.folder) if self.address is None else self.address

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, sorted."""
        return tuple(sorted({shard.split for shard in self.shards}))

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of one split, or of all for "all"; ValueError for an unknown one."""
        chosen = tuple(s for s in self.shards if name in (s.split, "all"))
        if not chosen:
            raise ValueError(f"split {name!r} is not in {self.name!r}; it has {list(self.splits)}")
        return chosen

    def samples(self, split: str = "all") -> int:
        """How many samples a split has."""
        return sum(s.samples for s in self.split(split))

    def write(self, folder: Path | None = None) -> Path:
        """Write `manifest.json` atomically into the folder, sorted and stable."""
        folder = folder or self.folder
        tree = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "cached": self.cached,
            "notes": self.notes,
            "shards": [_plain(s) for s in sorted(self.shards, key=lambda s: s.file)],
        }
        path = folder / NAME
        beside = folder / f".{NAME}.{os.getpid()}"
        beside.write_text(_escaped(json.dumps(tree, indent=1, ensure_ascii=False)) + "\n", encoding="utf-8")
        os.replace(beside, path)
        return path

    @staticmethod
    def read(path: str | Path, remote: RemoteConfig | None = None) -> Manifest:
        """Read a manifest file, or the one of a folder or address; ValueError says what is wrong with it."""
        address = str(path) if isinstance(path, str) and is_remote(path) else None
        if address is not None:
            place = address if address.endswith(".json") else f"{address.rstrip('/')}/{NAME}"
            data = Remote(remote or RemoteConfig()).read(place)
            return _parse(data, place, Path(), place.rsplit("/", 1)[0])
        path = Path(expanded(str(path)))
        path = path / NAME if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"data {str(path)!r}: no such manifest; `ldm data index` makes one for existing tars")
        return _parse(path.read_bytes(), str(path), path.parent, None)


def _parse(data: bytes, where: str, folder: Path, address: str | None) -> Manifest:
    try:
        tree = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"data {where!r}: not a manifest: {error}") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ValueError(f"data {where!r}: not a manifest: no `format: {FORMAT}` in it")
    if tree.get("version") != VERSION:
        raise ValueError(f"data {where!r}: manifest version {tree.get('version')!r}, this reads {VERSION}")
    try:
        return Manifest(
            name=tree["name"],
            shards=tuple(shard_of(entry) for entry in tree["shards"]),
            folder=folder,
            address=address,
            cached=tree.get("cached"),
            notes=tree.get("notes") or {},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"data {where!r}: manifest lacks or has a wrong key: {error}") from error


def _plain(shard: Shard) -> dict[str, Any]:
    return {k: v for k, v in asdict(shard).items() if k != "rows" or v is not None}


def shard_of(entry: dict[str, Any]) -> Shard:
    """From plain data."""
    bucket = entry.get("bucket")
    return Shard(**{**entry, "bucket": None if bucket is None else (int(bucket[0]), int(bucket[1]))})


def merge(manifests: Iterable[Manifest]) -> Manifest:
    """One manifest of the shards of several in the same folder that agree on what is cached; ValueError if not."""
    parts = list(manifests)
    first = parts[0]
    for part in parts[1:]:
        if part.cached != first.cached:
            raise ValueError(f"data {first.name!r}: parts disagree on what is cached: {first.cached} / {part.cached}")
    return replace(first, shards=tuple(s for part in parts for s in part.shards))


def resolve(path: str | Path) -> Path | str:
    """The manifest of a shipped data set's name, a folder or a path; an address stays. ValueError if there is none."""
    if isinstance(path, str) and is_remote(path):
        return path
    given = Path(expanded(str(path)))
    if given.is_dir() or given.is_file():
        target = given / NAME if given.is_dir() else given
        if target.suffix == ".json" and target.is_file():
            return target
        if given.is_file():
            raise ValueError(f"data.path: {str(path)!r} is not a manifest.json; `ldm data index` makes one for tars")
        raise ValueError(f"data.path: no {NAME} in {str(path)!r}; `ldm data build` or `ldm data index` makes one")
    shipped = Path(str(resources.files("ldm"))) / "assets"
    if given.name == str(path) and (shipped / str(path) / NAME).is_file():
        return shipped / str(path) / NAME
    names = sorted(p.parent.name for p in shipped.glob(f"*/{NAME}"))
    raise ValueError(
        f"data.path: {str(path)!r} is no folder, no manifest and no shipped data; shipped: {names}{near(path, names)}"
    )


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def bucket_report(shards: Iterable[Shard], noted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By bucket the samples that shards hold, and what was merged into it as noted, where it holds as many as then."""
    counts: dict[str, int] = {}
    for shard in shards:
        name = "none" if shard.bucket is None else f"{shard.bucket[0]}x{shard.bucket[1]}"
        counts[name] = counts.get(name, 0) + shard.samples
    return {
        b: {"pictures": n, "merged": noted[b]["merged"] if b in noted and noted[b]["pictures"] == n else {}}
        for b, n in sorted(counts.items())
    }


def json_line(tree: Mapping[str, Any], separators: tuple[str, str] | None = None) -> str:
    """One line of JSON as UTF-8 can hold it: bytes of names that are no UTF-8 are escaped."""
    return _escaped(json.dumps(tree, ensure_ascii=False, separators=separators))


def _escaped(text: str) -> str:
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def printable(text: str) -> str:
    """Text that any stream can take: bytes of names that are no UTF-8 as `\\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode()
