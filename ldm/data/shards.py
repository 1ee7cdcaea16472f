"""WebDataset tars with an offset index: any member of any sample is one positioned read away, here or far."""

from __future__ import annotations

import bisect
import itertools
import json
import os
import struct
import tarfile
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ldm.data.formats import passed_over
from ldm.data.manifest import Manifest, Shard
from ldm.data.remote import Remote, RemoteConfig, ShardCache, is_remote, join

ABSENT = -1
_MAX_OPEN = 512
_BLOBS = 256 << 20
_CONNECTIONS = 16


@dataclass(frozen=True)
class Index:
    """Where the members of n samples lie in a tar: offsets and sizes are (n, E) for E extensions, ABSENT if missing."""

    extensions: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.offsets)

    def take(self, rows: Sequence[int]) -> Index:
        """The index of some of the samples."""
        return Index(self.extensions, self.offsets[rows], self.sizes[rows], tuple(self.keys[i] for i in rows))

    def write(self, path: Path) -> None:
        """Write as safetensors: offsets, sizes, keys joined by newlines."""
        keys = np.frombuffer("\n".join(self.keys).encode() or b"\n", np.uint8)
        tensors = {"offsets": self.offsets, "sizes": self.sizes, "keys": keys}
        path.write_bytes(save(tensors, metadata={"extensions": " ".join(self.extensions)}))

    @staticmethod
    def parse(data: bytes, name: str) -> Index:
        """From the bytes that `write` wrote; ValueError if they are something else."""
        try:
            tensors = load(data)
            header = json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])
            extensions = tuple(header["__metadata__"]["extensions"].split())
            offsets, sizes = tensors["offsets"], tensors["sizes"]
            text = tensors["keys"].tobytes().decode()
        except (SafetensorError, KeyError, ValueError, struct.error) as error:
            raise ValueError(f"index {name!r} cannot be read: {error}; `ldm data index` makes it anew") from error
        keys = tuple(text.split("\n")) if len(offsets) else ()
        if len(keys) != len(offsets) or offsets.shape != sizes.shape:
            raise ValueError(f"index {name!r} is damaged; `ldm data index` makes it anew")
        return Index(extensions, offsets, sizes, keys)

    @staticmethod
    def read(path: Path) -> Index:
        """Read what `write` wrote."""
        return Index.parse(path.read_bytes(), str(path))


def scan(path: Path) -> Index:
    """The index of a plain tar by one pass over its headers; members of a sample are neighbours with one key.

    A truncated last member ends the index before its sample. Raises ValueError for a file that is no plain tar.
    """
    length = path.stat().st_size
    rows: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or "." not in os.path.basename(member.name) or passed_over(member.name):
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


class ShardReader(ABC):
    """One tar with its index. Threads may share it."""

    def __init__(self, name: str, index: Index) -> None:
        self.name = name
        self.index = index
        self._columns = {extension: column for column, extension in enumerate(index.extensions)}

    def __len__(self) -> int:
        return len(self.index)

    def read(self, sample: int, only: Collection[str] | None = None, without: Collection[str] = ()) -> dict[str, bytes]:
        """The members of a sample by extension, all or some."""
        return {
            extension: self.member(sample, column)
            for column, extension in enumerate(self.index.extensions)
            if self.index.offsets[sample, column] != ABSENT
            and extension not in without
            and (only is None or extension in only)
        }

    def column(self, extension: str) -> int | None:
        """An extension's number, None if no sample has it."""
        return self._columns.get(extension)

    def has(self, sample: int, column: int) -> bool:
        """Whether a sample has a member."""
        return self.index.offsets.item(sample, column) != ABSENT

    def size(self, sample: int, column: int) -> int:
        """Bytes of a sample's member."""
        return self.index.sizes.item(sample, column)

    def fill(self, sample: int, column: int, start: int, out: memoryview) -> None:
        """Put a member's bytes from `start` on into `out`."""
        out[:] = memoryview(self.member(sample, column))[start : start + len(out)]

    @abstractmethod
    def member(self, sample: int, column: int) -> bytes:
        """The bytes of a sample's member by its extension's number."""

    def prefetch(self, sample: int) -> None:  # noqa: B027 (a default, not a duty)
        """Get a sample's bytes ready; nothing where reading is cheap."""


class LocalReader(ShardReader):
    """A tar on this machine by its open descriptor, which it owns."""

    def __init__(self, name: str, index: Index, descriptor: int) -> None:
        super().__init__(name, index)
        self._file = descriptor

    def member(self, sample: int, column: int) -> bytes:
        """OSError if the file ends before."""
        offset, size = int(self.index.offsets[sample, column]), int(self.index.sizes[sample, column])
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise OSError(f"{self.name}: {len(data)} of {size} bytes at offset {offset}")
        return data

    def fill(self, sample: int, column: int, start: int, out: memoryview) -> None:
        """Read there without a copy. Not a memory map, which would end the process where a disk fails."""
        place = self.index.offsets.item(sample, column) + start
        if os.preadv(self._file, [out], place) != len(out):
            raise OSError(f"{self.name}: not {len(out)} bytes at offset {place}")

    def __del__(self) -> None:
        os.close(self._file)


