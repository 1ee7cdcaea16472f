"""The tab Draw: prompts, pictures to start from, comparisons; every picture's settings one click away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.web.studio import ui
from ldm.web.studio.drawer import COMPARE, Asked, Drawer
from ldm.web.studio.drawing import SETTINGS, record, told, whole_only
from ldm.web.studio.studio import Studio

LORAS = 3
OWN = "its own"
FORM = ("model", "prompt", "negative", "sampler", "steps", "guidance", "seed", "count", "width", "height", "editor",
        "strength", "compare", "axis_1", "values_1", "axis_2", "values_2", "embeddings")  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A picture of the gallery."""

    path: str
    label: str


def build(gr: Any, studio: Studio) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    """The tab; gives what fills the page when it is loaded, and what fills lists when the tab is opened."""
    from ldm.sampling import SAMPLERS

    at: dict[str, Any] = {}
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            models = studio.models()
            at["model"] = gr.Dropdown(
                models, value=models[0], allow_custom_value=True, label="Model", elem_id="draw-model",
                info="a run, a shipped one, a folder, a file or a hub id",
            )  # fmt: skip
            at["prompt"] = gr.Textbox(label="Prompt", lines=2, elem_id="draw-prompt", placeholder="a red apple")
            at["negative"] = gr.Textbox(label="Negative prompt", elem_id="draw-negative")
            with gr.Row():
                at["sampler"] = gr.Dropdown([(OWN, ""), *((s, s) for s in SAMPLERS)], value="", label="Sampler",
                                            info="the method",
                                            min_width=150, elem_id="draw-sampler")  # fmt: skip
                at["steps"] = gr.Number(0, label="Steps", precision=0, min_width=90, info="0: its own", minimum=0,
                                        elem_id="draw-steps")  # fmt: skip
                at["guidance"] = gr.Number(
                    0, label="Guidance", min_width=90, info="0: its own", elem_id="draw-guidance"
                )
            with gr.Row():
                at["seed"] = gr.Number(
                    0, label="Seed", precision=0, min_width=90, info="of the noise", elem_id="draw-seed"
                )
                at["count"] = gr.Number(
                    4, label="Pictures", precision=0, min_width=90, info="at once", elem_id="draw-count"
                )
                at["width"] = gr.Number(0, label="Width", precision=0, min_width=90, info="0: its own")
                at["height"] = gr.Number(0, label="Height", precision=0, min_width=90, info="0: its own")
            with gr.Row():
                at["draw"] = gr.Button("Draw", variant="primary", elem_id="draw-draw", scale=3)
                at["stop"] = gr.Button("Stop", elem_id="draw-stop", scale=1, min_width=80)
            _more(gr, studio, at)
        with gr.Column(scale=3, min_width=320):
            at["gallery"] = gr.Gallery(
                show_label=False, columns=4, object_fit="contain", format="png", visible=False, height="auto",
                elem_id="draw-gallery", buttons=["download", "fullscreen"],
            )  # fmt: skip
            at["said"] = gr.HTML(elem_id="draw-said")
            with gr.Column(visible=False) as at["chosen"]:
                at["settings"] = gr.HTML(elem_id="draw-settings")
                with gr.Row():
                    at["use"] = gr.Button("Use these settings", size="sm", elem_id="draw-use", min_width=130)
                    at["redraw"] = gr.Button("Redraw only this one", size="sm", elem_id="draw-redraw", min_width=130)
                    at["onward"] = gr.Button("Start from this picture", size="sm", elem_id="draw-onward", min_width=130)
    at["shown"], at["place"] = gr.State([]), gr.State(None)
    return _connect(gr, studio, at)


