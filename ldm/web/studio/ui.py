"""Small pieces of the page: escaped HTML, and handlers whose mistakes become one line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

FILE = "/gradio_api/file="


def command_line(text: str) -> str:
    """A command that was, or will be, run."""
    return f"<div class='cmd'>{escape(text)}</div>" if text else ""


def mistake(text: str) -> str:
    """What is wrong, as one line."""
    return f"<div class='err' role='alert'>{escape(' '.join(text.split()))}</div>"


def quiet(text: str) -> str:
    """What happened."""
    return f"<div class='ok'>{escape(text)}</div>" if text else ""


def facts(rows: Iterable[tuple[str, str, str]]) -> str:
    """(figure, what, beside) in a row."""
    cells = [
        f"<div><b>{escape(value)}</b><span>{escape(label)}{f'<br>{escape(note)}' if note else ''}</span></div>"
        for value, label, note in rows
    ]
    return f"<div class='facts'>{''.join(cells)}</div>" if cells else ""


def bar(share: float) -> str:
    """How much is done."""
    return f"<div class='bar'><i style='width:{100 * min(max(share, 0.0), 1.0):.1f}%'></i></div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], raw: bool = False) -> str:
    """Rows of text; with `raw` cells are HTML already."""
    told = ["".join(f"<td>{cell if raw else escape(cell)}</td>" for cell in row) for row in rows]
    if not told:
        return ""
    top = "".join(f"<th>{escape(word)}</th>" for word in head)
    body = "".join(f"<tr>{row}</tr>" for row in told)
    return f"<table class='rows'>{f'<tr>{top}</tr>' if any(head) else ''}{body}</table>"


def image(path: Path, alt: str = "") -> str:
    """A picture of the disk; it is fetched anew when the file changes."""
    source = f"{FILE}{quote(str(path))}?v={path.stat().st_mtime_ns}"
    return f"<img src='{source}' alt='{escape(alt, quote=True)}' loading='lazy'>"


def guarded(gr: Any, count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of a handler with `count` outputs, the last of them the line below the buttons: its ValueError is shown there."""

    def around(handle: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handle)
        def call(*args: Any, **more: Any) -> Any:
            try:
                return handle(*args, **more)
            except ValueError as error:
                line = mistake(str(error))
                return line if count == 1 else (*(gr.skip() for _ in range(count - 1)), line)

        return call

    return around
