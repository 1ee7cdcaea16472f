"""The commands that the documents show: fences, the marks before them, and how a line becomes words."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOG = ROOT / "docs" / "log.md"
"""Tells what was so when it was written, old names too."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PRESENT = [page for page in PAGES if page != LOG]

_FENCE = re.compile(
    r"(?:^ *<!-- not run(?:, but for (?P<but>[\d ]+))?: (?P<why>[^\n]*?) -->\n)?"
    r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<body>.*?)^ *```",
    re.DOTALL | re.MULTILINE,
)
_STARTS = re.compile(r"(?:ldm [a-z]+(?: |$)|python -m |make |\.venv/)")


@dataclass(frozen=True)
class Command:
    """One command of a fence: its words, whether a test is to run it, and if not, why."""

    page: Path
    line: int
    text: str
    words: list[str] = field(compare=False)
    why: str | None

    @property
    def runs(self) -> bool:
        return self.why is None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def commands(page: Path, text: str | None = None) -> list[Command]:
    """Every command in the page's fences of kind `sh`, and in those without a kind that begin with one."""
    text = page.read_text(encoding="utf-8") if text is None else text
    found = []
    for fence in _FENCE.finditer(text):
        body = fence["body"]
        if fence["kind"] not in ("sh", "bash", "console") and (fence["kind"] or not _STARTS.match(body.lstrip())):
            continue
        first = text[: fence.start("body")].count("\n") + 1
        but = {int(n) for n in (fence["but"] or "").split()}
        for number, (offset, line) in enumerate(_lines(body), 1):
            why = None if fence["why"] is None or number in but else fence["why"]
            found.append(Command(page, first + offset, line, shlex.split(line), why))
    return found


def _lines(body: str) -> list[tuple[int, str]]:
    """Lines of a shell with their places, continued ones put together, without comments."""
    found: list[tuple[int, str]] = []
    going = ""
    start = 0
    for number, line in enumerate(body.splitlines()):
        start = start if going else number
        going += line.strip()
        if going.endswith("\\"):
            going = going[:-1].rstrip() + " "
            continue
        bare = re.sub(r"(?:^|\s+)#\s.*$", "", going).strip()
        if bare:
            found.append((start, bare))
        going = ""
    return found


def unmarked(page: Path) -> list[str]:
    """Marks that stand before no fence."""
    text = page.read_text(encoding="utf-8")
    told = len(re.findall(r"<!-- not run", re.sub(r"^ {4}.*", "", text, flags=re.MULTILINE)))
    used = sum(f["why"] is not None and not f["indent"] for f in _FENCE.finditer(text))
    return [f"{page.relative_to(ROOT)}: {told - used} marks before no fence"] if told != used else []
