"""The tab Watch: a run's figures, curves and samples as it trains; sample now, stop and go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any

from ldm.web import run as pages
from ldm.web.chart import line_chart
from ldm.web.studio import runs as own
from ldm.web.studio import ui
from ldm.web.studio.runs import LABELS, Run
from ldm.web.studio.studio import Studio

CHARTS = ("Loss", "Learning rate", "Throughput", "Memory")
"""Of `ldm.web.run.CHARTS`; the page of `ldm show run` has all."""
SECONDS = 2.0


def head(run: Run, found: pages.Found | None) -> str:
    """State, progress and figures."""
    dot = f"<span class='dot {run.state}'></span>"
    what = " · ".join(escape(w) for w in (run.method, run.base and f"on {run.base}") if w)
    lines = [f"<p><strong>{dot}{escape(LABELS[run.state])}</strong>{f' — {what}' if what else ''}</p>"]
    if run.problem:
        lines.append(ui.mistake(run.problem))
    if found is None:
        told = {"prepares": "Models and data are made ready; the first figures come with the first step.",
                "waiting": "It starts when those before it have ended."}.get(run.state, "")  # fmt: skip
        return "".join(lines) + ui.quiet(told)
    rows = [(fact.value, fact.label, fact.note) for fact in pages.facts(found) if fact.value != "done"]
    if run.state != "trains":
        rows = [row for row in rows if "left" not in row[1]]
    rate = next((r["lr"] for r in reversed(found.rows) if isinstance(r.get("lr"), int | float)), None)
    held = next((r["memory_gib"] for r in reversed(found.rows) if isinstance(r.get("memory_gib"), int | float)), None)
    rows += [(f"{rate:.3g}", "learning rate", "")] if rate is not None else []
    rows += [(f"{held:.3g} GiB", "memory", "")] if held is not None else []
    share = found.rows[-1]["step"] / found.steps if found.steps else 0.0
    return "".join(lines) + ui.bar(1.0 if run.state == "finished" else share) + ui.facts(rows)


def charts(found: pages.Found | None) -> str:
    """The curves that have two points or more."""
    drawn = []
    for title, _, metrics, label, log_y in pages.CHARTS if found is not None else ():
        if title not in CHARTS or found is None:
            continue
        curves = [c for c in (pages.curve(found.rows, metric, name) for metric, name in metrics) if c is not None]
        if any(math.isfinite(v) for c in curves for v in c.y):
            drawn.append(f"<div><h4>{escape(title)}</h4>{line_chart(curves, 'step', label, log_y)}</div>")
    return f"<div class='charts'>{''.join(drawn)}</div>" if drawn else ""


def sample(run: Run, number: int) -> str:
    """One of the sample pictures, counted from 1, and what it shows."""
    found = own.samples(run)
    if not found:
        return ""
    step, path = found[min(max(number, 1), len(found)) - 1]
    prompts = ((own.config_of(run.folder).get("task") or {}).get("samples") or {}).get("prompts") or []
    words = "; ".join(str(p) or "(empty)" for p in prompts)
    alt = f"sample pictures of step {step}"
    return f"<div class='sample'>{ui.image(path, alt)}<p><strong>Step {step}</strong> — {escape(words)}</p></div>"


def build(gr: Any, studio: Studio) -> Callable[[Any], None]:
    """The tab."""
    at: dict[str, Any] = {}
    at["run"] = gr.Dropdown([], label="Run", elem_id="watch-run", allow_custom_value=False)
    at["head"] = gr.HTML(elem_id="watch-head")
    with gr.Row():
        at["now"] = gr.Button("Sample now", elem_id="watch-now", min_width=130)
        at["stop"] = gr.Button("Stop (saves)", elem_id="watch-stop", min_width=130)
        at["again"] = gr.Button("Go on", variant="primary", elem_id="watch-again", min_width=130)
    at["said"] = gr.HTML(elem_id="watch-said")
    with gr.Row():
        with gr.Column(scale=2, min_width=300, visible=False) as at["samples"]:
            at["sample"] = gr.HTML(elem_id="watch-sample")
            at["slider"] = gr.Slider(1, 2, value=1, step=1, label="Samples over time", elem_id="watch-slider",
                                     buttons=[])  # fmt: skip
        with gr.Column(scale=3, min_width=300):
            at["charts"] = gr.HTML(elem_id="watch-charts")
    with gr.Accordion("What it printed", open=False):
        at["log"] = gr.HTML(elem_id="watch-log")
    at["seen"] = gr.State(("", 0))
    return _connect(gr, studio, at)


def _connect(gr: Any, studio: Studio, at: dict[str, Any]) -> Callable[[Any], None]:
    live = [at[n] for n in ("run", "head", "now", "stop", "again", "samples", "sample", "slider", "charts", "log",
                            "seen")]  # fmt: skip
    quick = {"show_progress": "hidden", "api_visibility": "private"}
    handlers = Handlers(gr, studio)
    at["run"].input(handlers.chosen, [at["run"], at["slider"], at["seen"]], live, **quick)
    at["slider"].input(handlers.slide, [at["run"], at["slider"]], at["sample"], **quick, trigger_mode="always_last")
    for name, handle in (("now", handlers.now), ("stop", handlers.stop), ("again", handlers.again)):
        at[name].click(handle, at["run"], at["said"], **quick).then(
            handlers.live, [at["run"], at["slider"], at["seen"]], live, **quick
        )
    timer = gr.Timer(SECONDS)
    timer.tick(handlers.live, [at["run"], at["slider"], at["seen"]], live, **quick, concurrency_limit=2)

    def fill(app: Any) -> None:
        app.load(handlers.live, [at["run"], at["slider"], at["seen"]], live, **quick)

    return fill


class Handlers:
    """What the tab's parts do."""

    def __init__(self, gr: Any, studio: Studio) -> None:
        self.gr, self.studio = gr, studio
        guard = lambda count, f: ui.guarded(gr, count)(f)  # noqa: E731
        self.now = guard(1, lambda name: self._told(own.sample_now(studio.run(name)), "drawn after this step"))
        self.stop = guard(1, self._stop)
        self.again = guard(1, self._again)
        self.slide = guard(1, lambda name, number: sample(studio.run(name), int(number)))

    def _told(self, command: str, what: str) -> str:
        return ui.command_line(command) + ui.quiet(what)

    def _stop(self, name: str) -> str:
        run = self.studio.run(name)
        return self._told(self.studio.queue.stop(run.folder, run.owner), "it finishes its step, saves and ends")

    def _again(self, name: str) -> str:
        job = own.again(self.studio.run(name), self.studio.queue)
        return self._told(job.command, "the same command goes on where the run was")

    def chosen(self, name: str | None, number: float, seen: tuple[str, int]) -> tuple[Any, ...]:
        """Another run: its newest sample."""
        return self.live(name, number, ("", 0))

    def live(self, name: str | None, number: float, seen: tuple[str, int]) -> tuple[Any, ...]:
        """All figures as they are now; `seen`: the run, and how many samples were there. The newest is followed."""
        update = self.gr.update
        listed = self.studio.runs()
        names = [run.name for run in listed]
        if name not in names:
            name = names[0] if names else None
        choices = update(choices=[(run.label, run.name) for run in listed], value=name, visible=bool(listed))
        hidden = update(visible=False)
        if name is None:
            empty = ui.quiet("No run yet: the tab Train starts one.")
            return choices, empty, hidden, hidden, hidden, hidden, "", update(), "", "", ("", 0)
        run = listed[names.index(name)]
        found = own.found(run)
        count = len(own.samples(run))
        follows = tuple(seen) != (name, count) and (seen[0] != name or number >= seen[1])
        number = count if follows else min(int(number), max(count, 1))
        over = [step for step, _ in own.samples(run)]
        slider = update()
        if tuple(seen) != (name, count):
            info = f"from step {over[0]} to {over[-1]}" if over else None
            slider = update(maximum=max(count, 2), value=max(number, 1), visible=count > 1, info=info)
        picture = update() if tuple(seen) == (name, count) else sample(run, int(number))
        log = own.said(run, self.studio.queue)
        return (
            choices, head(run, found), update(visible=run.active), update(visible=run.active),
            update(visible=not run.active and run.state not in ("finished", "waiting")), update(visible=count > 0),
            picture, slider, charts(found), f"<div class='log'>{escape(log)}</div>" if log else ui.quiet("Nothing."),
            (name, count),
        )  # fmt: skip
