"""The documents: links lead somewhere, files that they name exist, options that they show are the parsers' own."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from docs.make import keys, verbs
from ldm.cli.__main__ import VERBS
from tests.documents import PAGES, PRESENT, ROOT

TOPS = ("ldm", "launch", "configs", "bench", "tests", "examples", "docs")

MADE = {ROOT / "docs" / path for path in (*keys.pages(), *verbs.pages())}
"""Pages that the site alone has; its strict build looks at their sections."""

_FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_PATH = re.compile(rf"(?<![\w./~<>{{}}:=-])(?:{'|'.join(TOPS)})/[\w./*-]*\w/?")
_BARE = re.compile(r"(?<![\w./~<>{}:=-])\w+\.py(?![\w.])")


def links(text: str) -> list[str]:
    """Targets of links and images that are files, without their anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", text))
    return [target.split("#")[0] for target in found if not re.match(r"[a-z]+:|#", target)]


def named(text: str) -> list[str]:
    """Paths below the repository's folders, in prose and in commands; what has a * is a pattern."""
    return _PATH.findall(text)


def bare(text: str) -> list[str]:
    """Names of Python files without a folder, in spans of code."""
    return [name for span in re.findall(r"`([^`\n]+)`", _FENCE.sub("", text)) for name in _BARE.findall(span)]


def calls(text: str) -> list[tuple[list[str], list[str]]]:
    """Commands in code: the words after `ldm`, and the options; also behind a launcher, in spans and indented."""
    blocks = _FENCE.findall(text)
    rest = _FENCE.sub("", text)
    blocks += re.findall(r"^(?: {4}\S.*\n)+", rest, re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", rest)]
    found = []
    for line in lines:
        match = re.search(r"(?:^|\s)(?:ldm|-m ldm\.cli) ([a-z].*)", re.split(r"\s#\s", line)[0])
        if match:
            words = re.sub(r"\"[^\"]*\"|'[^']*'", "TEXT", match[1]).split()
            found.append((words, re.findall(r"(?<=\s)(--[\w-]+)", " " + " ".join(words))))
    return found


def options(words: list[str]) -> set[str]:
    """Options of the verb that a command begins with, and of the verb below it where it has such."""
    module = importlib.import_module(f"ldm.cli.{words[0]}")
    parser: Any = (module.parser if "parser" in vars(module) else module._parser)()
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and (below := action.choices.get("".join(words[1:2]))):
            found |= set(below._option_string_actions)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    there = [(page.parent / target).resolve() for target in links(page.read_text(encoding="utf-8"))]
    assert [path for path in there if not path.exists() and path not in MADE] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_sections(page: Path) -> None:
    """Anchors as GitHub makes them of headings."""
    gone = []
    for target, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if (page.parent / target).resolve() in MADE:
            continue
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        heads = re.findall(r"^#+ (.*)", _FENCE.sub("", text), re.MULTILINE)
        if anchor not in [re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads]:
            gone.append(f"{target}#{anchor}")
    assert gone == []


@pytest.mark.parametrize("page", PRESENT, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    gone = [path for path in named(text) if not (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists())]
    known = {path.name for top in TOPS for path in (ROOT / top).rglob("*.py")}
    assert gone + sorted(set(bare(text)) - known) == []


@pytest.mark.parametrize("page", PRESENT, ids=lambda p: str(p.relative_to(ROOT)))
def test_options_that_are_shown_exist(page: Path) -> None:
    wrong = []
    for words, shown in calls(page.read_text(encoding="utf-8")):
        if words[0] not in VERBS:
            wrong += [f"ldm {words[0]}: no such verb"] if words[0].isalpha() else []
            continue
        wrong += [f"ldm {' '.join(words[:2])}: {name}" for name in shown if name not in options(words)]
    assert wrong == []


def test_every_page_has_a_place_in_the_menu() -> None:
    """That of the site, as the strict build has it too, and here without mkdocs."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert [page for page in pages if not re.search(rf"[ :] ?{re.escape(page)}$", text, re.MULTILINE)] == []


def test_the_readme_is_short_and_leads_into_the_site() -> None:
    """Pictures, commands and links; at most two screens of 50 lines."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert {"docs/index.md", "docs/jobs/index.md", "docs/families.md", "docs/team.md", "docs/log.md"} <= set(
        links(text)
    )
    assert text.index("![") < text.index("```")


def test_what_is_looked_for_is_found() -> None:
    """The reading above, on a page whose faults are known."""
    text = (
        "[a](docs/x.md#part) [b](https://host/y.md) ![c](docs/images/z.png)\n"
        "`ldm/gone.py` and `odd.py`, configs/a/*.yaml\n"
        '```sh\nldm sample "a --b" --steps 4 \\\n  --count 2   # --not-this\n'
        "python -m launch local -- ldm edit maps --nope\n```\n"
        "In a span: `ldm data build A B\n--size 8`.\n\n    ldm show run RUN --frames 3\n"
    )
    assert links(text) == ["docs/x.md", "docs/images/z.png"]
    assert named(text) == ["docs/x.md", "docs/images/z.png", "ldm/gone.py", "configs/a/*.yaml"]
    assert bare(text) == ["odd.py"]
    found = {tuple(words[:2]): shown for words, shown in calls(text)}
    assert found["sample", "TEXT"] == ["--steps", "--count"]
    assert found["edit", "maps"] == ["--nope"]
    assert found["data", "build"] == ["--size"]
    assert found["show", "run"] == ["--frames"]
    assert "--steps" in options(["edit", "maps"])
    assert "--nope" not in options(["edit", "maps"])
    assert "--strength" not in options(["edit", "maps"])
    assert "--strength" in options(["edit", "img2img"])
