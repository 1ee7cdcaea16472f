"""Hooks of mkdocs: pages that are made, links out of `docs/` (https://www.mkdocs.org/user-guide/configuration/#hooks)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the code that is documented is the one beside this file

COPIED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "ldm/assets/README.md": "shipped_models.md",
}
"""Pages of the site whose text lies outside of docs/."""
LATER = {"studio.md"}
"""Pages that the menu may name before they are there."""


def on_config(config: Any) -> Any:
    """Leave pages out of the menu that are still to come."""
    gone = {name for name in LATER if not (ROOT / "docs" / name).exists()}
    config.nav = _without(config.nav, gone)
    return config


def _without(items: list[Any], gone: set[str]) -> list[Any]:
    kept = []
    for item in items:
        if isinstance(item, dict):
            ((title, below),) = item.items()
            if isinstance(below, list):
                kept.append({title: _without(below, gone)})
            elif below not in gone:
                kept.append(item)
        elif item not in gone:
            kept.append(item)
    return kept


def on_files(files: Files, config: Any) -> Files:
    """Add the references, and the pages that lie elsewhere in the repository."""
    from docs.make import keys, verbs

    texts = {**keys.pages(), **verbs.pages()}
    texts |= {path: (ROOT / name).read_text(encoding="utf-8") for name, path in COPIED.items()}
    for path, text in texts.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are right in the repository become links that are right in the site."""
    path = page.file.src_uri
    origin = {to: name for name, to in COPIED.items()}.get(path, f"docs/{path}")
    return _outside_code(
        markdown, lambda text: re.sub(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)", lambda m: _link(m, origin, path), text)
    )


def _outside_code(markdown: str, change: Any) -> str:
    parts = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def _link(match: re.Match[str], origin: str, path: str) -> str:
    """A link of the page at `origin` in the repository, as the page at `path` in the site must have it."""
    target, anchor = match[1], match[2] or ""
    there = (ROOT / origin).parent.joinpath(target).resolve()
    if not there.is_relative_to(ROOT):
        return match[0]
    name = there.relative_to(ROOT).as_posix()
    if name in COPIED:
        place = COPIED[name]
    elif name == "README.md":
        place = "index.md"
    elif name.startswith("docs/"):
        if origin.startswith("docs/"):
            return match[0]
        place = name.removeprefix("docs/")
    else:
        return match[0]
    return f"]({'../' * path.count('/')}{place}{anchor})"
