"""Writes samples into WebDataset tars with their offset indexes and one manifest."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from ldm.data.manifest import Shard, sha256
from ldm.data.offsets import index_of


@dataclass
class ShardWriter:
    """Writes `PREFIX-00000.tar`, ... of at most `max_bytes` or `max_samples`; the same input gives the same bytes.

    A tar appears under its name only when it is whole. `shards` lists the finished ones.
    """

    folder: Path
    prefix: str
    split: str = "train"
    bucket: tuple[int, int] | None = None
    repeats: int = 1
    max_bytes: int = 256 << 20
    max_samples: int = 10_000
    shards: list[Shard] = field(default_factory=list)
    _tar: tarfile.TarFile | None = None
    _rows: list[tuple[str, dict[str, tuple[int, int]]]] = field(default_factory=list)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample; `members` maps extensions without the leading dot to bytes."""
        if "." in os.path.basename(key) or not key:
            raise ValueError(f"key {key!r} must not be empty or hold a dot")
        size = sum(_padded(len(m)) for m in members.values())
        if self._tar is not None and (
            len(self._rows) >= self.max_samples or self._tar.offset + size + 10240 > self.max_bytes
        ):
            self._finish()
        if self._tar is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tar = tarfile.open(  # noqa: SIM115
                self._path(part=True), "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
            )
        where: dict[str, tuple[int, int]] = {}
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            info.mode = 0o644
            self._tar.addfile(info, io.BytesIO(data))
            where[extension] = (self._tar.offset - -(-len(data) // 512) * 512, len(data))
        self._rows.append((key, where))

    def close(self) -> list[Shard]:
        """Finish the last tar and give all shards."""
        if self._tar is not None:
            self._finish()
        return self.shards

    def _path(self, part: bool = False) -> Path:
        name = f"{self.prefix}-{len(self.shards):05d}.tar"
        return self.folder / (f".{name}.part" if part else name)

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        path = self._path()
        index = index_of(self._rows)
        place = path.with_suffix(".index")
        index.write(place)
        os.replace(self._path(part=True), path)
        self.shards.append(
            Shard(
                file=path.name,
                samples=len(self._rows),
                bytes=path.stat().st_size,
                sha256=sha256(path),
                index=place.name,
                split=self.split,
                bucket=self.bucket,
                repeats=self.repeats,
                rows=index.digest(),
            )
        )
        self._rows = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            try:
                self.close()
            except BaseException:
                self._drop()
                raise
        else:
            self._drop()

    def _drop(self) -> None:
        """Leave no part of a tar behind, also where the disk is full."""
        if self._tar is not None:
            with contextlib.suppress(OSError):
                self._tar.close()
            self._tar = None
        self._path(part=True).unlink(missing_ok=True)


def _padded(size: int) -> int:
    return 512 + -(-size // 512) * 512
