"""The offset index of one tar: where each member of each sample lies. It grows with the members and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

Ints = NDArray[np.int64]
_VERSION = "2"
_AGAIN = "`ldm data index` makes it anew"


@dataclass(frozen=True)
class Index:
    """Where the M members of n samples lie in a tar.

    The members of sample i have the numbers `starts`[i] to `starts`[i + 1] (n + 1,); each has a kind, which counts the
    `extensions` (sorted), an offset and a size in bytes (M,). Names are held as UTF-8 with what is not UTF-8 as it was.
    """

    extensions: tuple[str, ...]
    starts: Ints
    kinds: Ints
    offsets: Ints
    sizes: Ints
    names: Names

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def keys(self) -> tuple[str, ...]:
        """The samples' keys."""
        return tuple(self.key(i) for i in range(len(self)))

    def key(self, sample: int) -> str:
        """A sample's key; bytes that are no UTF-8 are lone surrogates, as in the names that Python's tarfile gives."""
        return self.names[sample]

    def members(self, sample: int) -> dict[str, int]:
        """The numbers of a sample's members by extension."""
        start, stop = self.starts.item(sample), self.starts.item(sample + 1)
        return {self.extensions[self.kinds.item(m)]: m for m in range(start, stop)}

    def find(self, sample: int, kind: int) -> int | None:
        """The number of a sample's member of a kind, None if it has none."""
        for member in range(self.starts.item(sample), self.starts.item(sample + 1)):
            if self.kinds.item(member) == kind:
                return member
        return None

    def having(self, extensions: Iterable[str]) -> NDArray[np.bool_]:
        """(n,) whether a sample has a member of any of these extensions."""
        wanted = [k for k, e in enumerate(self.extensions) if e in set(extensions)]
        row = np.repeat(np.arange(len(self)), np.diff(self.starts))
        found = np.zeros(len(self), bool)
        found[row[np.isin(self.kinds, wanted)]] = True
        return found

    def take(self, rows: Sequence[int]) -> Index:
        """The index of some of the samples."""
        chosen = np.asarray(rows, np.int64)
        counts = np.diff(self.starts)[chosen]
        ends = np.cumsum(counts)
        members = np.arange(int(counts.sum())) + np.repeat(self.starts[:-1][chosen] - (ends - counts), counts)
        used = np.unique(self.kinds[members])
        return Index(
            tuple(self.extensions[k] for k in used),
            np.concatenate([[0], ends]).astype(np.int64),
            np.searchsorted(used, self.kinds[members]).astype(np.int64),
            self.offsets[members],
            self.sizes[members],
            Names.of([self.names.raw(i) for i in rows]),
        )

    def digest(self) -> str:
        """A hash of which samples these are, in which order, with which members; the same however they are stored."""
        total = hashlib.blake2b(digest_size=16)
        words = Names.of([_bytes(e) for e in self.extensions])
        for part in (words.ends, self.starts, self.kinds, self.offsets, self.sizes, self.names.ends):
            total.update(struct.pack("<Q", len(part)))
            total.update(part.astype("<i8").tobytes())
        total.update(words.blob)
        total.update(self.names.blob)
        return total.hexdigest()

    def write(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        words = Names.of([_bytes(e) for e in self.extensions])
        tensors = {
            "starts": _small(self.starts),
            "kinds": _small(self.kinds),
            "offsets": _small(self.offsets),
            "sizes": _small(self.sizes),
            "names": np.frombuffer(self.names.blob, np.uint8),
            "name_ends": _small(self.names.ends),
            "extensions": np.frombuffer(words.blob, np.uint8),
            "extension_ends": _small(words.ends),
        }
        beside = path.with_name(f".{path.name[:200]}.{os.getpid()}")
        try:
            beside.write_bytes(save(tensors, metadata={"version": _VERSION}))
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    @staticmethod
    def parse(data: bytes, name: str) -> Index:
        """From the bytes that `write` wrote, also those of older versions; ValueError if they are something else."""
        try:
            tensors = load(data)
            header = json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])
            told = header.get("__metadata__") or {}
            index = _first_form(tensors, told) if "version" not in told else _second_form(tensors, told)
            index._check()
        except (SafetensorError, KeyError, TypeError, ValueError, IndexError, struct.error) as error:
            raise ValueError(f"index {name!r} cannot be read: {error}; {_AGAIN}") from error
        return index

    @staticmethod
    def read(path: Path) -> Index:
        """Read what `write` wrote."""
        return Index.parse(path.read_bytes(), str(path))

    def _check(self) -> None:
        """ValueError if the parts do not fit together."""
        count = len(self.kinds)
        whole = len(self.starts) > 0 and self.starts[0] == 0 and self.starts[-1] == count
        whole = whole and len(self.offsets) == len(self.sizes) == count and len(self.names) == len(self)
        whole = whole and bool((np.diff(self.starts) >= 0).all() and (np.diff(self.names.ends) >= 0).all())
        whole = whole and len(self.names.blob) == self.names.ends.max(initial=0)
        inside = ((self.kinds >= 0) & (self.kinds < len(self.extensions))).all()
        if not (whole and inside and (self.offsets >= 0).all() and (self.sizes >= 0).all()):
            raise ValueError("its parts do not fit together")


