"""WebDataset tars with an offset index: any member of any sample is one positioned read away, here or far."""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm.data.bad import BadSample
from ldm.data.manifest import Manifest, Shard, printable
from ldm.data.offsets import Index, index_of
from ldm.data.remote import Remote, RemoteConfig, RemoteDamage, RemoteError, ShardCache, is_remote, join
from ldm.data.scan import scan
from ldm.progress import line

_MAX_OPEN = 512
_BLOBS = 256 << 20
_CONNECTIONS = 16
_NEAR = 1 << 20  # members this near are asked for in one request


class ShardReader(ABC):
    """One tar with its index. Threads may share it.

    `lost` (n,) marks samples that the tar has no more, as where it was copied in part; reading one raises `why`.
    """

    def __init__(
        self, name: str, index: Index, lost: NDArray[np.bool_] | None = None, why: BadSample | None = None
    ) -> None:
        self.name = name
        self.index = index
        self._lost = lost
        self._why = why
        self._kinds = {extension: kind for kind, extension in enumerate(index.extensions)}

    def __len__(self) -> int:
        return len(self.index)

    def read(self, sample: int, only: Collection[str] | None = None, without: Collection[str] = ()) -> dict[str, bytes]:
        """The members of a sample by extension, all or some. Raises BadSample if the tar lacks them."""
        self._look(sample)
        return {
            extension: self.member(sample, number)
            for extension, number in self.index.members(sample).items()
            if extension not in without and (only is None or extension in only)
        }

    def find(self, sample: int, extension: str) -> int | None:
        """The number of a sample's member, None if it has none. Raises BadSample if the tar lacks the sample."""
        self._look(sample)
        kind = self._kinds.get(extension)
        return None if kind is None else self.index.find(sample, kind)

    def size(self, number: int) -> int:
        """Bytes of a member."""
        return self.index.sizes.item(number)

    def fill(self, sample: int, number: int, start: int, out: memoryview) -> None:
        """Put a member's bytes from `start` on into `out`."""
        out[:] = memoryview(self.member(sample, number))[start : start + len(out)]

    @abstractmethod
    def member(self, sample: int, number: int) -> bytes:
        """The bytes of a sample's member by its number. Raises BadSample if the tar ends before."""

    def prefetch(self, sample: int) -> None:  # noqa: B027 (a default, not a duty)
        """Get a sample's bytes ready; nothing where reading is cheap."""

    def _look(self, sample: int) -> None:
        if self._lost is not None and self._lost[sample]:
            raise self._why or BadSample("truncated", self.name)


class LostReader(ShardReader):
    """A tar that cannot be read at all."""

    def __init__(self, name: str, index: Index, why: BadSample) -> None:
        super().__init__(name, index, np.ones(len(index), bool), why)

    def member(self, sample: int, number: int) -> bytes:
        """Raises BadSample."""
        self._look(sample)
        raise AssertionError


class LocalReader(ShardReader):
    """A tar on this machine by its open descriptor, which it owns."""

    def __init__(
        self,
        name: str,
        index: Index,
        descriptor: int,
        lost: NDArray[np.bool_] | None = None,
        why: BadSample | None = None,
    ) -> None:
        super().__init__(name, index, lost, why)
        self._file = descriptor

    def member(self, sample: int, number: int) -> bytes:
        """Raises BadSample if the file ends before or the disk cannot read it."""
        offset, size = self.index.offsets.item(number), self.index.sizes.item(number)
        with _disk(self.name, offset):
            data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise BadSample("truncated", f"{self.name}: {len(data)} of {size} bytes at offset {offset}")
        return data

    def fill(self, sample: int, number: int, start: int, out: memoryview) -> None:
        """Read there without a copy. Not a memory map, which would end the process where a disk fails."""
        place = self.index.offsets.item(number) + start
        with _disk(self.name, place):
            count = os.preadv(self._file, [out], place)
        if count != len(out):
            raise BadSample("truncated", f"{self.name}: {count} of {len(out)} bytes at offset {place}")

    def __del__(self) -> None:
        os.close(self._file)


