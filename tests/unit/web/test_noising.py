"""Noising strips: the two ends, the noise level in between, the curves' values, the verb's files."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from ldm.cli.__main__ import main
from ldm.diffusion import Discrete, Flow
from ldm.web import noising


def picture(size=(48, 32)):
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    return Image.fromarray(ramp.astype(np.uint8))


def test_ends_of_a_strip():
    """Flow begins with the very picture and ends with the very noise, the same at zero terminal SNR."""
    image = picture()
    made = noising.strip(image, Flow(), [0.0, 500.0, 1000.0], seed=3)
    assert made.size == (3 * 48 + 4, 32)
    assert np.array_equal(np.asarray(made.crop((0, 0, 48, 32))), np.asarray(image))
    last = made.crop((100, 0, 148, 32))
    zero = noising.frames(image, Discrete(zero_terminal_snr=True), [999.0], seed=3)[0]
    assert np.array_equal(np.asarray(last), np.asarray(zero))
    assert not np.array_equal(np.asarray(last), np.asarray(noising.frames(image, Flow(), [1000.0], seed=4)[0]))


def test_noise_level_of_a_frame():
    """On mid grey the deviation is sigma (where nothing is clipped)."""
    grey = Image.new("RGB", (128, 128), (128, 128, 128))
    frame = noising.frames(grey, Flow(), [200.0])[0]
    assert np.asarray(frame).std() / 127.5 == pytest.approx(0.2, rel=0.03)


def test_levels():
    share, bar, decibel = noising.levels(Flow(), 5)
    assert share == [0, 0.25, 0.5, 0.75, 1]
    assert bar == pytest.approx([1, 0.5625, 0.25, 0.0625, 0])
    assert decibel == pytest.approx([math.inf, 20 * math.log10(3), 0, -20 * math.log10(3), -math.inf])


def test_gif_goes_there_and_back():
    frames = noising.frames(picture(), Discrete(), noising.even_times(Discrete(), 4))
    with Image.open(io.BytesIO(noising.gif(frames))) as moving:
        assert moving.n_frames == 6
        assert moving.info["loop"] == 0


def test_verb(tmp_path, capsys):
    picture().save(tmp_path / "in.png")
    argv = [
        "show",
        "noising",
        str(tmp_path / "in.png"),
        "--out",
        str(tmp_path / "out"),
        "--frames",
        "3",
        "--size",
        "24",
    ]
    assert main(argv) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"strips.png", "index.html"} | {f"{n}.{e}" for n in noising.SCHEDULES for e in ("png", "gif")}
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<svg") == 2
    with Image.open(tmp_path / "out" / "flow.png") as made:
        assert made.size == (3 * 24 + 4, 16)
    capsys.readouterr()
    for extra, message in (
        (["--schedule", "odd"], "schedule 'odd' is not one of"),
        (["--frames", "1"], "frames must be at least 2, got 1"),
        (["--size", "0"], "--size must be at least 1"),
    ):
        assert main([*argv, *extra]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "in.png").write_text("no picture")
    assert main(argv) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_refused():
    with pytest.raises(ValueError, match=r"times must lie in \[0, 999\]"):
        noising.strip(picture(), Discrete(), [1000.0])
