"""The page that `ldm demo` ends with: from what it measured to sections; what is absent is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ldm.web.gallery import Bar, Cell, Curve, Fact, Gallery, Picture, Section

Images = Sequence[Image.Image | None]


@dataclass(frozen=True, kw_only=True)
class RetrievalFigure:
    """One measured recall, rates in [0, 1]."""

    label: str
    rate: float
    low: float
    high: float
    chance: float
    images: int


@dataclass(kw_only=True)
class DemoResults:
    """Everything the page can show. Rates are in [0, 1]; mappings keep their order; None is a picture not made."""

    title: str = "From words to pictures, on a laptop"
    lede: str = ""
    hero: Sequence[Picture] = ()
    """The best pictures of the shipped model, with their prompts."""
    facts: Sequence[Fact] = ()

    data: Sequence[Picture] = ()
    """Some training pictures with captions."""
    data_text: str = ""

    noising: Mapping[str, Images] = field(default_factory=dict)
    """Schedule -> x_t at the times of `noising_times`."""
    noising_times: Sequence[str] = ()

    loss: Sequence[Curve] = ()
    """Loss over optimizer steps; give `smooth`."""
    loss_text: str = ""

    prompts: Sequence[str] = ()
    """The prompts of `stages`, one a column."""
    stages: Mapping[str, Images] = field(default_factory=dict)
    """"before training", "after 2 minutes", ..., "the shipped model" -> one picture a prompt, from the same noise."""

    retrieval: Sequence[RetrievalFigure] = ()
    retrieval_text: str = ""

    sampler_steps: Sequence[int] = ()
    samplers: Mapping[str, Images] = field(default_factory=dict)
    """Sampler -> the same prompt and noise at each count of `sampler_steps`."""
    sampler_text: str = ""

    few_step_counts: Sequence[int] = ()
    few_steps: Mapping[str, Images] = field(default_factory=dict)
    """Prompt and model (the teacher, then its student) -> the same noise at each of `few_step_counts`."""

    image_prompts: Mapping[str, Images] = field(default_factory=dict)
    """The pictures that are prompts, then what was drawn of them, one a column."""

    guidance_scales: Sequence[float] = ()
    guidance: Mapping[str, Images] = field(default_factory=dict)
    """Prompt -> the same noise at each of `guidance_scales`."""

    heldout: Mapping[str, tuple[Images, Images]] = field(default_factory=dict)
    """Prompt that training never saw -> (pictures made, true pictures)."""
    compositional: Mapping[str, tuple[Images, Images]] = field(default_factory=dict)
    """Combination that training never saw -> (pictures made, true pictures)."""

    edits: Mapping[str, Images] = field(default_factory=dict)
    """What was done -> the pictures, of one length in all rows."""

    neighbours: Sequence[tuple[Picture, Sequence[Picture]]] = ()
    """A picture made, and the training pictures nearest to it with their captions and similarities."""
    neighbours_text: str = ""

    cost_header: Sequence[str] = ("what", "time", "memory", "how much")
    costs: Sequence[Sequence[object]] = ()
    commands: Sequence[str] = ()
    footer: str = ""


def build(results: DemoResults) -> Gallery:
    """The page of these results."""
    page = Gallery(results.title, results.lede)
    page.hero(results.hero).facts(results.facts).footer(results.footer)
    first = (_data, _noising, _training, _retrieval, _samplers, _few_steps, _guidance, _image_prompts)
    for part in (*first, _heldout, _neighbours, _edits, _costs):
        part(page, results)
    return page


def write_demo_page(results: DemoResults, path: str | Path) -> Path:
    """`build(results).write(path)`."""
    return build(results).write(path)


def _data(page: Gallery, r: DemoResults) -> None:
    if r.data:
        page.section("The data", r.data_text).grid(r.data, size=92)


def _noising(page: Gallery, r: DemoResults) -> None:
    if r.noising:
        text = (
            "Training teaches one thing: to undo noise. A picture is mixed with noise, `x_t = α x₀ + σ ε`, "
            "from none at the left to nothing else at the right; the schedule says how fast."
        )
        page.section("Noising", text).matrix(r.noising, r.noising_times, size=70)


def _training(page: Gallery, r: DemoResults) -> None:
    if not r.loss and not r.stages:
        return
    section = page.section("Training", r.loss_text)
    if r.loss:
        section.curve(r.loss, "optimizer step", "loss")
    if r.stages:
        section.heading("The same prompts, as training goes on: before and after from the same noise").matrix(
            r.stages, r.prompts, size=84
        )


def _retrieval(page: Gallery, r: DemoResults) -> None:
    if not r.retrieval:
        return
    bars = [
        Bar(
            f.label,
            100 * f.rate,
            100 * f.low,
            100 * f.high,
            100 * f.chance,
            f"{f.rate / f.chance:.1f} × chance, n = {f.images}",
        )
        for f in r.retrieval
    ]
    section = page.section("Does it draw what was asked", r.retrieval_text).bars(bars, "%", top=100)
    section.text("Bars: R@1. Whiskers: 95 % interval over the pictures (Wilson). Upright mark: chance.")


def _samplers(page: Gallery, r: DemoResults) -> None:
    if r.samplers:
        page.section("Samplers", r.sampler_text).matrix(r.samplers, _steps(r.sampler_steps), size=76)


def _few_steps(page: Gallery, r: DemoResults) -> None:
    if r.few_steps:
        text = (
            "Distillation teaches a student to arrive in a few steps where the teacher's long path ends. Guidance is "
            "inside it, so that each step is one call of the network instead of two."
        )
        page.section("Few steps", text).matrix(r.few_steps, _steps(r.few_step_counts), size=76)


def _steps(counts: Sequence[int]) -> list[str]:
    return [f"{n:,} step{'s' if n > 1 else ''}".replace(",", "\u202f") for n in counts]


def _guidance(page: Gallery, r: DemoResults) -> None:
    if r.guidance:
        text = (
            "Classifier-free guidance walks away from the picture without words: `x̂ = u + w (c − u)`. "
            "At 1 it is absent; higher follows the words more closely, and in the end too closely."
        )
        page.section("Guidance", text).matrix(r.guidance, [f"w = {s:g}" for s in r.guidance_scales], size=84)


def _image_prompts(page: Gallery, r: DemoResults) -> None:
    if r.image_prompts:
        text = (
            "A picture can be the prompt, without a word: an IP-Adapter, 0.3 million weights beside the frozen 64 px "
            "model, hands on what a CLIP sees of it. Neither of them has seen these pictures in training."
        )
        page.section("Pictures as prompts", text).matrix(r.image_prompts, size=76)


def _heldout(page: Gallery, r: DemoResults) -> None:
    if not r.heldout and not r.compositional:
        return
    section = page.section("Prompts it never saw", "None of these pictures or captions was in training.")
    if r.compositional:
        section.heading("New combinations of known parts")
        _made_and_true(section, r.compositional)
    if r.heldout:
        section.heading("Concepts that are new altogether")
        _made_and_true(section, r.heldout)


def _made_and_true(section: Section, rows: Mapping[str, tuple[Images, Images]]) -> None:
    made = max(len(m) for m, _ in rows.values())
    true = max(len(t) for _, t in rows.values())
    cells: dict[str, list[Cell]] = {}
    for prompt, (ours, theirs) in rows.items():
        pad_ours, pad_theirs = [None] * (made - len(ours)), [None] * (true - len(theirs))
        cells[prompt] = [*theirs, *pad_theirs, *ours, *pad_ours]
    section.matrix(cells, ["true"] * true + [f"made {i + 1}" for i in range(made)], size=66, divide=True)


def _neighbours(page: Gallery, r: DemoResults) -> None:
    if not r.neighbours:
        return
    text = r.neighbours_text or (
        "A model that had memorised would give back training pictures. Beside each picture made are the training "
        "pictures nearest to it."
    )
    section = page.section("Nearest in training", text)
    most = max(len(near) for _, near in r.neighbours)
    rows: dict[str, Sequence[Cell]] = {}
    for number, (made, near) in enumerate(r.neighbours, 1):
        name = made.caption or str(number)
        name = name if name not in rows else f"{name} ({number})"
        rows[name] = [Picture(made.image, "", made.note), *near, *([None] * (most - len(near)))]
    section.matrix(rows, ["made", "nearest", *(str(i) for i in range(2, most + 1))], size=84, divide=True)


def _edits(page: Gallery, r: DemoResults) -> None:
    if r.edits:
        text = "Changing pictures instead of drawing them from nothing, with the same model and no further training."
        page.section("Editing", text).matrix(r.edits, size=84)


def _costs(page: Gallery, r: DemoResults) -> None:
    if r.costs or r.commands:
        section = page.section("What it took")
        if r.costs:
            section.table(r.cost_header, r.costs)
        if r.commands:
            section.heading("Again, by hand").command(*r.commands)
