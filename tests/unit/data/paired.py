"""Data sets with partners, for tests."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.manifest import Manifest
from ldm.data.write import ShardWriter


def png_of(values: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def noise(number: int, height: int = 12, width: int = 16) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)


def hole(height: int = 12, width: int = 16) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[2:5, 3:9] = 255
    return mask


def write_set(folder: Path, samples: list[dict[str, Any]], shard_samples: int = 5) -> Path:
    """Sample i has key s0000i and caption `picture i`; its members' values are arrays or bytes."""
    with ShardWriter(folder, "train", max_samples=shard_samples) as writer:
        for i, members in enumerate(samples):
            data = {k: v if isinstance(v, bytes) else png_of(v) for k, v in members.items()}
            writer.add(f"s{i:05d}", {"json": json.dumps({"captions": [f"picture {i}"]}).encode(), **data})
    Manifest(name=folder.name, shards=tuple(writer.shards), folder=folder).write()
    return folder