def _more(gr: Any, studio: Studio, at: dict[str, Any]) -> None:
    files = studio.loras()
    with gr.Accordion("LoRAs and embeddings", open=False):
        for k in range(LORAS):
            with gr.Row():
                at[f"lora_{k}"] = gr.Dropdown(["", *files], value="", allow_custom_value=True, label=f"LoRA {k + 1}",
                                              scale=3, min_width=170, elem_id=f"draw-lora-{k}")  # fmt: skip
                at[f"weight_{k}"] = gr.Slider(-1, 2, value=1, step=0.05, label="Weight", scale=2, min_width=140,
                                              buttons=[], elem_id=f"draw-weight-{k}")  # fmt: skip
        at["embeddings"] = gr.Dropdown(files, value=[], multiselect=True, allow_custom_value=True, label="Embeddings",
                                       elem_id="draw-embeddings")  # fmt: skip
    with gr.Accordion("Start from a picture", open=False) as at["start"]:
        gr.HTML(
            "<p class='ok'>Paint over a part to draw only that anew (inpainting); without paint all is redrawn.</p>"
        )
        at["editor"] = gr.ImageEditor(
            type="pil", show_label=False, sources=["upload", "clipboard"], transforms=[], layers=False, format="png",
            brush=gr.Brush(colors=["#ff2d95"], color_mode="fixed", default_size=24), height=380, elem_id="draw-editor",
        )  # fmt: skip
        at["strength"] = gr.Slider(0.05, 1, value=0.7, step=0.05, label="Strength", buttons=[],
                                   info="how freely it is redrawn; painted parts are freest at 1")  # fmt: skip
    axes = [("", ""), *((name, key) for key, name in SETTINGS.items())]
    with gr.Accordion("Compare", open=False):
        at["compare"] = gr.Radio([(name, key) for key, name in COMPARE.items()], value="no", show_label=False,
                                 container=False, elem_id="draw-compare")  # fmt: skip
        for k, (first, text) in enumerate((("guidance", "2, 4, 8"), ("", "")), 1):
            with gr.Row(visible=False) as at[f"axis_row_{k}"]:
                at[f"axis_{k}"] = gr.Dropdown(axes, value=first, label="Rows" if k == 1 else "Columns", min_width=120,
                                              elem_id=f"draw-axis-{k}")  # fmt: skip
                at[f"values_{k}"] = gr.Textbox(text, label="Values", info="between commas; of prompts: |", scale=2,
                                               min_width=150, elem_id=f"draw-values-{k}")  # fmt: skip


def _connect(gr: Any, studio: Studio, at: dict[str, Any]) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    quick = {"show_progress": "hidden", "api_visibility": "private"}
    handlers = Handlers(gr, studio, Drawer(studio))
    form = [at[n] for n in (*FORM, *(f"{w}_{k}" for k in range(LORAS) for w in ("lora", "weight")))]
    results = [at["gallery"], at["shown"], at["chosen"], at["said"]]
    slow = {"concurrency_limit": 1, "concurrency_id": "draw", "api_visibility": "private",
            "show_progress": "full", "show_progress_on": at["said"]}  # fmt: skip
    gr.on([at["draw"].click, at["prompt"].submit], handlers.draw, form, results, **slow)
    at["stop"].click(handlers.stop, None, at["said"], **quick)
    at["redraw"].click(handlers.redraw, [at["shown"], at["place"], *form], results, **slow)
    of_one = [at["place"], at["settings"], at["chosen"], at["use"], at["redraw"]]
    at["gallery"].select(handlers.select, at["shown"], of_one, **quick)
    back = [at[n] for n in ("model", "prompt", "negative", "sampler", "steps", "guidance", "seed", "width", "height")]
    at["use"].click(handlers.use, [at["shown"], at["place"]], [*back, at["said"]], **quick)
    at["onward"].click(handlers.onward, [at["shown"], at["place"]], [at["editor"], at["start"], at["said"]], **quick)
    rows = [at["axis_row_1"], at["axis_row_2"]]
    at["compare"].input(lambda kind: [gr.update(visible=kind == "grid")] * 2, at["compare"], rows, **quick)
    lists = [at["model"], *(at[f"lora_{k}"] for k in range(LORAS)), at["embeddings"]]

    def fill(app: Any) -> None:
        app.load(handlers.newest, None, results[:2], **quick)

    def opened(tab: Any) -> None:
        tab.select(handlers.lists, at["model"], lists, **quick)

    return fill, opened


