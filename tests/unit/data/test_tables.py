"""img2dataset's output: its json and parquet, filtered by an expression."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.data.indexing import index
from ldm.data.shards import Shards
from ldm.data.write import ShardWriter
from tests.unit.data.pictures import png


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars with keys as img2dataset makes them: shard number, then number in the shard."""
    with ShardWriter(tmp_path, "0000", max_samples=6) as writer:
        for i in range(12):
            fields = {"key": f"{i // 6:05d}{i % 6:04d}", "status": "success", "width": 100 + 50 * i, "height": 200}
            record = json.dumps({**fields, "caption": f"c{i}", "url": "http://x"}).encode()
            writer.add(fields["key"], {"jpg": png((i, i, i)), "txt": b"c", "json": record})
    for path in tmp_path.glob("*.index"):
        path.unlink()
    return tmp_path


def kept(folder: Path, where: str) -> list[int]:
    manifest, _ = index(folder, where=where)
    keys = [key for key, _ in Shards(manifest, "train")]
    return sorted(int(k[:5]) * 6 + int(k[5:]) for k in keys)


def test_sizes_and_aspects_come_from_the_json(folder: Path) -> None:
    assert kept(folder, "width >= 300 and aspect <= 2") == [4, 5, 6]
    assert kept(folder, "max(width, height) < 210") == [0, 1, 2]


def test_scores_come_from_the_parquet(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    for number, tar in enumerate(sorted(folder.glob("*.tar"))):
        rows: list[dict[str, Any]] = [
            {"key": f"{number:05d}{i:04d}", "pwatermark": 0.1 * i, "similarity": None if i == 0 else 0.3 + 0.01 * i}
            for i in range(6)
        ]
        failed = {"key": f"{number:05d}9999", "pwatermark": 0.0, "similarity": 0.9}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, failed]), tar.with_suffix(".parquet"))
    assert kept(folder, "pwatermark < 0.35 and similarity > 0.3") == [1, 2, 3, 7, 8, 9]
    assert kept(folder, "pwatermark < 0.35 and width >= 300") == [6, 7, 8, 9]


def test_without_pyarrow_the_message_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tar in folder.glob("*.tar"):
        tar.with_suffix(".parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert kept(folder, "width < 150") == [0]  # the json says it: no parquet needed
    with pytest.raises(ValueError, match=r"reading parquet needs pyarrow: pip install 'ldm\[parquet\]'"):
        index(folder, where="pwatermark < 0.5")
