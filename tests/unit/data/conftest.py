"""Small data sets with pictures whose colour tells which they are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.data.manifest import Manifest
from ldm.data.write import ShardWriter
from tests.unit.data.pictures import color_of, png


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """make_set(count, shard_samples=..., bad=(numbers,)) -> folder; sample i has key s0000i and colour color_of(i)."""

    def make(count: int, shard_samples: int = 7, bad: tuple[int, ...] = (), name: str = "set") -> Path:
        folder = tmp_path / name
        with ShardWriter(folder, "train", max_samples=shard_samples) as writer:
            for i in range(count):
                record = {"captions": [[f"picture {i}", 3], [f"a picture of {i}", 1]]}
                data = b"broken" if i in bad else png(color_of(i))
                writer.add(f"s{i:05d}", {"png": data, "json": json.dumps(record).encode()})
        Manifest(name=name, shards=tuple(writer.shards), folder=folder).write()
        return folder

    return make
