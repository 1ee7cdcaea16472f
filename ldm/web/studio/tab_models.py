"""The tab Models: runs and their files, and their export for other programs."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from ldm.web.studio import exports, ui
from ldm.web.studio.exports import FORMS
from ldm.web.studio.runs import LABELS, Run
from ldm.web.studio.studio import Studio
from ldm.web.studio.words import shown

NEWEST = "the finished one, or the newest"


def overview(runs: list[Run]) -> str:
    """All runs."""
    rows = [
        (
            f"<span class='dot {run.state}'></span>{escape(LABELS[run.state])}",
            f"<strong>{escape(run.name)}</strong>",
            escape(run.method),
            escape(run.base),
            f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""),
        )
        for run in runs
    ]
    head = ("State", "Run", "Method", "Base", "Steps")
    return ui.table(head, rows, raw=True) or ui.quiet("No run yet: the tab Train starts one.")


def build(gr: Any, studio: Studio) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    """The tab; gives what fills the page when it is loaded, and when the tab is opened."""
    table = gr.HTML(elem_id="models-table")
    with gr.Column(visible=False) as body:  # noqa: SIM117 (as it is on the page)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                run = gr.Dropdown([], label="Run", elem_id="models-run")
                form = gr.Radio([(text, key) for key, text in FORMS.items()], value="diffusers", label="Export as",
                                elem_id="models-form")  # fmt: skip
                step = gr.Dropdown([NEWEST], value=NEWEST, label="Checkpoint", elem_id="models-step")
                export = gr.Button("Export", variant="primary", elem_id="models-export")
                said = gr.HTML(elem_id="models-said")
            with gr.Column(scale=2, min_width=300):
                gr.HTML("<h3>Its files</h3>")
                held = gr.HTML(elem_id="models-files")
    quick = {"show_progress": "hidden", "api_visibility": "private"}

    def fill(name: str | None) -> tuple[Any, ...]:
        runs = [r for r in studio.runs() if r.state != "waiting"]
        names = [r.name for r in runs]
        name = name if name in names else (names[0] if names else None)
        one = runs[names.index(name)] if name is not None else None
        choices = gr.update(choices=[(r.label, r.name) for r in runs], value=name)
        return overview(runs), gr.update(visible=bool(runs)), choices, *_details(gr, one)

    def asked(name: str, kind: str, at: Any) -> tuple[Run, list[str]]:
        one, short = studio.run(name), studio.places.short
        number = None if at in (None, NEWEST) else int(at)
        return one, exports.command(one, kind, number, short(exports.target(one, kind, number)), short(one.folder))

    @ui.guarded(gr, 3)
    def choose(name: str) -> tuple[Any, ...]:
        return (*_details(gr, studio.run(name)), "")

    @ui.guarded(gr, 2)
    def write(name: str, kind: str, at: Any) -> tuple[Any, ...]:
        one, argv = asked(name, kind, at)
        told = studio.commands.here(argv).lines
        return _details(gr, one)[0], ui.command_line(shown(argv)) + "".join(ui.quiet(line) for line in told[-2:])

    @ui.guarded(gr, 1)
    def tell(name: str, kind: str, at: Any) -> str:
        return ui.command_line(shown(asked(name, kind, at)[1]))

    parts = [table, body, run, held, step]
    run.input(choose, run, [held, step, said], **quick)
    gr.on([form.input, step.input], tell, [run, form, step], said, **quick)
    export.click(write, [run, form, step], [held, said], api_visibility="private", show_progress="full",
                 show_progress_on=said)  # fmt: skip

    def load(app: Any) -> None:
        app.load(fill, run, parts, **quick)

    def opened(tab: Any) -> None:
        tab.select(fill, run, parts, **quick)

    return load, opened


def _details(gr: Any, run: Run | None) -> tuple[Any, Any]:
    if run is None:
        return "", gr.update()
    steps = exports.checkpoints(run)
    held = ui.table(("File", "Size"), exports.contents(run)) or ui.quiet("No model yet.")
    choices = [NEWEST, *(str(step) for step in reversed(steps))]
    return held, gr.update(choices=choices, value=NEWEST, visible=len(steps) > 0)
