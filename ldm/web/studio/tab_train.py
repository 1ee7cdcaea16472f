"""The tab Train: what, from which base, with which settings; memory and time beside them; the queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from ldm.checkpoint import files
from ldm.data.captioning import listed
from ldm.web.studio import training, ui
from ldm.web.studio.commands import shown
from ldm.web.studio.runs import LABELS
from ldm.web.studio.studio import Studio
from ldm.web.studio.training import METHODS, Form

FIELDS = ("method", "images", "base", "name", "steps", "rate", "batch", "size", "rank", "seed", "noun", "word",
          "prompts", "every", "class_pictures", "condition", "encoder", "sees", "pictures", "masks")  # fmt: skip
PLANNED = {"method", "images", "base", "steps", "batch", "size", "rank", "condition", "encoder", "sees"}
"""What memory and time depend on."""


def form_of(studio: Studio, told: dict[str, Any]) -> Form:
    """What the fields say, with paths below the folders. Raises ValueError."""
    images = studio.places.folder(told["images"], "pictures")
    name = training.check_name(told["name"] or "")
    given: dict[str, Any] = {
        k: told[k] or None for k in ("steps", "rate", "batch", "size", "rank", "every") if told[k] is not None
    }  # fmt: skip
    if (rate := given.get("rate")) is not None and rate < 0:
        raise ValueError(f"learning rate: must be above 0, got {rate:g}")
    files = {
        key: tuple(studio.places.file(line, what) for line in training.lines(told[key]))
        for key, what in (("pictures", "picture"), ("masks", "mask")) if training.takes(told["method"], key)
    }  # fmt: skip
    return Form(
        method=told["method"], images=studio.places.short(images), base=studio.places.model(told["base"], "base"),
        out=studio.places.short(studio.places.runs / name), seed=told["seed"], noun=told["noun"] or "",
        word=told["word"] or "", prompts=told["prompts"] or "", class_pictures=told["class_pictures"],
        condition=told["condition"], encoder=studio.places.encoder(told["encoder"]), sees=told["sees"], **files,
        **given,
    )  # fmt: skip


def queue_table(studio: Studio) -> str:
    """The jobs that wait, run or ended lately."""
    jobs = studio.queue.jobs()
    rows = []
    for job in [j for j in jobs if j.state != "ended"] + [j for j in reversed(jobs) if j.state == "ended"][:5]:
        state = {"waiting": "waiting", "running": "trains"}.get(job.told, job.told)
        why = f": {studio.queue.problem(job)}" if job.told == "failed" else ""
        rows.append(
            (
                f"<span class='dot {state}'></span>{escape(job.told + why)}",
                escape(Path(job.run).name),
                f"<code>{escape(job.command)}</code>",
            )
        )
    return ui.table(("State", "Run", "Command"), rows, raw=True) or ui.quiet("Nothing is queued.")


def removable(studio: Studio) -> list[tuple[str, int]]:
    """Waiting jobs."""
    return [(Path(job.run).name, job.number) for job in studio.queue.jobs() if job.state == "waiting"]


def build(gr: Any, studio: Studio, folder: Any) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    """The tab; `folder` is the component of the tab Data that holds the chosen one.

    Gives what fills the page when it is loaded, and what is done when the tab is opened.
    """
    from ldm.plan.hardware import HARDWARE

    folders, bases = [*studio.places.pictures(), *studio.places.sets()], studio.bases()
    first = folders[0] if folders else None
    at: dict[str, Any] = {}
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            at["method"] = gr.Dropdown([(m.label, key) for key, m in METHODS.items()], value="lora", label="Method",
                                       elem_id="train-method")  # fmt: skip
            with gr.Row():
                at["images"] = gr.Dropdown(folders, value=first, allow_custom_value=True, label="Pictures",
                                           info="a folder, or a built data set", elem_id="train-images")  # fmt: skip
                at["base"] = gr.Dropdown(
                    bases, value=bases[0], allow_custom_value=True, label="Base model", elem_id="train-base",
                    info="shipped, a folder, a file or a hub id",
                )  # fmt: skip
            _fields(gr, at)
        with gr.Column(scale=2, min_width=300):
            gpu = gr.Dropdown(list(HARDWARE), value=training.this_machine(), label="Plan for", elem_id="train-gpu",
                              info="cpu: one core of a server")  # fmt: skip
            planned = gr.HTML(elem_id="train-plan")
            said = gr.HTML(elem_id="train-said")
            start = gr.Button("Start training", variant="primary", elem_id="train-start")
    with gr.Accordion("All settings", open=False) as settings:
        gr.HTML("<p class='ok'>The whole config of this training. What is changed here is kept as a file and started "
                "with <code>ldm train</code>.</p>")  # fmt: skip
        yaml = gr.Code(language="yaml", label="Config", lines=12, max_lines=30, elem_id="train-yaml")
        with gr.Row():
            load = gr.Button("Fill in from the form", elem_id="train-load")
            start_yaml = gr.Button("Start with these settings", elem_id="train-start-yaml")
    gr.HTML("<h3>Queue</h3>")
    queue = gr.HTML(elem_id="train-queue")
    with gr.Row(visible=False) as waiting:
        which = gr.Dropdown([], label="Waiting run", scale=3)
        remove = gr.Button("Take out of the queue", scale=0, min_width=190, elem_classes="go")
    at |= {"gpu": gpu, "planned": planned, "said": said, "start": start, "settings": settings, "yaml": yaml,
           "load": load, "start_yaml": start_yaml, "queue": queue, "waiting": waiting, "which": which,
           "remove": remove, "folder": folder}  # fmt: skip
    return _connect(gr, studio, at)


def _fields(gr: Any, at: dict[str, Any]) -> None:
    """The settings that matter."""
    with gr.Row(visible=False) as at["subject"]:
        at["noun"] = gr.Textbox(label="What it is", placeholder="dog", info="its class", elem_id="train-noun")
        at["word"] = gr.Textbox(label="Its word", placeholder="sks", info="how prompts will call it")
        at["class_pictures"] = gr.Number(100, label="Class pictures", precision=0,
                                         info="others of its class, drawn first; 0: none")  # fmt: skip
    at["condition"] = gr.Dropdown(list(training.CONDITIONS.items()), value="canny", label="What it follows",
                                  visible=False, elem_id="train-condition")  # fmt: skip
    with gr.Row(visible=False) as at["reference"]:
        at["encoder"] = gr.Textbox("clip_emoji", label="Image encoder", min_width=150, elem_id="train-encoder",
                                   info="clip_emoji, a folder of transformers, or open_clip:ARCH:WEIGHTS")  # fmt: skip
        at["sees"] = gr.Dropdown(list(training.SEES.items()), value="plain", label="What is told of a picture",
                                 info="to the network", min_width=150, elem_id="train-sees")  # fmt: skip
    with gr.Row():
        at["steps"] = gr.Number(1000, label="Steps", precision=0, min_width=110, elem_id="train-steps")
        at["rate"] = gr.Number(0.004, label="Learning rate", min_width=110, elem_id="train-rate")
        at["batch"] = gr.Number(2, label="Batch", precision=0, min_width=110, elem_id="train-batch")
        at["size"] = gr.Number(64, label="Size (pixels)", precision=0, min_width=110, elem_id="train-size")
        at["rank"] = gr.Number(4, label="LoRA rank", precision=0, min_width=110, elem_id="train-rank")
    at["prompts"] = gr.Textbox(label="Sample prompts, one a line", lines=2, max_lines=6,
                               info="drawn while it trains, with the same noise each time",
                               elem_id="train-prompts")  # fmt: skip
    with gr.Row(visible=False) as at["given"]:
        at["pictures"] = gr.Textbox(label="Picture of each prompt", info="a file in each line", lines=2, max_lines=6,
                                    elem_id="train-pictures", min_width=160)  # fmt: skip
        at["masks"] = gr.Textbox(label="Mask of each", info="a file in each line; white is painted", lines=2,
                                 max_lines=6, elem_id="train-masks", min_width=160)  # fmt: skip
    with gr.Row():
        at["every"] = gr.Number(100, label="Samples every (steps)", precision=0, min_width=110,
                                elem_id="train-every")  # fmt: skip
        at["seed"] = gr.Number(0, label="Seed", precision=0, min_width=110)
        at["name"] = gr.Textbox(label="Name of the run", min_width=160, elem_id="train-name")


def _connect(gr: Any, studio: Studio, at: dict[str, Any]) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    fields = [at[name] for name in FIELDS]
    quick = {"show_progress": "hidden", "api_visibility": "private"}
    handlers = Handlers(gr, studio)
    own = [at[name] for name in ("steps", "rate", "size", "rank", "name", "prompts", "subject", "word", "condition",
                                 "reference", "given", "pictures", "masks", "said")]  # fmt: skip
    at["folder"].change(lambda text: text, at["folder"], at["images"], **quick)
    chosen = gr.on(
        [at["method"].change, at["base"].change, at["images"].change], handlers.defaults,
        [at["method"], at["base"], at["images"], at["prompts"]], own, **quick,
    )  # fmt: skip
    parts = [at[name].change for name in sorted(PLANNED - {"method", "images", "base"})]
    plan = {"trigger_mode": "always_last", "concurrency_limit": 1, "concurrency_id": "plan", **quick}
    chosen.then(handlers.plan, [*fields, at["gpu"]], [at["planned"], at["said"]], **plan)
    gr.on([*parts, at["gpu"].change], handlers.plan, [*fields, at["gpu"]], [at["planned"], at["said"]], **plan)
    gr.on([at[n].change for n in ("name", "rate", "noun", "word", "prompts", "every", "seed", "class_pictures",
                            "pictures", "masks")],
          handlers.told, [*fields, at["gpu"]], [at["planned"], at["said"]], **quick)  # fmt: skip
    after = [at["queue"], at["waiting"], at["which"], at["said"]]
    at["start"].click(handlers.start, fields, after, **quick)
    at["load"].click(handlers.config, fields, [at["yaml"], at["said"]], **quick)
    at["settings"].expand(handlers.config, fields, [at["yaml"], at["said"]], **quick)
    at["start_yaml"].click(handlers.start_yaml, [at["yaml"]], after, **quick)
    at["remove"].click(handlers.remove, at["which"], after, **quick)
    timer = gr.Timer(3)
    timer.tick(lambda: handlers.queue()[:3], None, after[:3], **quick)

    def fill(app: Any) -> None:
        app.load(lambda: handlers.queue()[:3], None, after[:3], **quick)
        app.load(handlers.defaults, [at["method"], at["base"], at["images"], at["prompts"]], own, **quick).then(
            handlers.plan, [*fields, at["gpu"]], [at["planned"], at["said"]], **plan
        )

    def opened(tab: Any) -> None:
        tab.select(handlers.captions, [at["method"], at["images"], at["prompts"]],
                   [at["prompts"], at["pictures"]], **quick)  # fmt: skip
        tab.select(lambda: handlers.queue()[:3], None, after[:3], **quick)  # the timer of a hidden tab stands still

    return fill, opened


class Handlers:
    """What the tab's parts do."""

    def __init__(self, gr: Any, studio: Studio) -> None:
        self.gr, self.studio = gr, studio
        guard = lambda count, f: ui.guarded(gr, count)(f)  # noqa: E731
        self.defaults = guard(14, self._defaults)
        self.start = guard(4, self._start)
        self.config = guard(2, self._config)
        self.start_yaml = guard(4, self._start_yaml)
        self.remove = guard(4, self._remove)
        self._was: tuple[Any, ...] = ()
        self._planless = False

    def _form(self, values: tuple[Any, ...]) -> Form:
        return form_of(self.studio, dict(zip(FIELDS, values, strict=True)))

    def _defaults(self, method: str, base: str, images: str, prompts: str) -> tuple[Any, ...]:
        update = self.gr.update
        if not images:
            raise ValueError("pictures: choose a folder in the tab Data, or write one here")
        folder = self.studio.places.folder(images, "pictures")
        found = training.defaults(method, self.studio.places.model(base, "base"), folder)
        how = METHODS[method]
        taken = [run.name for run in self.studio.runs()]
        words, own = self._prompts(folder) if how.captions else ("", "")
        old = self._was
        self._was = (words,)
        keep = bool(prompts) and prompts not in (*old, words)
        return (
            found.steps, found.rate, found.size, update(value=found.rank or 4, visible=how.rank),
            training.run_name(method, images, taken), update(value=prompts if keep else words),
            update(visible=how.subject or how.token),
            update(placeholder="<thing>" if how.token or method == "dreambooth_pivotal" else "sks"),
            update(visible=method == "controlnet"), update(visible=method == "ip_adapter"),
            update(visible=bool(how.given)),
            update(info=f"{how.given}; a file in each line", **({} if keep else {"value": own if how.own else ""})),
            update(visible=how.masks), self.gr.skip(),
        )  # fmt: skip

    def captions(self, method: str, images: str, prompts: str) -> tuple[Any, Any]:
        """The sample prompts, and their pictures, where captions were changed meanwhile, unless others were written."""
        if not (METHODS[method].captions and images and prompts in self._was):
            return self.gr.skip(), self.gr.skip()
        try:
            words, own = self._prompts(self.studio.places.folder(images))
        except ValueError:
            return self.gr.skip(), self.gr.skip()
        self._was = (words,)
        return words, own if METHODS[method].own else self.gr.skip()

    def _prompts(self, folder: Path) -> tuple[str, str]:
        """Captions of the folder as sample prompts, and their pictures."""
        try:
            told = {p.captions[0].partition("\n")[0]: p.path for p in reversed(listed(folder)) if p.captions}
        except ValueError:  # a built data set
            return "", ""
        chosen = list(reversed(told.items()))[:: max(1, len(told) // 4)][:4]
        return "\n".join(text for text, _ in chosen), "\n".join(self.studio.places.short(path) for _, path in chosen)

    def plan(self, *values: Any) -> tuple[Any, str]:
        """Memory and time with the command; of a form with a mistake none, for those of another would stand there."""
        try:
            found = self._plan(*values)
        except ValueError as error:
            self._planless = True
            return ui.quiet("Memory and time: none until this is mended."), ui.mistake(str(error))
        self._planless = False
        return found

    def told(self, *values: Any) -> tuple[Any, str]:
        """The command, after a change that memory and time do not depend on, if they are there."""
        if self._planless:
            return self.plan(*values)
        try:
            return self.gr.skip(), ui.command_line(shown(training.command(self._form(values[:-1]))))
        except ValueError:
            return self.plan(*values)

    def _plan(self, *values: Any) -> tuple[str, str]:
        form, gpu = self._form(values[:-1]), values[-1]
        argv = training.command(form)
        config = self._write("plan", self.studio.commands.here([*argv, "--print-config"]).out)
        told = training.read_plan(self.studio.commands.here(training.plan_words(config, gpu)).out)
        notes = "".join(f"<li>{escape(w.partition(': ')[2] or w)}</li>" for w in told.warnings)
        more = f"<ul class='look'>{notes}</ul>" if notes else ""
        return ui.facts(told.told) + more, ui.command_line(shown(argv))

    def _write(self, name: str, text: str) -> Path:
        folder = self.studio.queue.folder / "configs"
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / f"{name}.yaml", text)
        return folder / f"{name}.yaml"

    def queue(self, note: str = "") -> tuple[Any, ...]:
        """The queue as it is."""
        update, waiting = self.gr.update, removable(self.studio)
        self.studio.runs()  # starts the worker again where it is gone
        choices = update(choices=waiting, value=waiting[0][1] if waiting else None)
        return queue_table(self.studio), update(visible=bool(waiting)), choices, note

    def _start(self, *values: Any) -> tuple[Any, ...]:
        form = self._form(values)
        argv = training.command(form)
        self.studio.commands.here([*argv, "--print-config"])  # refuses what cannot be, before it is queued
        job = self.studio.queue.add(argv, self.studio.places.inside(form.out))
        return self.queue(ui.command_line(job.command) + ui.quiet("queued; the tab Watch follows it"))

    def _config(self, *values: Any) -> tuple[str, Any]:
        argv = training.command(self._form(values))
        return self.studio.commands.here([*argv, "--print-config"]).out, self.gr.skip()

    def _start_yaml(self, text: str) -> tuple[Any, ...]:
        if not (text or "").strip():
            raise ValueError("all settings: empty; fill them in from the form first")
        config = self._write(f"own-{time.strftime('%Y%m%d-%H%M%S')}", text)
        argv = ["train", self.studio.places.short(config)]
        out = self.studio.commands.here([*argv, "--print-config"]).out
        from omegaconf import OmegaConf

        run = self.studio.places.inside(str(OmegaConf.create(out).out), "out")
        if run.parent != self.studio.places.runs:
            raise ValueError(f"out: {str(run)!r} must lie in {self.studio.places.short(self.studio.places.runs)}")
        job = self.studio.queue.add(argv, run)
        return self.queue(ui.command_line(job.command) + ui.quiet("queued; the tab Watch follows it"))

    def _remove(self, number: int | None) -> tuple[Any, ...]:
        if number is None:
            raise ValueError("queue: no waiting run is chosen")
        self.studio.queue.remove(int(number))
        return self.queue(ui.quiet("taken out"))


__all__ = ["LABELS", "build"]
