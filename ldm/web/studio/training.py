"""From what the form of a training says to the command that does it; defaults of the method and the base; the plan."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.web.run import duration


@dataclass(frozen=True)
class Method:
    """A row of the list of methods: what it is for, the command's words, and what the form asks beside.

    `captions`: sample prompts are captions of the folder at first. `given`: what a sample prompt is drawn with beside.
    `own`: that may be the caption's own picture. `masks`: it has a mask, too.
    """

    label: str
    words: tuple[str, ...]
    recipe: str
    rank: bool = False
    subject: bool = False
    token: bool = False
    captions: bool = True
    given: str = ""
    own: bool = False
    masks: bool = False


CONDITIONS = {
    "Edges": "canny", "A grey version": "grey", "A blurred version": "blur", "A small version": "small",
    "Stored beside, in a built data set": "stored",
}  # fmt: skip
"""What a ControlNet follows: the page's words, and those of `--condition`."""
SEES = {"The picture as a whole": "plain", "Its places (plus)": "plus"}
"""What an IP-Adapter tells of a picture: the page's words, and those of `--form`."""
METHODS = {
    "lora": Method("LoRA: a style, or many things, from captioned pictures", ("lora",), "lora", rank=True),
    "dreambooth_lora": Method("DreamBooth with LoRA: one subject, a small file", ("dreambooth", "--lora"),
                              "dreambooth_lora", rank=True, subject=True, captions=False),
    "dreambooth_pivotal": Method("DreamBooth with LoRA and a new word", ("dreambooth", "--pivotal"),
                                 "dreambooth_pivotal", rank=True, subject=True, captions=False),
    "dreambooth": Method("DreamBooth: one subject, all weights", ("dreambooth",), "dreambooth", subject=True,
                         captions=False),
    "textual_inversion": Method("Textual inversion: a new word, a tiny file", ("textual-inversion",),
                                "textual_inversion", token=True, captions=False),
    "controlnet": Method("ControlNet: follow edges, or another version of a picture", ("controlnet",), "controlnet",
                         captions=False, given="what each follows: edges, grey, ..."),
    "ip_adapter": Method("IP-Adapter: a picture as a prompt", ("ip-adapter",), "ip_adapter",
                         given="the prompt beside the words", own=True),
    "instruct": Method("Edits by instructions, from pairs (InstructPix2Pix)", ("instruct",), "instruct",
                       captions=False, given="what each edits"),
    "inpaint": Method("Inpainting: paint what is under a mask", ("inpaint",), "inpaint", captions=False,
                      given="what each paints into", masks=True),
    "upscale": Method("Super-resolution: enlarge pictures", ("upscale",), "upscale",
                      given="made small, then enlarged", own=True),
}  # fmt: skip


@dataclass(frozen=True)
class Defaults:
    """What a method takes where the form says nothing."""

    steps: int
    rate: float
    size: int
    rank: int | None


def defaults(method: str, base: str, images: Path) -> Defaults:
    """Of a method on a base. Raises ValueError for a base that is not there."""
    from ldm.recipes.folder_runs import STEPS, Choices

    how = METHODS[method]
    adapter: dict[str, Any] = {"kind": "lora"} if how.rank else {}
    choices = Choices(method=how.recipe, images=images, base=base, adapter=adapter)
    rank = choices.tuned.get("rank") if how.rank else None
    return Defaults(STEPS[how.recipe], choices.rate, choices.side, rank)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the page holds; None and "" are the method's own."""

    method: str
    images: str
    base: str
    out: str
    steps: float | None = None
    rate: float | None = None
    batch: float | None = None
    size: float | None = None
    rank: float | None = None
    seed: float | None = None
    noun: str = ""
    word: str = ""
    prompts: str = ""
    every: float | None = None
    class_pictures: float | None = None
    condition: str = "canny"
    encoder: str = ""
    sees: str = "plain"
    pictures: Sequence[str] = ()
    masks: Sequence[str] = ()


def command(form: Form) -> list[str]:
    """The words behind `ldm`. Raises ValueError for what the method needs and the form does not say."""
    how = METHODS[form.method]
    argv = ["finetune", *how.words, "--images", form.images, "--base", form.base, "--out", form.out]
    if how.subject:
        if not form.noun.strip():
            raise ValueError("what it is: write the class of the subject, such as dog")
        argv += ["--class", form.noun.strip()]
        if form.word.strip():
            argv += ["--identifier", form.word.strip()]
        if form.class_pictures is not None and int(form.class_pictures) == 0:
            argv += ["--no-prior"]
        elif form.class_pictures is not None:
            argv += ["--num-class-images", str(int(form.class_pictures))]
    if how.token:
        argv += ["--token", form.word.strip() or "<thing>"]
        if form.noun.strip():
            argv += ["--initializer-token", *form.noun.split()]
    if form.method == "controlnet":
        argv += ["--condition", form.condition]
    if form.method == "ip_adapter":
        argv += ["--image-encoder", form.encoder] if form.encoder else []
        argv += ["--form", form.sees]
    numbers: list[tuple[str, float | None]] = [
        ("--steps", form.steps), ("--batch", form.batch), ("--lr", form.rate), ("--size", form.size),
        ("--seed", form.seed), ("--samples-every", form.every),
    ]  # fmt: skip
    if how.rank:
        numbers.append(("--rank", form.rank))
    for option, value in numbers:
        if value is not None:
            argv += [option, f"{value:g}" if option == "--lr" else str(int(value))]
    for prompt in lines(form.prompts):
        argv += ["--prompt", prompt]
    return [*argv, *_given(how, form)]


