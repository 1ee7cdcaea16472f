"""One self-contained HTML page of pictures, curves and tables: no request leaves it, light and dark.

    page = Gallery("What it learned", "In ten minutes on two cores.")
    page.facts([Fact("9.4 ×", "chance", "retrieval of its pictures")])
    page.section("Samplers", "Same noise, same prompt.").matrix(rows, columns)
    page.write("gallery.html")

Text is escaped; between backquotes it is set as code.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from PIL import Image

from ldm.web.chart import Bar, Curve, bar_chart, line_chart

__all__ = ["Bar", "Curve", "Fact", "Gallery", "Picture", "Section"]

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Picture:
    """An image, what it shows, and a small note such as a similarity."""

    image: Image.Image
    caption: str = ""
    note: str = ""


@dataclass(frozen=True)
class Fact:
    """A figure in large type, what it is, and what it compares to."""

    value: str
    label: str
    note: str = ""


Cell = Picture | Image.Image | None


class Section:
    """A headed part of the page; its methods add blocks in order and return the section."""

    def __init__(self, title: str, text: str = "") -> None:
        self.title = title
        self._parts = [f"<p>{_text(paragraph)}</p>" for paragraph in text.split("\n\n") if paragraph.strip()]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "section"

    @property
    def html(self) -> str:
        return "\n".join(self._parts)

    def heading(self, title: str) -> Section:
        """A smaller heading."""
        self._parts.append(f"<h3>{_text(title)}</h3>")
        return self

    def text(self, text: str) -> Section:
        """A quiet remark under a block."""
        self._parts.append(f"<p class='note'>{_text(text)}</p>")
        return self

    def grid(self, pictures: Sequence[Cell], size: int = 112) -> Section:
        """Pictures with their captions, as many in a row as fit; `size`: the least width in CSS pixels."""
        cells = "".join(_figure(p) for p in pictures)
        self._parts.append(f"<div class='block grid' style='--size:{size}px'>{cells}</div>")
        return self

    def matrix(
        self,
        rows: Mapping[str, Sequence[Cell]],
        columns: Sequence[str] = (),
        size: int = 64,
        divide: bool = False,
    ) -> Section:
        """Pictures by named rows and columns; None is an empty place; `divide` sets the first column apart.

        Raises ValueError when a row's length is not the number of columns.
        """
        width = len(columns) or max((len(cells) for cells in rows.values()), default=0)
        first = " first" if divide else ""
        parts = []
        if columns:
            parts = ["<span></span>"]
            parts += [f"<span class='head{'' if i else first}'>{_text(c)}</span>" for i, c in enumerate(columns)]
        for name, cells in rows.items():
            if len(cells) != width:
                raise ValueError(f"matrix row {name!r}: {len(cells)} pictures for {width} columns")
            parts.append(f"<span class='row'>{_text(name)}</span>")
            where = [f"{name}, {columns[i]}" if columns else name for i in range(width)]
            parts += [_figure(cell, where[i], "" if i else first) for i, cell in enumerate(cells)]
        style = f"--columns:{width};--size:{size}px"
        kind = "matrix divided" if divide else "matrix"
        self._parts.append(
            f"<div class='block scroll'><div class='{kind}' style='{style}'>{''.join(parts)}</div></div>"
        )
        return self

    def curve(self, curves: Sequence[Curve], x_label: str, y_label: str, log_y: bool = False) -> Section:
        """Lines over a common axis."""
        self._parts.append(f"<div class='block card'>{line_chart(curves, x_label, y_label, log_y)}</div>")
        return self

    def bars(self, bars: Sequence[Bar], unit: str = "%", top: float | None = None) -> Section:
        """Values with their intervals and references."""
        self._parts.append(f"<div class='block card'>{bar_chart(bars, unit, top)}</div>")
        return self

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Section:
        """A table; a column all of whose values begin with a digit is set as numbers.

        Raises ValueError when a row's length is not the header's.
        """
        cells = [[_plain(value) for value in row] for row in rows]
        for row in cells:
            if len(row) != len(header):
                raise ValueError(f"table: {len(row)} values for {len(header)} columns in {row}")
        numeric = [all(re.match(r"[-−+<>≈×]?\s?\d|[—–-]?$", row[i]) for row in cells) for i in range(len(header))]
        kinds = [" class='number'" if n and cells else "" for n in numeric]
        head = "".join(f"<th{k}>{_text(h)}</th>" for h, k in zip(header, kinds))
        body = "".join(f"<tr>{''.join(f'<td{k}>{_text(v)}</td>' for v, k in zip(row, kinds))}</tr>" for row in cells)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        self._parts.append(f"<div class='block card scroll'>{table}</div>")
        return self

    def command(self, *lines: str) -> Section:
        """What to type."""
        self._parts.append(f"<pre>{escape(chr(10).join(lines))}</pre>")
        return self


class Gallery:
    """A page under construction."""

    def __init__(self, title: str, lede: str = "", eyebrow: str = "ldm") -> None:
        self.title, self.lede, self.eyebrow = title, lede, eyebrow
        self._hero, self._facts, self._footer = "", "", ""
        self._sections: list[Section] = []

    def hero(self, pictures: Sequence[Cell]) -> Gallery:
        """The best pictures, under the title."""
        columns = min((9, 8, 10, 7, 6), key=lambda n: (-len(pictures)) % n)  # the fewest places left over
        cells = "".join(_figure(p) for p in pictures)
        self._hero = f"<div class='hero' style='--columns:{columns}'>{cells}</div>" if pictures else ""
        return self

    def facts(self, facts: Sequence[Fact]) -> Gallery:
        """Figures in large type, under the title."""
        cells = "".join(
            f"<div class='fact'><b>{_text(f.value)}</b><span>{_text(f.label)}</span>"
            f"<small>{_text(f.note)}</small></div>"
            for f in facts
        )
        self._facts = f"<div class='facts'>{cells}</div>" if facts else ""
        return self

    def section(self, title: str, text: str = "") -> Section:
        """Begin a section; a blank line in the text begins a paragraph."""
        section = Section(title, text)
        if section.anchor in {s.anchor for s in self._sections}:
            raise ValueError(f"section {title!r}: there is one of that name already")
        self._sections.append(section)
        return section

    def footer(self, text: str) -> Gallery:
        """Small print: licences, versions, seeds."""
        self._footer = "".join(f"<p>{_text(line)}</p>" for line in text.splitlines())
        return self

    def html(self) -> str:
        """The whole page."""
        links = "".join(f"<li><a href='#{s.anchor}'>{_text(s.title)}</a></li>" for s in self._sections)
        nav = f"<nav aria-label='Sections'><ol>{links}</ol></nav>" if self._sections else ""
        sections = "\n".join(
            f"<section id='{s.anchor}'><div class='eyebrow'>{i}</div><h2>{_text(s.title)}</h2>\n{s.html}\n</section>"
            for i, s in enumerate(self._sections, 1)
        )
        lede = f"<p>{_text(self.lede)}</p>" if self.lede else ""
        footer = f"<footer>{self._footer}</footer>" if self._footer else ""
        return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(self.title)}</title>
<style>{_resource("gallery.css")}</style>
</head>
<body>
<div class="page">
<header>
<div class="eyebrow">{_text(self.eyebrow)}</div>
<h1>{_text(self.title)}</h1>
{lede}
{self._hero}
{self._facts}
</header>
{nav}
<main>
{sections}
</main>
{footer}
</div>
<dialog aria-label="Picture"><img alt="" src="{_BLANK}"><p></p></dialog>
<script>{_resource("gallery.js")}</script>
</body>
</html>
"""

    def write(self, path: str | Path) -> Path:
        """Write the page, whole or not at all; its folder is made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(self.html(), encoding="utf-8")
        os.replace(temporary, path)
        return path


_BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def data_uri(image: Image.Image) -> str:
    """The image as WebP; transparency is laid on white, as the model sees it."""
    if image.mode != "RGB":
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(cell: Cell, alt: str = "", kind: str = "") -> str:
    if cell is None:
        return f"<span class='none{kind}'>·</span>"
    picture = cell if isinstance(cell, Picture) else Picture(cell)
    note = f"<small>{_text(picture.note)}</small>" if picture.note else ""
    caption = f"<figcaption>{_text(picture.caption)}{note}</figcaption>" if picture.caption or note else ""
    said = escape(picture.caption or alt or picture.note, quote=True)
    width, height = picture.image.size
    image = (
        f"<img class='zoom' tabindex='0' loading='lazy' width='{width}' height='{height}' "
        f'style="aspect-ratio:{width}/{height};height:auto" alt="{said}" src="{data_uri(picture.image)}">'
    )
    return f"<figure class='{kind.strip()}'>{image}{caption}</figure>"


def _text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _resource(name: str) -> str:
    return resources.files("ldm.web").joinpath(name).read_text(encoding="utf-8")