class RemoteReader(ShardReader):
    """A tar read by ranges: one request a sample, the last ones kept."""

    def __init__(self, name: str, index: Index, remote: Remote, blobs: Blobs) -> None:
        super().__init__(name, index)
        self._remote = remote
        self._blobs = blobs

    def member(self, sample: int, column: int) -> bytes:
        """From the sample's blob, requested if it is not there."""
        first, blob = self._blob(sample)
        offset, size = int(self.index.offsets[sample, column]), int(self.index.sizes[sample, column])
        return blob[offset - first : offset - first + size]

    def prefetch(self, sample: int) -> None:
        """Request the sample's blob."""
        self._blob(sample)

    def _blob(self, sample: int) -> tuple[int, bytes]:
        known = self._blobs.get(self.name, sample)
        if known is not None:
            return known
        present = self.index.offsets[sample] != ABSENT
        first = int(self.index.offsets[sample][present].min())
        end = int((self.index.offsets[sample] + self.index.sizes[sample])[present].max())
        blob = (first, self._remote.read(self.name, first, end))
        self._blobs.put(self.name, sample, blob)
        return blob


class Blobs:
    """The last samples' bytes by (shard, sample), bounded in bytes."""

    def __init__(self, limit: int = _BLOBS) -> None:
        self._kept: OrderedDict[tuple[str, int], tuple[int, bytes]] = OrderedDict()
        self._room = limit
        self._lock = threading.Lock()

    def get(self, name: str, sample: int) -> tuple[int, bytes] | None:
        """(offset in the tar, bytes), if kept."""
        with self._lock:
            return self._kept.get((name, sample))

    def put(self, name: str, sample: int, blob: tuple[int, bytes]) -> None:
        """Keep it, dropping the oldest beyond the bound."""
        with self._lock:
            old = self._kept.pop((name, sample), None)
            self._room += len(old[1]) if old else 0
            self._kept[name, sample] = blob
            self._room -= len(blob[1])
            while self._room < 0 and len(self._kept) > 1:
                _, (_, dropped) = self._kept.popitem(last=False)
                self._room += len(dropped)


class Shards:
    """Random access over the shards of one split by a sample id that counts through them."""

    def __init__(self, manifest: Manifest, split: str, remote: RemoteConfig | None = None) -> None:
        self.manifest = manifest
        self.shards = manifest.split(split)
        self.sizes = tuple(s.samples for s in self.shards)
        self._ends = list(itertools.accumulate(self.sizes))
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}
        config = remote or RemoteConfig()
        self._remote = Remote(config)
        self._blobs = Blobs()
        self._cache = None if config.cache is None else ShardCache(Path(config.cache), config.cache_bytes)
        far = any(is_remote(join(str(manifest.folder), s.file)) for s in self.shards)
        self._pool = ThreadPoolExecutor(_CONNECTIONS, "ldm-fetch") if far else None

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard number, index in the shard)."""
        shard = bisect.bisect_right(self._ends, sample)
        return shard, sample - self._ends[shard] + self.sizes[shard]

    def reader(self, shard: int) -> ShardReader:
        """The open reader of a shard."""
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
            opening = self._opening.setdefault(shard, threading.Lock())
        with opening:  # opening may download: others must not wait for this one
            with self._lock:
                if shard in self._readers:
                    return self._readers[shard]
            reader = self._open(self.shards[shard])
            with self._lock:
                self._readers[shard] = reader
                if len(self._readers) > _MAX_OPEN:  # bounded open files and indexes
                    self._readers.popitem(last=False)
            return reader

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

    def prefetch(self, samples: Sequence[int]) -> None:
        """Request far samples side by side; nothing for local shards."""
        if self._pool is not None:
            places = [self.locate(s) for s in samples]
            list(self._pool.map(lambda place: self.reader(place[0]).prefetch(place[1]), places))

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        return (self.read(i) for i in range(len(self)))

    def _open(self, shard: Shard) -> ShardReader:
        """Open a shard; scans a local tar if its index file is missing. ValueError if it does not fit the manifest."""
        folder = self.manifest.root
        name = join(folder, shard.file)
        descriptor = self._descriptor(name, shard)
        place = join(folder, shard.index)
        if is_remote(place):
            index = Index.parse(self._remote.read(place), place)
        elif Path(place).is_file():
            index = Index.read(Path(place))
        elif not is_remote(name):
            index = scan(Path(name))
        else:
            raise ValueError(f"shard {name!r} has no index {place!r}")
        if len(index) != shard.samples:
            raise ValueError(f"shard {name!r}: {len(index)} samples found, the manifest says {shard.samples}")
        if descriptor is None:
            return RemoteReader(name, index, self._remote, self._blobs)
        return LocalReader(name, index, descriptor)

    def _descriptor(self, name: str, shard: Shard) -> int | None:
        """An open local file, the shard itself or its copy in the cache; None to read by ranges."""
        if is_remote(name):
            fetch = lambda path: self._remote.download(name, path, shard.bytes, shard.sha256)  # noqa: E731
            found = self._cache.open(name, shard.bytes, shard.sha256, fetch) if self._cache is not None else None
            if found is None and name.startswith("pipe:"):
                raise ValueError(f"{name}: a command's output needs room in the cache (data.remote.cache)")
            return found
        if not Path(name).is_file():
            raise ValueError(f"shard {name!r} of the manifest does not exist")
        size = Path(name).stat().st_size
        if size != shard.bytes:
            raise ValueError(
                f"shard {name!r} has {size} bytes, the manifest says {shard.bytes}: "
                "copied in part or changed; `ldm data index` makes the manifest anew"
            )
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC)