def _given(how: Method, form: Form) -> list[str]:
    """What the sample prompts are drawn with. Raises ValueError unless each has its own."""
    argv, prompts = [], len(lines(form.prompts))
    for asked, what, option, paths in (
        (how.given, "picture", "--validation-image", form.pictures),
        (how.masks, "mask", "--validation-mask", form.masks),
    ):  # fmt: skip
        if not asked:
            continue
        if len(paths) != prompts:
            raise ValueError(f"sample prompts: {prompts}, each needs a {what} of its own, got {len(paths)}; "
                             "a line each, or none at all")  # fmt: skip
        for path in paths:
            argv += [option, path]
    return argv


def takes(method: str, what: str) -> bool:
    """Whether sample prompts of a method have "pictures", or "masks", of their own."""
    return METHODS[method].masks if what == "masks" else bool(METHODS[method].given)


def lines(text: str) -> list[str]:
    """Those that say something."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def run_name(method: str, images: str, taken: Sequence[str]) -> str:
    """A name for the run that is not taken."""
    stem = f"{Path(images).name or 'pictures'}_{method}"
    stem = re.sub(r"[^\w.-]+", "_", stem)
    names = [stem, *(f"{stem}_{k}" for k in range(2, 1000))]
    return next(name for name in names if name not in taken)


def check_name(name: str) -> str:
    """A run's name as its folder's. Raises ValueError for one that is no plain name."""
    told = name.strip()
    if not re.fullmatch(r"[\w][\w .-]*", told):
        raise ValueError(f"name {name!r}: expected letters, digits, '-', '_' and '.', such as my_lora")
    return told


def plan_words(config: Path, gpu: str) -> list[str]:
    """The command that counts a config's memory and time; `gpu` is a name of `ldm plan --gpu`."""
    return ["plan", str(config), "--gpu", gpu, "--gpus-per-node", "1", "--json"]


@dataclass(frozen=True)
class Plan:
    """What `ldm plan` says: bytes needed and there, seconds in all, warnings."""

    needs: float
    memory: float
    seconds: float
    fits: bool
    warnings: tuple[str, ...]
    gpu: str

    @property
    def told(self) -> list[tuple[str, str, str]]:
        """(figure, what, beside) for the page."""
        room = "" if self.gpu == "cpu" else f"of {self.memory / 1e9:.3g} GB" + ("" if self.fits else ": too little")
        return [(size(self.needs), "memory", room), (duration(self.seconds), "of training", f"on {self.gpu}")]


def read_plan(text: str) -> Plan:
    """Of the JSON that `ldm plan --json` prints."""
    told: Mapping[str, Any] = json.loads(text)
    hardware, chosen, point = told["cluster"]["hardware"], told["chosen"], told["point"]
    parts = chosen["parts"]
    needs = sum(value for key, value in parts.items() if key != "host")
    seconds = point["days"] * 86400 + (point.get("drawing") or 0.0)
    return Plan(
        needs, hardware["memory"] * 1e9, seconds, bool(chosen["fits"]),
        tuple(w for w in told.get("warnings") or () if not w.startswith("task.cache:")),  # true of every new run
        hardware["name"],
    )  # fmt: skip


def size(count: float) -> str:
    """Bytes in words: 48 MB, 11.2 GB."""
    for unit, each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= each:
            return f"{count / each:.3g} {unit}"
    return f"{count:.0f} B"


def this_machine() -> str:
    """The name that `ldm plan` knows this machine's accelerator by: of the nearest memory where it is another."""
    import torch

    from ldm.plan.hardware import HARDWARE

    if not torch.cuda.is_available():
        return "cpu"
    told = torch.cuda.get_device_properties(0)
    plain = told.name.lower().replace(" ", "").replace("geforce", "").replace("nvidia", "")
    for name in sorted(HARDWARE, key=len, reverse=True):
        if name.split("-")[0] in plain and name != "cpu":
            near = [n for n in HARDWARE if n.split("-")[0] == name.split("-")[0]]
            return min(near, key=lambda n: abs(HARDWARE[n].memory * 1e9 - told.total_memory))
    cards = [n for n in HARDWARE if n != "cpu"]
    return min(cards, key=lambda n: abs(HARDWARE[n].memory * 1e9 - told.total_memory))