class Handlers:
    """What the tab's parts do."""

    def __init__(self, gr: Any, studio: Studio, drawer: Drawer) -> None:
        self.gr, self.studio, self.drawer = gr, studio, drawer
        self._offered = set(studio.models())
        guard = lambda count, f: ui.guarded(gr, count)(f)  # noqa: E731
        self.use = guard(10, self._use)
        self.onward = guard(3, self._onward)
        skip = gr.skip

        def draw(*values: Any, progress: Any = gr.Progress()) -> Any:  # noqa: B008 (how gradio hands it in)
            try:
                yield from self._draw(values, progress)
            except ValueError as error:
                yield skip(), skip(), skip(), ui.mistake(str(error))

        def redraw(shown: list[Shown], place: int | None, *values: Any, progress: Any = gr.Progress()) -> Any:  # noqa: B008
            try:
                yield self._redraw(shown, place, values, progress)
            except ValueError as error:
                yield skip(), skip(), skip(), ui.mistake(str(error))

        def select(shown: list[Shown], event: Any) -> Any:
            return self._select(shown, event.index)

        select.__annotations__["event"] = gr.SelectData  # by which gradio knows what to hand in
        self.draw, self.redraw, self.select = draw, redraw, select

    def _asked(self, values: tuple[Any, ...]) -> Asked:
        told: dict[str, Any] = dict(zip(FORM, values, strict=False))
        loras = values[len(FORM) :]
        pairs = [(loras[i], float(loras[i + 1])) for i in range(0, len(loras), 2) if loras[i]]
        return Asked(told, pairs)

    def _gallery(self, shown: list[Shown], columns: int | None = None) -> Any:
        value = [(one.path, one.label) for one in shown]
        more: dict[str, Any] = {} if columns is None else {"columns": columns}
        more["allow_preview"] = not any(one.label for one in shown)  # what is compared stays side by side
        return self.gr.update(value=value, visible=bool(shown), selected_index=None, **more)

    def _draw(self, values: tuple[Any, ...], progress: Any) -> Any:
        places, columns = self.drawer.places(self._asked(values))
        shown: list[Shown] = []
        for k, place in enumerate(places):
            prefix = f"{k + 1} of {len(places)}: " if len(places) > 1 else ""
            drawn = self.drawer.draw(place.form, _teller(progress, prefix))
            for path in drawn.pictures:
                shown.append(Shown(str(path), place.label))
            said = ui.command_line("\n".join(self.drawer.typed(p.form) for p in places)) + _notes(drawn.notes)
            yield self._gallery(shown, columns), shown, self.gr.update(visible=False), said
            if drawn.stopped:
                return

    def _redraw(self, shown: list[Shown], place: int | None, values: tuple[Any, ...], progress: Any) -> tuple[Any, ...]:
        one = self._chosen(shown, place)
        drawn, typed = self.drawer.redraw(self._asked(values), Path(one.path), _teller(progress, ""))
        new = list(shown)
        if drawn.pictures and place is not None:
            new[place] = Shown(str(drawn.pictures[0]), one.label)
        said = ui.command_line(typed) + _notes(drawn.notes)
        return self._gallery(new), new, self.gr.update(visible=False), said

    def stop(self) -> str:
        """End the drawing that is going on, after its step."""
        return ui.quiet("Stopping." if self.drawer.stop() else "Nothing is being drawn.")

    def _chosen(self, shown: list[Shown], place: int | None) -> Shown:
        if place is None or place >= len(shown):
            raise ValueError("picture: none is chosen")
        return shown[place]

    def _select(self, shown: list[Shown], place: int) -> tuple[Any, ...]:
        one = self._chosen(shown, place)
        settings = record(Path(one.path))
        rows = [*told(settings), ("File", self.studio.places.short(Path(one.path).resolve()))]
        whole = whole_only(settings)
        table = ui.table(("", ""), rows) + ui.quiet(whole)
        button = self.gr.update(interactive=not whole)
        return place, table, self.gr.update(visible=True), button, button

    def _use(self, shown: list[Shown], place: int | None) -> tuple[Any, ...]:
        settings = record(Path(self._chosen(shown, place).path))
        if whole := whole_only(settings):
            raise ValueError(f"picture: {whole}")
        size = settings.get("size") or [0, 0]
        keys = ("model", "prompt", "negative", "sampler", "steps", "guidance", "seed")
        return (*(settings.get(key) for key in keys), size[-1], size[0], ui.quiet("The form has its settings."))

    def _onward(self, shown: list[Shown], place: int | None) -> tuple[Any, ...]:
        one = self._chosen(shown, place)
        value = {"background": one.path, "layers": [], "composite": one.path}
        return value, self.gr.update(open=True), ui.quiet("It is the picture to start from.")

    def newest(self) -> tuple[Any, ...]:
        """What was drawn last, when the page is loaded."""
        shown = [Shown(str(path), "") for path in self.drawer.newest()]
        return self._gallery(shown), shown

    def lists(self, model: str) -> tuple[Any, ...]:
        """Models and files as they are now."""
        models, files = self.studio.models(), self.studio.loras()
        update, new = self.gr.update, [one for one in models if one not in self._offered]
        self._offered = set(models)
        chosen = {"value": new[0]} if new else {}  # what was made since is what one wants to see
        loras = [update(choices=["", *files]) for _ in range(LORAS)]
        return (update(choices=models, **chosen), *loras, update(choices=files))


def _teller(progress: Any, prefix: str) -> Callable[[str, int, int | None], None]:
    return lambda what, done, total: progress((done, total), desc=f"{prefix}{what}", unit="steps")


def _notes(lines: list[str]) -> str:
    return "".join(ui.quiet(line) for line in lines)
