"""The tab Data: a folder's pictures, their captions, and what training would find wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
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
            scale=3, info="with captions in .txt files beside them or in a metadata.jsonl", elem_id="data-folder",
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
    guard = ui.guarded(gr, len(outputs))

    def shown_page(view: View, kind: str, page: float, note: str) -> tuple[Any, ...]:
        chosen = view.chosen(kind)
        pages = max(1, -(-len(chosen) // EACH))
        number = min(int(page), pages)
        part = chosen[(number - 1) * EACH : number * EACH]
        updates: list[Any] = []
        for k in range(EACH):
            if k < len(part):
                texts = "\n".join(part[k].captions)
                updates += [gr.update(visible=True), tile(view, part[k]), texts]
            else:
                updates += [gr.update(visible=False), "", ""]
        slider = gr.update(maximum=max(pages, 2), value=number, visible=pages > 1)
        if not chosen:
            note = ui.quiet("None.")
        return (
            view,
            [p.name for p in part],
            view.found.side,
            summary(view),
            gr.update(visible=True),
            slider,
            *updates,
            note,
        )

    @guard
    def open_folder(text: str, side: float | None) -> tuple[Any, ...]:
        view = look(studio, text, side)
        argv = ["data", "check", studio.places.short(view.folder), "--size", str(view.found.side)]
        return shown_page(view, "All", 1, ui.command_line(shown(argv)))

    @guard
    def turn(view: View | None, kind: str, page: float) -> tuple[Any, ...]:
        if view is None:
            raise ValueError("folder: none is open")
        return shown_page(view, kind, page, "")

    def changed(view: View | None, kind: str, page: float, words: list[str]) -> tuple[Any, ...]:
        if view is None:
            raise ValueError("folder: none is open")
        argv = ["data", "captions", studio.places.short(view.folder), *words]
        told = studio.commands.here(argv).lines
        again = View(view.folder, listed(view.folder), view.found)
        found = [p.name for p in again.pictures if not p.captions and not p.problem]
        again.found.uncaptioned[:] = found
        note = ui.command_line(shown(argv)) + ui.quiet(told[0] if told else "")
        return shown_page(again, kind, page, note)

    @guard
    def add_trigger(view: View | None, kind: str, page: float, word: str) -> tuple[Any, ...]:
        return changed(view, kind, page, ["--trigger", word])

    @guard
    def replace(view: View | None, kind: str, page: float, old: str, new: str) -> tuple[Any, ...]:
        return changed(view, kind, page, ["--replace", old, new])

    def save(k: int) -> Any:
        @ui.guarded(gr, 2)
        def one(view: View | None, names: list[str], text: str) -> tuple[Any, Any]:
            if view is None or k >= len(names):
                return gr.skip(), gr.skip()
            was = next(p for p in view.pictures if p.name == names[k])
            if "\n".join(was.captions) == (text or "").strip():
                return gr.skip(), gr.skip()
            argv = ["data", "captions", studio.places.short(view.folder), "--set", names[k], text]
            studio.commands.here(argv)
            again = View(view.folder, listed(view.folder), view.found)
            again.found.uncaptioned[:] = [p.name for p in again.pictures if not p.captions and not p.problem]
            return again, ui.command_line(shown(argv)) + ui.quiet("saved")

        return one

    quick = {"show_progress": "minimal", "api_visibility": "private"}
    gr.on([at["opened"].click, at["folder"].input], open_folder, [at["folder"], at["side"]], outputs, **quick).then(
        lambda: "All", None, at["kind"], **quick
    )
    place = [at["state"], at["kind"], at["page"]]
    at["kind"].input(lambda view, kind: turn(view, kind, 1), place[:2], outputs, **quick)
    at["page"].release(turn, place, outputs, **quick)
    gr.on([at["add"].click, at["trigger"].submit], add_trigger, [*place, at["trigger"]], outputs, **quick)
    gr.on([at["swap"].click, at["new"].submit], replace, [*place, at["old"], at["new"]], outputs, **quick)
    for k, (_, _, text) in enumerate(at["slots"]):
        text.blur(save(k), [at["state"], at["names"], text], [at["state"], at["said"]], **quick, concurrency_limit=1,
                  concurrency_id="captions")  # fmt: skip
    return open_folder
