"""JSON files of settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.downloads import instead


def read_json(path: Path) -> dict[str, Any]:
    """Keys and values of a file; ValueError if it is missing or something else."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a diffusers folder")
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {instead(path) or error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected keys and values")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write keys and values."""
    path.write_text(json.dumps(dict(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