@dataclass(frozen=True)
class Names:
    """Many names in one block of bytes; `ends` (n,) is where each ends."""

    blob: bytes
    ends: Ints

    @staticmethod
    def of(names: Sequence[bytes]) -> Names:
        """From each one's bytes."""
        return Names(b"".join(names), np.cumsum([len(n) for n in names], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def raw(self, number: int) -> bytes:
        """One name's bytes."""
        return self.blob[self.ends.item(number - 1) if number else 0 : self.ends.item(number)]

    def __getitem__(self, number: int) -> str:
        return self.raw(number).decode("utf-8", "surrogateescape")


Members = Mapping[str, tuple[int, int]]
"""Extension -> (offset, size)."""


def index_of(rows: Sequence[tuple[str, Members]]) -> Index:
    """An index from (key, members) rows."""
    extensions = tuple(sorted({e for _, members in rows for e in members}))
    number = {e: k for k, e in enumerate(extensions)}
    counts = [len(members) for _, members in rows]
    flat = [(number[e], *members[e]) for _, members in rows for e in sorted(members)]
    table = np.array(flat, np.int64).reshape(-1, 3)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    names = Names.of([_bytes(key) for key, _ in rows])
    return Index(extensions, starts, table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy(), names)


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _small(values: Ints) -> NDArray[Any]:
    """In the smallest unsigned type that holds them."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _second_form(tensors: dict[str, NDArray[Any]], told: Mapping[str, str]) -> Index:
    if told["version"] != _VERSION:
        raise ValueError(f"version {told['version']!r}, this reads {_VERSION}")
    whole = {k: v.astype(np.int64) for k, v in tensors.items() if k not in ("names", "extensions")}
    words = Names(tensors["extensions"].tobytes(), whole["extension_ends"])
    return Index(
        tuple(words[i] for i in range(len(words))),
        whole["starts"],
        whole["kinds"],
        whole["offsets"],
        whole["sizes"],
        Names(tensors["names"].tobytes(), whole["name_ends"]),
    )


def _first_form(tensors: dict[str, NDArray[Any]], told: Mapping[str, str]) -> Index:
    """Of versions up to 0.1: a table of samples by kinds, names joined by spaces and line breaks."""
    extensions = tuple(told["extensions"].split())
    offsets, sizes = tensors["offsets"], tensors["sizes"]
    keys = tensors["keys"].tobytes().split(b"\n") if len(offsets) else []
    if offsets.ndim != 2 or offsets.shape != sizes.shape or offsets.shape[1] != len(extensions):
        raise ValueError(f"{len(extensions)} kinds of members in a table of {offsets.shape}")
    order = sorted(range(len(extensions)), key=lambda k: extensions[k])
    offsets, sizes = offsets[:, order], sizes[:, order]
    there = offsets >= 0
    starts = np.concatenate([[0], np.cumsum(there.sum(1))]).astype(np.int64)
    kinds = np.nonzero(there)[1].astype(np.int64)
    words = tuple(extensions[k] for k in order)
    index = Index(words, starts, kinds, offsets[there], sizes[there], Names.of(keys))
    if len(keys) != len(offsets):
        raise ValueError(f"{len(keys)} keys of {len(offsets)} samples")
    unused = len(np.unique(kinds)) < len(words)
    return index.take(range(len(index))) if unused else index
