"""WebDataset tars with an offset index: any member of any sample is one positioned read away."""

from __future__ import annotations

import mmap
import os
import tarfile
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ldm.data.manifest import Manifest, Shard

ABSENT = -1


@dataclass(frozen=True)
class Index:
    """Where the members of n samples lie in a tar: offsets and sizes are (n, E) for E extensions, ABSENT if missing."""

    extensions: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.offsets)

    def write(self, path: Path) -> None:
        """Write as safetensors: offsets, sizes, keys joined by newlines."""
        keys = np.frombuffer("\n".join(self.keys).encode() or b"\n", np.uint8)
        tensors = {"offsets": self.offsets, "sizes": self.sizes, "keys": keys}
        path.write_bytes(save(tensors, metadata={"extensions": " ".join(self.extensions)}))

    @staticmethod
    def read(path: Path) -> Index:
        """Read what `write` wrote; ValueError if it is something else."""
        try:
            with safe_open(path, "numpy") as file:
                extensions = tuple((file.metadata() or {}).get("extensions", "").split())
                offsets, sizes = file.get_tensor("offsets"), file.get_tensor("sizes")
                text = file.get_tensor("keys").tobytes().decode()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"index {str(path)!r} cannot be read: {error}; `ldm data index` makes it anew") from error
        keys = tuple(text.split("\n")) if len(offsets) else ()
        if len(keys) != len(offsets) or offsets.shape != sizes.shape:
            raise ValueError(f"index {str(path)!r} is damaged; `ldm data index` makes it anew")
        return Index(extensions, offsets, sizes, keys)


def scan(path: Path) -> Index:
    """The index of a plain tar by one pass over its headers; members of a sample are neighbours with one key.

    A truncated last member ends the index before its sample. Raises ValueError for a file that is no plain tar.
    """
    length = path.stat().st_size
    rows: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or "." not in os.path.basename(member.name):
                    continue
                key, extension = split_name(member.name)
                if member.offset_data + member.size > length:
                    if rows and rows[-1][0] == key:
                        rows.pop()
                    break
                if not rows or rows[-1][0] != key or extension in rows[-1][1]:
                    rows.append((key, {}))
                rows[-1][1][extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        if not rows:
            raise ValueError(f"shard {str(path)!r} is not a plain tar: {error}") from error
        rows.pop()  # the damage may have cut this sample's members
    return index_of(rows)


def index_of(rows: list[tuple[str, dict[str, tuple[int, int]]]]) -> Index:
    """An index from (key, {extension: (offset, size)}) rows."""
    extensions = tuple(sorted({e for _, members in rows for e in members}))
    offsets = np.full((len(rows), len(extensions)), ABSENT, np.int64)
    sizes = np.full((len(rows), len(extensions)), ABSENT, np.int64)
    for i, (_, members) in enumerate(rows):
        for j, extension in enumerate(extensions):
            if extension in members:
                offsets[i, j], sizes[i, j] = members[extension]
    return Index(extensions, offsets, sizes, tuple(key for key, _ in rows))


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key is the path up to the first dot of the base name, the extension (lower) the rest."""
    folder, base = os.path.split(name)
    stem, _, extension = base.partition(".")
    return os.path.join(folder, stem), extension.lower()


class ShardReader:
    """One local tar with its index; reads are positioned, so threads may share it."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path = path
        self.index = index
        self._file: int | None = None
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    @staticmethod
    def open(folder: Path, shard: Shard) -> ShardReader:
        """Open a manifest's shard; scans the tar if the index file is missing. ValueError if they do not fit."""
        path = folder / shard.file
        if not path.is_file():
            raise ValueError(f"shard {str(path)!r} of the manifest does not exist")
        where = folder / shard.index
        index = Index.read(where) if where.is_file() else scan(path)
        if len(index) != shard.samples:
            raise ValueError(f"shard {str(path)!r}: {len(index)} samples found, the manifest says {shard.samples}")
        if path.stat().st_size != shard.bytes:
            raise ValueError(
                f"shard {str(path)!r} has {path.stat().st_size} bytes, the manifest says {shard.bytes}: "
                "copied in part or changed; `ldm data index` makes the manifest anew"
            )
        return ShardReader(path, index)

    def read(self, sample: int, only: Collection[str] | None = None, without: Collection[str] = ()) -> dict[str, bytes]:
        """The members of a sample by extension, all or some."""
        offsets, sizes = self.index.offsets[sample], self.index.sizes[sample]
        return {
            e: self.member(int(o), int(s))
            for e, o, s in zip(self.index.extensions, offsets, sizes, strict=True)
            if o != ABSENT and e not in without and (only is None or e in only)
        }

    def member(self, offset: int, size: int) -> bytes:
        """The bytes at an offset; OSError if the file ends before."""
        data = os.pread(self._descriptor(), size, offset)
        if len(data) != size:
            raise OSError(f"{self.path.name}: {len(data)} of {size} bytes at offset {offset}")
        return data

    def view(self, sample: int, extension: str) -> memoryview:
        """A member without a copy, from a memory map."""
        with self._lock:
            if self._map is None:
                self._map = mmap.mmap(self._descriptor(), 0, access=mmap.ACCESS_READ)
        column = self.index.extensions.index(extension)
        offset, size = int(self.index.offsets[sample, column]), int(self.index.sizes[sample, column])
        return memoryview(self._map)[offset : offset + size]

    def _descriptor(self) -> int:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._file

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __len__(self) -> int:
        return len(self.index)


class Shards:
    """Random access over the shards of one split by a sample id that counts through them."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        self.manifest = manifest
        self.shards = manifest.split(split)
        self.sizes = tuple(s.samples for s in self.shards)
        self._ends = np.cumsum(self.sizes)
        self._readers: dict[int, ShardReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard number, index in the shard)."""
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - int(self._ends[shard]) + self.sizes[shard]

    def reader(self, shard: int) -> ShardReader:
        """The open reader of a shard."""
        with self._lock:
            if shard not in self._readers:
                if len(self._readers) >= 512:  # bounded open files and indexes
                    self._readers.pop(next(iter(self._readers)))
                self._readers[shard] = ShardReader.open(self.manifest.folder, self.shards[shard])
            return self._readers[shard]

    def key(self, sample: int) -> str:
        """The sample's key."""
        shard, index = self.locate(sample)
        return self.reader(shard).index.keys[index]

    def read(
        self, sample: int, only: Collection[str] | None = None, without: Collection[str] = ()
    ) -> tuple[str, dict[str, bytes]]:
        """(key, members by extension, all or some)."""
        shard, index = self.locate(sample)
        reader = self.reader(shard)
        return reader.index.keys[index], reader.read(index, only, without)

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        return (self.read(i) for i in range(len(self)))
