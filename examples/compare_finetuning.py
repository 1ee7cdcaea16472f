"""DreamBooth, LoRA, pivotal tuning and textual inversion on held-out subjects: a table with spreads, and pictures.

    python examples/compare_finetuning.py --out runs/finetuning      (again: goes on where it stopped)
    python examples/compare_finetuning.py --only "DreamBooth LoRA, rank 4" --subjects dodo --seeds 0

Writes OUT/table.md over all runs that are done, and OUT/SUBJECT.png of the first seed; of each run scores.json and
drawn.safetensors. Each run is one `ldm finetune` command, printed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from safetensors.torch import load_file, save_file

from launch.options import Parser
from ldm.cli.finetune import main as finetune
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.folder_runs import own_side
from ldm.recipes.subject import Drawn, draw, five_views, load_pictures, score, sheet, spread

LAYERS = ["--targets", "attention", "feed_forward", "projection", "convolution"]  # attention alone is a small part here
BOOTH, PIVOT = ["dreambooth", "--identifier", "sks"], ["dreambooth", "--pivotal"]
ROWS: dict[str, list[str]] = {
    "DreamBooth": [*BOOTH],
    "DreamBooth without preservation": [*BOOTH, "--no-prior"],
    "DreamBooth LoRA, rank 4": [*BOOTH, "--lora", "--rank", "4", *LAYERS],
    "DreamBooth LoRA, rank 16": [*BOOTH, "--lora", "--rank", "16", *LAYERS],
    "pivotal tuning, rank 4": [*PIVOT, "--rank", "4", *LAYERS],
    "pivotal tuning, rank 16": [*PIVOT, "--rank", "16", *LAYERS],
    "textual inversion, 1 vector": ["textual-inversion", "--num-vectors", "1"],
    "textual inversion, 4 vectors": ["textual-inversion", "--num-vectors", "4"],
}
FIGURES = ("subject", "prompt", "noun_subject", "noun_drift", "other_drift")


@dataclass(frozen=True)
class Subject:
    """A sample that is in no training split of the shipped models, and what kind of thing it is."""

    key: str
    noun: str


SUBJECTS = {
    "dodo": Subject("1f9a4", "bird"),
    "poodle": Subject("1f429", "dog"),
    "locomotive": Subject("1f682", "train"),
}


@dataclass(frozen=True)
class Run:
    """One row of one subject and seed."""

    row: str
    subject: str
    seed: int
    out: Path
    base: str

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.out / self.subject / f"seed-{self.seed}" / self.row.replace(",", "").replace(" ", "_")

    @property
    def noun(self) -> str:
        """The subject's class."""
        return SUBJECTS[self.subject].noun

    @property
    def called(self) -> str:
        """How prompts call the subject."""
        word = f"<{self.subject}>"
        return word if "textual-inversion" in ROWS[self.row] else f"{word if self.pivots else 'sks'} {self.noun}"

    @property
    def pivots(self) -> bool:
        """Whether a new word trains beside a LoRA."""
        return "--pivotal" in ROWS[self.row]

    def command(self, images: Path, steps: int | None, quick: bool) -> list[str]:
        """Words behind `ldm finetune`."""
        words = [*ROWS[self.row], "--images", str(images), "--out", str(self.folder), "--batch", "4"]
        words += ["--base", self.base, "--seed", str(self.seed)]
        words += ["--steps", str(steps or 4)] if steps or quick else []
        if "textual-inversion" in words:
            return [*words, "--token", f"<{self.subject}>", "--initializer-token", self.noun]
        words += ["--class", self.noun, *(["--identifier", f"<{self.subject}>"] if self.pivots else [])]
        if "--no-prior" in words:
            return words
        drawn = self.out / self.subject / "class_pictures"
        return [*words, "--class-data-dir", str(drawn), *(["--num-class-images", "4"] if quick else [])]


def main() -> None:
    p = Parser(description="Compare fine-tuning methods on held-out subjects.")
    p.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    p.add_argument("--base", default="emoji", help="the model that is tuned")
    p.add_argument("--steps", type=int, help="optimizer steps of every row (default: each method's own)")
    p.add_argument("--quick", action="store_true", help="a few steps and pictures, to see that it runs")
    p.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="these rows alone")
    p.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = p.parse_args()
    count, solver = (8, 4) if args.quick else (48, 25)
    settings = Settings(sampler="dpmpp_2m", steps=solver, guidance=3.0, seed=1, batch=24)
    for seed in args.seeds:  # all subjects and rows of one seed first: an early end is a whole table of fewer seeds
        for subject in args.subjects:
            images = five_views(SUBJECTS[subject].key, args.out / subject / "pictures")
            for row in args.only:
                one = Run(row, subject, seed, args.out, args.base)
                tune(one, one.command(images, args.steps, args.quick))
                measure(one, images, count, settings)
                write(args.out, args.base)
    for subject in args.subjects:
        picture(args.out, args.base, subject, args.seeds[0])