@contextlib.contextmanager
def _disk(name: str, offset: int) -> Iterator[None]:
    """A place that the disk cannot read is damage; other errors, such as of memory, are not."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise BadSample("unreadable", f"{name}: {error.strerror} at offset {offset}") from error


class RemoteReader(ShardReader):
    """A tar of `length` bytes read by ranges: one request a sample where its members are near, the last ones kept."""

    def __init__(self, name: str, index: Index, remote: Remote, blobs: Blobs, length: int) -> None:
        super().__init__(name, index)
        self._remote = remote
        self._blobs = blobs
        self._length = length

    def member(self, sample: int, number: int) -> bytes:
        """From the sample's blob, requested if it is not there. Raises BadSample if the file is shorter than it was."""
        offset, size = self.index.offsets.item(number), self.index.sizes.item(number)
        first, data = next((f, d) for f, d in self._blob(sample) if f <= offset and offset + size <= f + len(d))
        return data[offset - first : offset - first + size]

    def prefetch(self, sample: int) -> None:
        """Request the sample's blob."""
        self._blob(sample)

    def _blob(self, sample: int) -> Blob:
        known = self._blobs.get(self.name, sample)
        if known is not None:
            return known
        part = slice(self.index.starts.item(sample), self.index.starts.item(sample + 1))
        offsets = self.index.offsets[part].tolist()
        ends = (self.index.offsets[part] + self.index.sizes[part]).tolist()
        spans: list[tuple[int, int]] = []
        for start, end in sorted(zip(offsets, ends, strict=True)):
            if spans and start - spans[-1][1] <= _NEAR:
                spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
            else:
                spans.append((start, end))
        blob = tuple((start, self._range(start, end) if end > start else b"") for start, end in spans)
        self._blobs.put(self.name, sample, blob)
        return blob

    def _range(self, start: int, end: int) -> bytes:
        try:
            return self._remote.read(self.name, start, end)
        except RemoteDamage as error:
            raise BadSample("missing", str(error)) from error
        except RemoteError as error:
            have = self._remote.size(self.name)
            if have is None or have == self._length:
                raise
            raise BadSample("truncated", f"{self.name}: {have} bytes, the manifest says {self._length}") from error


Blob = tuple[tuple[int, bytes], ...]
"""Stretches of a tar, each with its offset."""


class Blobs:
    """The last samples' bytes by (shard, sample), bounded in bytes."""

    def __init__(self, limit: int = _BLOBS) -> None:
        self._kept: OrderedDict[tuple[str, int], Blob] = OrderedDict()
        self._room = limit
        self._lock = threading.Lock()

    def get(self, name: str, sample: int) -> Blob | None:
        """The stretches, if kept."""
        with self._lock:
            return self._kept.get((name, sample))

    def put(self, name: str, sample: int, blob: Blob) -> None:
        """Keep it, dropping the oldest beyond the bound."""
        with self._lock:
            old = self._kept.pop((name, sample), ())
            self._room += _length(old)
            self._kept[name, sample] = blob
            self._room -= _length(blob)
            while self._room < 0 and len(self._kept) > 1:
                _, dropped = self._kept.popitem(last=False)
                self._room += _length(dropped)


