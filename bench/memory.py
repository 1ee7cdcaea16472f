"""The table of docs/memory.md: cards, families, jobs, the settings with which they fit (measures nothing).

`python -m bench memory` writes it into the page, and each family's rows into its own page; with `--quick` it prints the
rows of Stable Diffusion 1.5 alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.timing import Options
from ldm.config.schema import load_run
from ldm.plan.cards import Answer
from ldm.plan.hardware import GB, HARDWARE, of_memory
from ldm.plan.throughput import Cluster
from ldm.recipes.planned_cards import Needs
from ldm.recipes.planned_drawing import How, Model

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- python -m bench memory -->", "<!-- the end of what python -m bench memory writes -->"
FAMILY_PAGES = ROOT / "docs" / "families"
CARDS = (8, 12, 16, 24)


@dataclass(frozen=True)
class Family:
    """A published family: its name here, its preset, and the configs, with what is added, of a LoRA and of all weights.

    Every job has one picture in a step, so that rows can be compared.
    """

    title: str
    preset: str
    lora: tuple[str, ...]
    full: tuple[str, ...]


def _other(base: str, size: int = 1024) -> tuple[str, ...]:
    return f"task.base={base}", f"data.size={size}"


FAMILIES = (
    Family("SD 1.5", "sd15", ("sd15_lora",), ("sdxl_full", *_other("sd15", 512))),
    Family("SDXL", "sdxl", ("sdxl_lora",), ("sdxl_full",)),
    Family("SD3.5 medium", "sd35_medium", ("sd35_medium_lora",), ("sd35_medium_full",)),
    Family("FLUX.1 dev", "flux_dev", ("flux_dev_lora",), ("flux_dev_full",)),
    Family("PixArt-Sigma", "pixart_sigma", ("pixart_sigma_lora",), ("pixart_sigma_full",)),
    Family("Z-Image", "zimage", ("sd35_medium_lora", *_other("zimage")), ("sd35_medium_full", *_other("zimage"))),
)
HEAD = ("card", "family", "job", "settings", "GB", "minutes / 1000 steps", "figures are")
HALF = How(precision="bf16")
_SINGLE = ("train.batch=1", "train.accumulate=1")
_SHORT = {"train.engine.": "", "task.": "", "train.optim.": ""}


def rows(families: Sequence[Family] = FAMILIES) -> Iterator[tuple[str, ...]]:
    """The table, family by family, each with all cards."""
    for family in families:
        model = Model(family.preset)
        for card in CARDS:
            cluster = Cluster(nodes=1, per_node=1, hardware=of_memory(card))
            yield _row(card, family.title, "sampling", model.answer(HALF, cluster), "--precision=bf16")
        for job, (name, *more) in (("LoRA", family.lora), ("all weights", family.full)):
            yield from _training(family.title, job, name, (*more, *_SINGLE))


def _training(title: str, job: str, name: str, more: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    path = ROOT / "configs" / "finetune" / f"{name}.yaml"
    # A stage above 0 is for several processes, and in a config for a cluster it would stand in the way of offloading.
    more = (*more, "train.engine.zero_stage=1")

    def load(words: tuple[str, ...]) -> Any:
        run = load_run(path, [*more, *words])
        return run.task, run.data, run.train

    first = Needs(load, title, Cluster(nodes=1, per_node=1, hardware=of_memory(CARDS[0])))
    for card in CARDS:
        answer = first.on(Cluster(nodes=1, per_node=1, hardware=of_memory(card))).answer()
        yield _row(card, title, job, answer)


def _row(card: int, title: str, job: str, answer: Answer, *first: str) -> tuple[str, ...]:
    """`first`: what every row of a job has."""
    if answer.way is None:
        lacking = (answer.closest.needs.total - answer.limit) / GB
        return f"{card} GB", title, job, f"none: {lacking:.1f} GB are lacking", "", "", "planned"
    host = answer.way.needs.parts.get("host", 0.0) / GB
    total = f"{answer.way.needs.total / GB:.1f}" + (f" + {host:.1f} in the host" if host >= 0.05 else "")
    minutes = answer.way.needs.minutes
    took = "" if minutes is None else f"{minutes:.1f}"
    return f"{card} GB", title, job, _settings((*first, *answer.way.words)), total, took, "planned"


def _settings(given: Sequence[str]) -> str:
    words = [f"`{_short(word)}`" for word in given if not word.startswith("train.engine.zero_stage")]
    return " ".join(words) or "as it is"


def _short(word: str) -> str:
    for prefix, short in _SHORT.items():
        word = word.replace(prefix, short)
    return word


def table(found: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *found]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def written(text: str) -> list[list[str]]:
    """The rows that a page has."""
    inside = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in inside[2:]]


def write_families(found: Sequence[Sequence[str]]) -> list[str]:
    """Give every family's page its rows, without the family's column; the families that had a page."""
    given = []
    table = [HEAD, ["---"] * len(HEAD), *found]
    for page in sorted(FAMILY_PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        before, begin, rest = text.partition("<!-- cards: ")
        title = rest.partition(" -->")[0]
        end = "<!-- the end of the cards -->"
        own = [[*row[:1], *row[2:]] for row in table if row[1] in (title, *HEAD, "---")]
        lines = "\n".join("| " + " | ".join(row) + " |" for row in own)
        page.write_text(f"{before}{begin}{title} -->\n{lines}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
        given.append(title)
    return given


def run(options: Options) -> dict[str, Any]:
    """Write the page's table, or print a part of it."""
    found = []
    for row in rows(FAMILIES[:1] if options.quick else FAMILIES):
        print(" | ".join(row), flush=True)
        found.append(row)
    if not options.quick:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{table(found)}{END}{after}", encoding="utf-8")
        write_families(found)
    return {"rows": found, "chips": {of_memory(c).name: HARDWARE[of_memory(c).name].matmul for c in CARDS}}
