"""The parquet that img2dataset writes beside each tar: fields of samples by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def table_of(tar: Path) -> Path | None:
    """The parquet beside a tar, if there is one."""
    path = tar.with_suffix(".parquet")
    return path if path.is_file() else None


class MissingLibrary(ValueError):
    """pyarrow is not installed: nothing is wrong with the file."""


def rows(path: Path) -> dict[str, dict[str, Any]]:
    """Fields by sample key. Raises ValueError if it cannot be read, MissingLibrary without pyarrow."""
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
        from pyarrow import ArrowException  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingLibrary(f"{path}: reading parquet needs pyarrow: pip install 'ldm[parquet]'") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as parquet: {error}") from error
    if "key" not in table.column_names:
        raise ValueError(f"{path}: no column 'key'; has {table.column_names}")
    return {str(row.pop("key")): row for row in table.to_pylist()}
