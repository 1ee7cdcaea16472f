"""The page: its pictures are those of `ldm sample`, and its mistakes are told on the page."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import ldm
from ldm.cli import serve as verb
from ldm.web.serve import build_app, draw

FIELDS = {"negative": "", "sampler": "ddim", "steps": 2, "guidance": 2.0, "seed": 5, "count": 2}


@pytest.fixture(scope="module")
def pipe():
    return ldm.load("emoji")


def test_pictures_are_those_of_the_pipeline(pipe):
    ours = draw(pipe, "  a red apple ", **FIELDS)
    theirs = pipe("a red apple", sampler="ddim", steps=2, guidance=2.0, seed=5, count=2)
    assert len(ours) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("prompt", "change", "words"),
    [
        (" ", {}, "prompt"),
        ("x", {"count": 0}, "count"),
        ("x", {"count": 65}, "count"),
        ("x", {"sampler": "no"}, "no"),
    ],
)
def test_mistakes_are_named(pipe, prompt, change, words):
    with pytest.raises(ValueError, match=words):
        draw(pipe, prompt, **{**FIELDS, **change})


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"ldm\[web\]"):
        verb.main([])


def test_port_is_checked():
    with pytest.raises(ValueError, match="--port"):
        verb.main(["--port", "0"])


def test_a_browser_gets_pictures(pipe):
    pytest.importorskip("gradio", reason="the extra `web` is not installed")
    from gradio_client import Client

    app = build_app(pipe, "emoji", ["a red apple"])
    _, url, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        client = Client(url, verbose=False)
        pictures = client.predict("a red apple", "", "ddim", 2, 2.0, 5, 1, api_name="/draw")
        with pytest.raises(Exception, match="prompt"):
            client.predict("", "", "ddim", 2, 2.0, 5, 1, api_name="/draw")
    finally:
        app.close()
    from PIL import Image

    seen = np.asarray(Image.open(pictures[0]["image"]).convert("RGB"))
    assert np.array_equal(seen, np.asarray(draw(pipe, "a red apple", **{**FIELDS, "count": 1})[0]))