def tune(one: Run, command: list[str]) -> None:
    """Train, or go on; seconds of what was not done yet are kept."""
    print("ldm finetune", *command, flush=True)
    began, done = time.monotonic(), (one.folder / "done.json").is_file()
    if finetune(command):
        sys.exit(f"{one.folder}: stopped; the same command goes on")
    if not done:
        (one.folder / "seconds.txt").write_text(str(time.monotonic() - began))
        (one.folder / "drawn.safetensors").unlink(missing_ok=True)  # by an earlier state of the run


def measure(one: Run, images: Path, count: int, settings: Settings) -> None:
    """Draw with the tuned model and its base, and write the scores."""
    pictures = load_pictures(images, own_side(one.base))
    base = base_of(one, count, settings)
    found = drawn_of(one.folder, one.folder, one.called, one.noun, count, settings)
    files = [f for f in (one.folder / "export").rglob("*.safetensors") if f.name != "kohya.safetensors"]
    files = [f for f in files if "a1111" not in f.parts]
    extra = {"seconds": float((one.folder / "seconds.txt").read_text()), "bytes": sum(f.stat().st_size for f in files)}
    record = score(found, base, pictures, one.noun).record() | extra
    before = score(base, base, pictures, one.noun).record() | {"among": spread(pictures)}
    (one.folder / "scores.json").write_text(json.dumps(record, indent=1))
    (one.out / one.subject / "base_model" / "scores.json").write_text(json.dumps(before, indent=1))


def base_of(one: Run, count: int, settings: Settings) -> Drawn:
    """What the base model draws of the class."""
    return drawn_of(one.out / one.subject / "base_model", one.base, one.noun, one.noun, count, settings)


def drawn_of(out: Path, model: str | Path, called: str, noun: str, count: int, settings: Settings) -> Drawn:
    """A run's pictures, drawn once."""
    path = out / "drawn.safetensors"
    if path.is_file() and len((kept := Drawn(**load_file(path))).subject) == count:
        return kept
    with torch.no_grad():
        found = draw(TextToImage.load(model), called, noun, count, settings)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in vars(found).items()}, path)
    return found


def done(out: Path, base: str) -> Iterator[Run]:
    """All runs of this comparison that have scores."""
    for row in ROWS:
        for subject in SUBJECTS:
            for folder in sorted((out / subject).glob("seed-*")):
                one = Run(row, subject, int(folder.name.removeprefix("seed-")), out, base)
                if (one.folder / "scores.json").is_file():
                    yield one


def spreads(values: Iterable[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    found = list(values)
    tail = f" ± {stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{mean(found):.{digits}f}{tail}"


def write(out: Path, base: str) -> None:
    """The table of what is done: mean and standard deviation over subjects and seeds."""
    lines = ["| method | subject | prompt R@1 | class → subject | class drift | other drift | seconds | file | runs |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    bases = [json.loads(p.read_text()) for p in sorted(out.glob("*/base_model/scores.json"))]
    lines.append("| " + " | ".join(["base model", *(spreads(b[k] for b in bases) for k in FIGURES), "", "", ""]) + " |")
    runs = list(done(out, base))
    for row in ROWS:
        found = [json.loads((r.folder / "scores.json").read_text()) for r in runs if r.row == row]
        if not found:
            continue
        size = mean(f["bytes"] for f in found)
        told = f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
        figures = [spreads(f[k] for f in found) for k in FIGURES]
        lines.append(
            "| " + " | ".join([row, *figures, spreads((f["seconds"] for f in found), 0), told, str(len(found))]) + " |"
        )
    among = spreads(b["among"] for b in bases)
    note = f"A subject's own pictures among each other: {among}. Chance of R@1: 0.125. ± is one standard deviation."
    (out / "table.md").write_text("\n".join([*lines, "", note]) + "\n", encoding="utf-8")


def picture(out: Path, base: str, subject: str, seed: int) -> None:
    """One line a method, of one subject and seed."""
    runs = [r for r in done(out, base) if r.subject == subject and r.seed == seed]
    if not runs:
        return
    drawn = [("base model", Drawn(**load_file(out / subject / "base_model" / "drawn.safetensors")))]
    drawn += [(r.row, Drawn(**load_file(r.folder / "drawn.safetensors"))) for r in runs]
    sheet(drawn, load_pictures(out / subject / "pictures", own_side(base)), out / f"{subject}.png")


if __name__ == "__main__":
    main()
