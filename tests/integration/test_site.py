"""The site is built strictly: no broken link, no page without a place in the menu; nothing in it is fetched."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make site` does it."""
    if not os.environ.get("CI"):
        for name in ("material", "mkdocstrings"):
            pytest.importorskip(name, reason="pip install 'ldm[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_source_is_a_page(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), page
    assert "task.options" in (site / "reference/config/parts.html").read_text(encoding="utf-8")
    assert "--image-prompt" in (site / "reference/cli/sample.html").read_text(encoding="utf-8")
    assert "classifier_free" in (site / "reference/python/sampling.html").read_text(encoding="utf-8")


def test_it_needs_no_network(site: Path) -> None:
    """No script, style, font or picture has an address; links that a reader follows may."""
    loaded = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]+)\"|<link\b[^>]*\bhref=\"([^\"]+)\"")
    far = set()
    for page in site.rglob("*.html"):
        for found in loaded.findall(page.read_text(encoding="utf-8")):
            far |= {word for word in found if re.match(r"(?:https?:)?//", word)}
    for style in site.rglob("*.css"):
        far |= set(re.findall(r"url\(\"?((?:https?:)?//[^)\"]+)", style.read_text(encoding="utf-8")))
    assert far == set()


def test_search_has_keys_options_and_pages(site: Path) -> None:
    """Its index is a script, which also works for pages that are opened as files."""
    text = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("var __index = "))
    words = " ".join(f"{one['title']} {one['text']}" for one in index["docs"])
    for wanted in ("gradient_checkpointing", "--blocks-on-device", "classifier_free", "DreamBooth", "team.yaml"):
        assert wanted in words
    assert "iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


def test_a_broken_link_and_a_page_without_a_place_stop_it(tmp_path: Path) -> None:
    """The strictness itself, on a site of two pages with the same settings."""
    pytest.importorskip("material", reason="pip install 'ldm[docs]'")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    strict = settings[settings.index("validation:") : settings.index("plugins:")]
    (tmp_path / "docs").mkdir()
    config = tmp_path / "mkdocs.yml"
    index, other = tmp_path / "docs/index.md", tmp_path / "docs/other.md"
    for text, nav, right in (
        ("# A\n[b](other.md#b)\n", "[index.md, other.md]", True),
        ("# A\n[b](gone.md)\n", "[index.md, other.md]", False),
        ("# A\n[b](other.md#gone)\n", "[index.md, other.md]", False),
        ("# A\n", "[index.md]", False),
    ):
        index.write_text(text)
        other.write_text("# B\n")
        config.write_text(f"site_name: x\n{strict}nav: {nav}\n")
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=tmp_path, capture_output=True, timeout=200
        )
        assert (done.returncode == 0) is right, (text, nav, done.stderr)
