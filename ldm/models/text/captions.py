"""The cleaning of captions that PixArt's published pipeline does where its packages are there (`clean_caption`).

It is of web pages' alternative texts: addresses, markup, Chinese characters, names of files, numbers of articles and
shops' phrases go, dashes and quotes become one kind. Small letters alone are what that pipeline does without it.
"""

from __future__ import annotations

import html
import re
from typing import Any
from urllib.parse import unquote_plus

_SITES = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_SIGNS = "#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~)(][}{|\\/*"
_Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> _Rules:
    return tuple((re.compile(pattern), instead) for pattern, instead in pairs)


_ADDRESSES = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITES})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITES})", ""),
)
_MARKS = _rules(
    (r"@\w+\b", ""),
    ("[\u31c0-\u9fff]+", ""),
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (f"[{re.escape(_SIGNS)}]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINTS = re.compile("[-_]")
_PHRASES = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean(caption: str) -> str:
    """A caption as that pipeline gives it to T5: its cleaning, twice.

    Raises ValueError without the packages beautifulsoup4 and ftfy.
    """
    soup, fix = _packages()
    for _ in range(2):
        caption = _once(caption, soup, fix)
    return caption


def _once(caption: str, soup: Any, fix: Any) -> str:
    caption = _applied(_ADDRESSES, unquote_plus(caption).strip().lower())
    caption = _applied(_MARKS, soup(caption, features="html.parser").text)
    if len(_JOINTS.findall(caption)) > 3:  # this-is-a-name-of-a-file
        caption = _JOINTS.sub(" ", caption)
    caption = html.unescape(html.unescape(fix(caption)))
    return _applied(_PHRASES, caption).strip()


def _applied(rules: _Rules, text: str) -> str:
    for pattern, instead in rules:
        text = pattern.sub(instead, text)
    return text


def _packages() -> tuple[Any, Any]:
    try:
        from bs4 import BeautifulSoup
        from ftfy import fix_text
    except ImportError as error:
        raise ValueError("cleaning captions needs beautifulsoup4 and ftfy: pip install 'ldm[captions]'") from error
    return BeautifulSoup, fix_text