def _length(blob: Blob) -> int:
    return sum(len(data) for _, data in blob)


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

    def index(self, number: int) -> Index:
        """A shard's index; the tar is not opened. BadSample if it does not fit the manifest."""
        shard = self.shards[number]
        return self._index(join(self.manifest.root, shard.file), shard)

    def key(self, sample: int) -> str:
        """The sample's key."""
        shard, index = self.locate(sample)
        return self.reader(shard).index.key(index)

    def read(
        self, sample: int, only: Collection[str] | None = None, without: Collection[str] = ()
    ) -> tuple[str, dict[str, bytes]]:
        """(key, members by extension, all or some). Raises BadSample if the tar is not what the manifest says."""
        shard, index = self.locate(sample)
        reader = self.reader(shard)
        return reader.index.key(index), reader.read(index, only, without)

    def prefetch(self, samples: Sequence[int]) -> None:
        """Request far samples side by side; nothing for local shards."""
        if self._pool is not None:
            list(self._pool.map(self._prefetch, samples))

    def _prefetch(self, sample: int) -> None:
        shard, index = self.locate(sample)
        with contextlib.suppress(BadSample):  # told where it is read
            self.reader(shard).prefetch(index)

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        return (self.read(i) for i in range(len(self)))

    def _open(self, shard: Shard) -> ShardReader:
        """Open a shard. One that is missing or damaged gives a reader whose samples are bad, said once."""
        name = join(self.manifest.root, shard.file)
        keys = index_of([(f"{shard.file}#{i}", {}) for i in range(shard.samples)])
        try:
            keys = index = self._index(name, shard)
            if not is_remote(name):
                return self._local(name, shard, index)
            descriptor = self._fetched(name, shard)
        except BadSample as error:
            say(f"data: {error.detail}; its {shard.samples} samples are left out")
            return LostReader(name, keys, error)
        if descriptor is None:
            return RemoteReader(name, index, self._remote, self._blobs, shard.bytes)
        return LocalReader(name, index, descriptor)

    def _index(self, name: str, shard: Shard) -> Index:
        """A shard's index; a local tar is scanned if the file is missing or of no use. BadSample if it does not fit."""
        place = join(self.manifest.root, shard.index)
        try:
            if is_remote(place):
                index = Index.parse(self._remote.read(place), place)
            elif Path(place).is_file():
                index = Index.read(Path(place))
            else:
                raise ValueError(f"shard {name!r} has no index {place!r}")
        except ValueError as error:
            if isinstance(error, RemoteError) and not isinstance(error, RemoteDamage):
                raise
            if is_remote(name):
                raise BadSample("no_index", str(error)) from error
            index = _scanned(name)
            if Path(place).is_file():
                say(f"data: {error}; until then {name!r} is scanned at each start")
        if len(index) != shard.samples:
            raise BadSample(
                "no_index",
                f"shard {name!r}: {len(index)} samples found, the manifest says {shard.samples}; `ldm data index` "
                "makes manifest and index anew",
            )
        return index

    def _local(self, name: str, shard: Shard, index: Index) -> ShardReader:
        """An open local tar; of one that has another size, the samples that lie where the index says."""
        path = Path(name)
        if not path.is_file():
            raise BadSample("missing", f"shard {name!r} of the manifest does not exist")
        size = path.stat().st_size
        lost = why = None
        if size != shard.bytes:
            there = set(_rows(_scanned(name)))
            lost = np.array([row not in there for row in _rows(index)], bool)
            told = f"shard {name!r} has {size} bytes, the manifest says {shard.bytes}: copied in part or changed"
            why = BadSample("truncated" if size < shard.bytes else "changed", told)
            how = "`ldm data index` makes the manifest anew"
            if self.manifest.cached is not None:
                how = "the same `ldm data encode` again encodes its part anew"
            say(f"data: {told}; {int(lost.sum())} of its {len(index)} samples are left out ({how})")
        try:
            return LocalReader(name, index, os.open(name, os.O_RDONLY | os.O_CLOEXEC), lost, why)
        except PermissionError as error:
            raise BadSample("unreadable", f"shard {name!r}: {error.strerror}") from error

    def _fetched(self, name: str, shard: Shard) -> int | None:
        """The open copy of a far shard in the cache; None to read by ranges."""
        fetch = lambda path: self._remote.download(name, path, shard.bytes, shard.sha256)  # noqa: E731
        try:
            found = self._cache.open(name, shard.bytes, shard.sha256, fetch) if self._cache is not None else None
        except RemoteDamage as error:
            raise BadSample("damaged", str(error)) from error
        if found is None and name.startswith("pipe:"):
            raise ValueError(f"{name}: a command's output needs room in the cache (data.remote.cache)")
        return found


def say(message: str) -> None:
    """Print a line to standard error, on whatever rank, above a progress bar: it is about what this process met."""
    line(printable(message), sys.stderr)


def _scanned(name: str) -> Index:
    """A local tar's index by a pass over it. BadSample if that cannot be."""
    try:
        return scan(Path(name)).index
    except FileNotFoundError as error:
        raise BadSample("missing", f"shard {name!r} of the manifest does not exist") from error
    except (ValueError, IsADirectoryError, PermissionError) as error:
        raise BadSample("damaged", str(error)) from error


def _rows(index: Index) -> list[tuple[object, ...]]:
    """Key and members of each sample."""
    members = list(zip(index.kinds.tolist(), index.offsets.tolist(), index.sizes.tolist(), strict=True))
    starts = index.starts.tolist()
    words = index.extensions
    return [
        (index.key(i), *((words[k], o, s) for k, o, s in members[starts[i] : starts[i + 1]])) for i in range(len(index))
    ]
