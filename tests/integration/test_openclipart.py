"""Debian's `openclipart-png` ingested whole: strangers' pictures, from 2 pixels a side to 231 megapixels."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.build import BuildConfig, build
from ldm.data.inspection import inspect
from ldm.data.loader import DataConfig, Loader
from ldm.data.shards import Shards

FOLDER = Path(os.environ.get("OPENCLIPART", "/usr/share/openclipart/png"))
SMALL, MOST = 16, 100_000_000


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not FOLDER.is_dir(), reason="Debian's package openclipart-png is not installed")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_openclipart_is_ingested_whole(tmp_path: Path) -> None:
    files = sorted(p for p in FOLDER.rglob("*.png") if p.is_file())
    config = BuildConfig(size=256, format="webp", captions_from="name", min_side=SMALL, workers=os.cpu_count() or 1)
    report = build(FOLDER, tmp_path / "set", config)
    assert report.found == len(files)
    assert report.written + len(report.bad) == len(files)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        for entry in report.bad:  # each by its header, as PIL tells it without our limits
            with Image.open(FOLDER / entry["name"]) as image:
                width, height = image.size
            told = "huge" if width * height > MOST else "small" if min(width, height) < SMALL else "damaged"
            assert entry["reason"] == told, entry
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    keys = Counter(key for key, _ in Shards(report.manifest, "train"))
    assert set(keys.values()) == {1}
    assert len(keys) == report.written
    loader = Loader(
        DataConfig(path=str(tmp_path / "set"), size=64, max_bad=0.0), seed=0, micro_batch=min(64, len(keys))
    )
    seen = [k for b in loader.batches(0, loader.steps_per_epoch) for k in b["key"]]
    assert len(seen) == len(set(seen)) == loader.steps_per_epoch * min(64, len(keys))
    assert loader.bad == 0
    summary = inspect(report.manifest, tmp_path / "look", limit=2000)
    assert summary["bad"] == {}
    assert np.isfinite(summary["width"]["median"])
    print(f"{report.found} found, {report.written} written, {dict(report.reasons)}")
