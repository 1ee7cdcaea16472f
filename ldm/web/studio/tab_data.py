"""The tab Data: a folder's pictures, their captions, and what training would find wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from ldm.data.captioning import Checked, Shown, listed
from ldm.web.studio import ui
from ldm.web.studio.commands import shown
from ldm.web.studio.studio import Studio

EACH = 12
"""Pictures shown at once."""
FEW = 400
"""Files of a folder that is looked at without being asked."""
VIEWS = ("All", "Without a caption", "Too small", "Look alike", "Unusable")


@dataclass(frozen=True)
class View:
    """The pictures of a folder that are looked at, by name, and what was found of all."""

    folder: Path
    pictures: list[Shown]
    found: Checked

    def flags(self, name: str) -> list[str]:
        """What is said of one picture."""
        said = []
        if name in self.found.bad:
            said.append(self.found.bad[name])
        if name in self.found.small:
            said.append("{} x {}: too small".format(*self.found.small[name]))
        for group in self.found.alike:
            if name in group:
                said.append(f"looks like {next(other for other in group if other != name)}")
        return said

    def chosen(self, view: str) -> list[Shown]:
        """Those of one of `VIEWS`."""
        alike = {name for group in self.found.alike for name in group}
        kept = {
            "Without a caption": set(self.found.uncaptioned) - set(self.found.bad), "Too small": set(self.found.small),
            "Look alike": alike, "Unusable": set(self.found.bad),
        }  # fmt: skip
        return [p for p in self.pictures if view not in kept or p.name in kept[view]]


def look(studio: Studio, text: str | None, side: float | None) -> View:
    """Check a folder by `ldm data check`. Raises ValueError."""
    folder = studio.places.folder(text)
    argv = ["data", "check", studio.places.short(folder), "--json"]
    argv += [] if not side else ["--size", str(int(side))]
    found = json.loads(studio.commands.here(argv).out)
    small = {name: (int(w), int(h)) for name, (w, h) in found.pop("small").items()}
    return View(folder, listed(folder), Checked(small=small, **found))


def summary(view: View) -> str:
    """The figures of a folder, and its buckets."""
    found, captioned = view.found, sum(bool(p.captions) for p in view.pictures)
    rows = [(str(found.pictures), "pictures", ""), (str(captioned), "with a caption", "")]
    rows += [(str(len(names)), label, "") for names, label in (
        (found.small, f"smaller than {found.side} pixels"), (found.alike, "groups that look alike"),
        (found.bad, "that cannot be used"),
    ) if names]  # fmt: skip
    shapes = ", ".join(f"{name.replace('x', ' x ')}: {count}" for name, count in found.buckets.items())
    one = len(found.buckets) == 1
    buckets = f"<p class='ok'>Shapes at {found.side} pixels{' (buckets)' if not one else ''}: {escape(shapes)}</p>"
    return ui.facts(rows) + (buckets if shapes else "")


def tile(view: View, picture: Shown) -> str:
    """A picture with its name and what is said of it."""
    flags = "".join(f"<div class='name flag'>{escape(flag)}</div>" for flag in view.flags(picture.name))
    seen = "" if picture.name in view.found.bad or not picture.path.is_file() else ui.image(picture.path, picture.name)
    name = escape(picture.name, quote=True)
    return (
        f"<div class='tile'><div class='frame'>{seen}</div><div class='name' title='{name}'>{name}</div>{flags}</div>"
    )


def build(gr: Any, studio: Studio) -> tuple[Any, Callable[[Any], Any]]:
    """The tab; gives the component that holds the chosen folder, and what fills the page when it is loaded."""
    folders = studio.places.pictures()
    few = bool(folders) and len(list(studio.places.folder(folders[0]).iterdir())) <= FEW
    with gr.Row(equal_height=True):
        folder = gr.Dropdown(
            folders, value=folders[0] if folders else None, allow_custom_value=True, label="Folder of pictures",
            scale=3, info="with captions in .txt or .json files beside them, or in a metadata.jsonl, .csv or .tsv",
            elem_id="data-folder",
        )  # fmt: skip
        side = gr.Number(0, label="Train at (pixels)", precision=0, info="0: what fits them", scale=1,
                         elem_id="data-side")  # fmt: skip
        opened = gr.Button("Open", variant="primary", scale=0, min_width=110, elem_id="data-open", elem_classes="go")
    said = gr.HTML(elem_id="data-said")
    figures = gr.HTML(elem_id="data-figures")
    with gr.Column(visible=False) as body:
        with gr.Accordion("Change all captions", open=False):
            with gr.Row(equal_height=True):
                trigger = gr.Textbox(label="Trigger word", info="put before every caption", placeholder="sks", scale=3,
                                     elem_id="data-trigger")  # fmt: skip
                add = gr.Button("Add to all", scale=0, min_width=170, elem_id="data-add", elem_classes="go")
            with gr.Row(equal_height=True):
                old = gr.Textbox(label="Find", scale=2, elem_id="data-old")
                new = gr.Textbox(label="Replace with", scale=2, elem_id="data-new")
                swap = gr.Button("Replace in all", scale=0, min_width=170, elem_id="data-replace", elem_classes="go")
        with gr.Row():
            kind = gr.Radio(list(VIEWS), value="All", show_label=False, container=False, elem_id="data-view", scale=3)
            page = gr.Slider(1, 2, value=1, step=1, label="Page", visible=False, scale=1)
        slots = []
        with gr.Row(elem_classes="tiles"):
            for k in range(EACH):
                with gr.Column(visible=False, elem_classes="slot", min_width=150) as slot:
                    seen = gr.HTML(padding=False)
                    text = gr.Textbox(lines=2, max_lines=5, show_label=False, container=False, label=f"Caption {k + 1}",
                                      placeholder="no caption yet", elem_id=f"caption-{k}")  # fmt: skip
                    slots.append((slot, seen, text))
    state = gr.State(None)
    names = gr.State([])
    flat = [part for slot in slots for part in slot]
    outputs = [state, names, side, figures, body, page, *flat, said]
    opening = _connect(gr, studio, locals(), outputs)
    return folder, lambda app: app.load(opening, [folder, side], outputs, show_progress="hidden") if few else None


def _connect(gr: Any, studio: Studio, at: dict[str, Any], outputs: list[Any]) -> Callable[..., Any]:
    handlers = Handlers(gr, studio, len(outputs))
    quick = {"show_progress": "minimal", "api_visibility": "private"}
    ordered = {"concurrency_limit": 1, "concurrency_id": "captions", **quick}  # a field is saved before all are changed
    gr.on([at["opened"].click, at["folder"].input], handlers.open, [at["folder"], at["side"]], outputs, **quick).then(
        lambda: "All", None, at["kind"], **quick
    )
    place = [at["state"], at["kind"], at["page"]]
    at["kind"].input(lambda view, kind: handlers.turn(view, kind, 1), place[:2], outputs, **quick)
    at["page"].release(handlers.turn, place, outputs, **quick)
    gr.on([at["add"].click, at["trigger"].submit], handlers.add, [*place, at["trigger"]], outputs, **ordered)
    gr.on([at["swap"].click, at["new"].submit], handlers.replace, [*place, at["old"], at["new"]], outputs, **ordered)
    for k, (_, _, text) in enumerate(at["slots"]):
        text.blur(handlers.save(k), [at["state"], at["names"], text], [at["state"], at["said"]], **ordered)
    return handlers.open


class Handlers:
    """What the tab's parts do."""

    def __init__(self, gr: Any, studio: Studio, outputs: int) -> None:
        self.gr, self.studio = gr, studio
        guard = ui.guarded(gr, outputs)
        self.open, self.turn = guard(self._open), guard(self._turn)
        self.add = guard(lambda view, kind, page, word: self._changed(view, kind, page, ["--trigger", word]))
        self.replace = guard(
            lambda view, kind, page, old, new: self._changed(view, kind, page, ["--replace", old, new])
        )

    def _page(self, view: View, kind: str, page: float, note: str) -> tuple[Any, ...]:
        update, chosen = self.gr.update, view.chosen(kind)
        pages = max(1, -(-len(chosen) // EACH))
        number = min(int(page), pages)
        part = chosen[(number - 1) * EACH : number * EACH]
        tiles: list[Any] = []
        for k in range(EACH):
            if k < len(part):
                tiles += [update(visible=True), tile(view, part[k]), "\n".join(part[k].captions)]
            else:
                tiles += [update(visible=False), "", ""]
        slider = update(maximum=max(pages, 2), value=number, visible=pages > 1)
        note = note if chosen else ui.quiet("None.")
        names = [p.name for p in part]
        return (view, names, view.found.side, summary(view), update(visible=True), slider, *tiles, note)

    def _open(self, text: str, side: float | None) -> tuple[Any, ...]:
        view = look(self.studio, text, side)
        argv = ["data", "check", self.studio.places.short(view.folder), "--size", str(view.found.side)]
        return self._page(view, "All", 1, ui.command_line(shown(argv)))

    def _turn(self, view: View | None, kind: str, page: float) -> tuple[Any, ...]:
        if view is None:
            raise ValueError("folder: none is open")
        return self._page(view, kind, page, "")

    def _changed(self, view: View | None, kind: str, page: float, words: list[str]) -> tuple[Any, ...]:
        if view is None:
            raise ValueError("folder: none is open")
        again, command, told = self._run(view, words)
        return self._page(again, kind, page, command + ui.quiet(told))

    def _run(self, view: View, words: list[str]) -> tuple[View, str, str]:
        """Change captions; the folder as it is then, the command, and what it said."""
        argv = ["data", "captions", self.studio.places.short(view.folder), *words]
        told = self.studio.commands.here(argv).lines
        pictures = listed(view.folder)
        without = [p.name for p in pictures if not p.captions and not p.problem]
        again = View(view.folder, pictures, replace(view.found, uncaptioned=without))
        return again, ui.command_line(shown(argv)), told[0] if told else ""

    def save(self, k: int) -> Callable[..., Any]:
        """Of the field of picture `k` of the page."""
        skip = self.gr.skip

        @ui.guarded(self.gr, 2)
        def one(view: View | None, names: list[str], text: str) -> tuple[Any, Any]:
            if view is None or k >= len(names):
                return skip(), skip()
            was = next(p for p in view.pictures if p.name == names[k])
            if "\n".join(was.captions) == (text or "").strip():
                return skip(), skip()
            again, command, _ = self._run(view, ["--set", names[k], text])
            return again, command + ui.quiet("saved")

        return one
