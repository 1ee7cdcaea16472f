"""Captions of PixArt are cleaned as diffusers' pipelines clean them (`_clean_caption`), with its packages and without.

Where beautifulsoup4 is not installed, one parser of the standard library stands in its place on both sides.
"""

from __future__ import annotations

import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as theirs

from ldm.checkpoint.opened import Components
from ldm.checkpoint.schedulers import scheduler_from_diffusers
from ldm.diffusion.process import Process
from ldm.models.text.captions import clean
from ldm.pipeline import TextToImage
from tests.families import make

HOSTILE = [
    "",
    " ",
    "A Red APPLE ",
    "a dog,a cat/a mouse",
    "see https://example.com/a?b=1 now",
    "www.shop.co.uk/x-1 big sale!",
    "HTTP:// x",
    "www:evil me@mail.com",
    "mail me@x.org or @nick_1",
    "<b>bold</b> &amp; <i>it</i> &quot;q&quot;",
    "<person> in a hat",
    "<script>x=1</script>y",
    "a &lt;b&gt; c &#65;&#x42; &amp;amp; d",
    "<!-- hidden --> seen <br/>x",
    "5 < 6 and 7 > 3 <",
    "100%25 cotton+shirt%20red",
    "\u4e00\u9fff\u3400 chinese \u3042 \u30ab kana \u3300\u31f0",
    "dash \u2014 \u2013 \u2212 \u301c \ufe63 end",
    "\u00abquotes\u00bb \u201cdouble\u201d \u2018single\u2019 `tick`\u00b4",
    '"""AUSVERKAUFT"""',
    "***SALE*** #sale #12 #123456 1234567",
    "ip 127.0.0.1 here",
    "article 1:23 ",
    "line\\nbreak\nreal",
    "photo_of-a_red-cat.jpg",
    "img_001.PNG and my.file.webp",
    "this-is-my-cute-cat",
    "this_is_a_b_c",
    "a-b-c",
    "wait...what",
    " . dot . ",
    "jc6640 jc6640vc 6640vc231 j2d1a2a3",
    "free shipping worldwide free shipping",
    "download free free download",
    "click for more click on this",
    "png image jpg images",
    "page 12 of",
    "1920x1080 and 3.5\u00d72 2\u04453",
    "a : b, c",
    "'quoted'",
    '"a" "b"',
    "-lead trail-",
    ".hidden",
    "_x_",
    ";semi:",
    "emoji \U0001f600 \u2122 \u00ae \u00a9",
    "caf\u00c3\u00a9",
    "sch\u00c3\u00b6n \u212b \ufb01",
    "a|b\\c[d]{e}(f)~",
    "tab\tand  spaces",
    "\u00a1hola! \u00bfque?",
    "x" * 300,
    "1.5.2 3,000.50 a.b,c",
    "a&ampb &quotx",
    "&copy; &nbsp;&nbsp; 10&deg;",
    "<a href='http://x.com'>link</a> text",
    "<<>> <> </p>",
]


class _Text(HTMLParser):
    def __init__(self, data: str, features: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(data)
        self.close()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def soup(monkeypatch: pytest.MonkeyPatch) -> Any:
    try:
        from bs4 import BeautifulSoup
    except ImportError:
        BeautifulSoup: Any = _Text  # type: ignore[no-redef]
        module = types.ModuleType("bs4")
        module.BeautifulSoup = BeautifulSoup  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "bs4", module)
    import ftfy

    monkeypatch.setattr(theirs, "BeautifulSoup", BeautifulSoup, raising=False)
    monkeypatch.setattr(theirs, "ftfy", ftfy, raising=False)
    monkeypatch.setattr(theirs, "is_bs4_available", lambda: True)
    monkeypatch.setattr(theirs, "is_ftfy_available", lambda: True)
    return BeautifulSoup


@pytest.mark.filterwarnings("ignore")
def test_cleaned_as_theirs(soup: Any) -> None:
    pipe = object.__new__(theirs.PixArtSigmaPipeline)
    for caption in HOSTILE:
        (want,) = pipe._text_preprocessing(caption, clean_caption=True)
        assert clean(caption) == want, caption


def test_small_letters_alone_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What their pipeline does where a package is missing is what `lower` does; cleaning that is asked for says it."""
    monkeypatch.setattr(theirs, "is_bs4_available", lambda: False)
    pipe = object.__new__(theirs.PixArtSigmaPipeline)
    assert pipe._text_preprocessing(HOSTILE, clean_caption=True) == [text.lower().strip() for text in HOSTILE]
    monkeypatch.setitem(sys.modules, "bs4", None)
    with pytest.raises(ValueError, match=r"^cleaning captions needs beautifulsoup4 and ftfy: pip install"):
        clean("a cat")


def test_a_pipeline_is_told_to_clean(soup: Any, tmp_path: Path) -> None:
    parts = make("pixart", tmp_path / "t5")
    pipe = TextToImage(parts.network, parts.codec, parts.text, scheduler_process(parts))
    prompt = "A <b>red</b> apple (photo.jpg) https://a.com"
    tokens = pipe.text[0].tokenizer.encode
    assert tokens(prompt) == tokens(prompt.lower())
    pipe.clean_captions()
    assert tokens(prompt) == tokens("a red apple")
    pipe.clean_captions(False)
    assert tokens(prompt) == tokens(prompt.lower()) != tokens("a red apple")
    parts = make("flux", tmp_path / "t5")
    with pytest.raises(ValueError, match=r"^clean_captions: is PixArt's; the model is FLUX\.1$"):
        TextToImage(parts.network, parts.codec, parts.text, scheduler_process(parts)).clean_captions()


def scheduler_process(parts: Components) -> Process:
    how = scheduler_from_diffusers(parts.scheduler)
    return Process(schedule=how.schedule, prediction=how.prediction)
