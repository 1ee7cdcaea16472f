"""Edges against OpenCV 5.0's, as it gave them for these pictures, and of a step, known in closed form."""

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from ldm.data.canny import canny

EDGES = {
    ("colour", 100, 200): "4104044306246214640282047cee744381c30302006a12654206205c9cf3e6bd"
    "1441042869126c010204e300023ceffd01020c41146952058a420408",
    ("colour", 60, 340): "0104040306240204640282047cee744381c30302006202644206205c9cf3e6bd"
    "1441042861026c010204e300023ceffd01020c010408020408020408",
    ("colour", 0, 20): "4104044306256214640282047cee744381c30302006a12654206205c9cf3e6bd"
    "1441042869126c010204e300023ceffd01020c41146952058a420408",
    ("grey", 100, 200): "0214043e97c442a4284244087cfa74c181c3330a040a03050206041c0408e2f8"
    "72411643412212412222e2f0f31c0c180207c60602053b1bc6219240",
    ("grey", 60, 340): "0214043e97c442a4284244087cfa74c181c33302040a03040206041c0408e2f8"
    "70411640412210412220e2f0f01c0c180207c60602053b03c6218240",
    ("grey", 0, 20): "0214043e97c542a4284244087cfa74c181c3330a040a03050206041c0408e2f8"
    "72411643412212412222e2f0f31c0c180287c60602053b1bc6219240",
}
"""What `cv2.Canny(picture, low, high)` of opencv-python-headless 5.0.0.93 gave, in packed bits."""


def picture() -> NDArray[np.uint8]:
    y, x, c = np.meshgrid(np.arange(20), np.arange(24), np.arange(3), indexing="ij")
    waves = 96 * (1 + np.sin(x / (2.0 + c)) * np.cos(y / 3.0 - c)) + 60 * ((x // 7 + y // 5) % 2)
    return np.clip(np.rint(waves), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("kind", "low", "high"), EDGES)
def test_edges_are_opencvs(kind: str, low: float, high: float) -> None:
    pixels = picture() if kind == "colour" else np.ascontiguousarray(picture()[:, :, 1])
    edges = canny(pixels, low, high)
    assert edges.dtype == np.uint8
    assert set(np.unique(edges)) == {0, 255}
    assert np.packbits(edges > 0).tobytes().hex() == EDGES[kind, low, high]


@pytest.mark.parametrize("seed", range(4))
def test_edges_are_the_installed_opencvs(seed: int) -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*rng.integers(1, 60, 2), 3)).astype(np.uint8)
    for low, high in ((100, 200), (20, 60), (200, 100), (50.5, 150.5)):
        assert np.array_equal(canny(pixels, low, high), cv2.Canny(pixels, low, high))


def test_a_step_has_one_line_where_it_is_strong_enough() -> None:
    """A step of 60 levels has strength 4 x 60 = 240 on both sides of it; the first of two equal ones counts."""
    step = np.zeros((6, 10), np.uint8)
    step[:, 5:] = 60
    line = np.zeros((6, 10), np.uint8)
    line[:, 4] = 255
    assert np.array_equal(canny(step, 100, 239), line)
    assert not canny(step, 100, 240).any()


def test_a_weak_edge_counts_where_it_hangs_together_with_a_strong_one() -> None:
    """The step grows weaker downwards; its weak part is found, the same step alone is not."""
    step = np.zeros((40, 10), np.uint8)
    step[:, 5:] = np.linspace(100, 30, 40)[:, None].astype(np.uint8)
    assert (canny(step, 100, 300) > 0).any(1).all()
    assert not canny(step[25:], 100, 300).any()


def test_large_pictures_with_long_edges_take_no_seconds() -> None:
    spiral = np.zeros((512, 512), np.uint8)
    y, x = np.mgrid[:512, :512] - 256.0
    spiral[(np.hypot(x, y) / 6 - np.arctan2(y, x) / np.pi) % 2 < 1] = 255  # one edge, tens of thousands of pixels long
    start = time.perf_counter()
    canny(spiral, 100, 200)
    assert time.perf_counter() - start < 5
