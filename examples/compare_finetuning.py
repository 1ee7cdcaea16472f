"""DreamBooth, LoRA and textual inversion on one held-out subject: a table and a picture, one run folder a row.

    python examples/compare_finetuning.py --out runs/finetuning      (again: goes on where it stopped)
    python examples/compare_finetuning.py --only "DreamBooth LoRA, rank 4"

Writes OUT/table.md and OUT/picture.png of all rows that are done; of each OUT/ROW/scores.json and drawn.safetensors.
Each row is one `ldm finetune` command, printed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from launch.options import Parser
from ldm.cli.finetune import main as finetune
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.subject import Drawn, draw, five_views, load_pictures, score, sheet, spread

SUBJECT, NOUN, WORD = "1f9a4", "bird", "<dodo>"  # the dodo is in no training split of the shipped model
BOOTH = ["dreambooth", "--identifier", "sks", "--class", NOUN]
TURN = ["textual-inversion", "--token", WORD, "--initializer-token", NOUN]
LAYERS = ["--targets", "attention", "feed_forward", "projection", "convolution"]  # attention alone is a small part here
ROWS: dict[str, list[str]] = {
    "DreamBooth": [*BOOTH],
    "DreamBooth without preservation": [*BOOTH, "--no-prior"],
    "DreamBooth LoRA, rank 4": [*BOOTH, "--lora", "--rank", "4", *LAYERS],
    "DreamBooth LoRA, rank 16": [*BOOTH, "--lora", "--rank", "16", *LAYERS],
    "textual inversion, 1 vector": [*TURN, "--num-vectors", "1"],
    "textual inversion, 4 vectors": [*TURN, "--num-vectors", "4"],
}


def main() -> None:
    p = Parser(description="Compare fine-tuning methods on a held-out subject.")
    p.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    p.add_argument("--steps", type=int, help="optimizer steps of every row (default: each method's own)")
    p.add_argument("--quick", action="store_true", help="a few steps and pictures, to see that it runs")
    p.add_argument("--only", nargs="+", choices=list(ROWS), help="these rows alone")
    args = p.parse_args()
    count, solver = (8, 4) if args.quick else (48, 25)
    settings = Settings(sampler="dpmpp_2m", steps=solver, guidance=3.0, seed=1, batch=24)
    images, class_folder = five_views(SUBJECT, args.out / "pictures"), args.out / "class_pictures"
    pictures = load_pictures(images, 64)
    base = drawn_of(args.out / "base_model", "emoji", NOUN, count, settings)
    for name in args.only or ROWS:
        out = folder(args.out, name)
        command = [*ROWS[name], "--images", str(images), "--out", str(out), "--batch", "4"]
        command += ["--steps", str(args.steps or 4)] if args.steps or args.quick else []
        if "dreambooth" in command and "--no-prior" not in command:
            few = ["--num-class-images", "4"] if args.quick else []
            command += ["--class-data-dir", str(class_folder), *few]
        print("ldm finetune", *command, flush=True)
        began, done = time.monotonic(), (out / "done.json").is_file()
        if finetune(command):
            sys.exit(f"{name}: stopped; the same command goes on")
        seconds = out / "seconds.txt"
        if not done:
            seconds.write_text(str(time.monotonic() - began))
            (out / "drawn.safetensors").unlink(missing_ok=True)  # by an earlier state of the run
        found = drawn_of(out, out, WORD if "--token" in command else f"sks {NOUN}", count, settings)
        files = [f for f in (out / "export").rglob("*.safetensors") if f.name != "kohya.safetensors"]
        files = [f for f in files if "a1111" not in f.parts]
        extra = {"seconds": float(seconds.read_text()), "bytes": sum(f.stat().st_size for f in files)}
        record = score(found, base, pictures, NOUN).record() | extra
        (out / "scores.json").write_text(json.dumps(record, indent=1))
        write(args.out, score(base, base, pictures, NOUN).record(), base, pictures)


def folder(out: Path, name: str) -> Path:
    """A row's run folder."""
    return out / name.replace(",", "").replace(" ", "_")


def drawn_of(out: Path, model: str | Path, called: str, count: int, settings: Settings) -> Drawn:
    """A row's pictures, drawn once."""
    path = out / "drawn.safetensors"
    if path.is_file() and len((kept := Drawn(**load_file(path))).subject) == count:
        return kept
    with torch.no_grad():
        found = draw(TextToImage.load(model), called, NOUN, count, settings)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in vars(found).items()}, path)
    return found


def write(out: Path, before: dict[str, float], base: Drawn, pictures: torch.Tensor) -> None:
    """The table and the picture of the rows that are done; `before` are the base model's scores."""
    done = [name for name in ROWS if (folder(out, name) / "scores.json").is_file()]
    records = {"base model": before | {"seconds": 0.0, "bytes": 0}}
    records |= {name: json.loads((folder(out, name) / "scores.json").read_text()) for name in done}
    drawn = [("base model", base)]
    drawn += [(name, Drawn(**load_file(folder(out, name) / "drawn.safetensors"))) for name in done]
    head = "| method | subject | prompt R@1 | class → subject | class drift | other drift | seconds | file |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for name, r in records.items():
        figures = [f"{r[k]:.3f}" for k in ("subject", "prompt", "noun_subject", "noun_drift", "other_drift")]
        size = f"{r['bytes'] / 1e6:.2f} MB" if r["bytes"] >= 1e5 else f"{r['bytes'] / 1e3:.1f} kB"
        tail = ["", ""] if not r["bytes"] else [f"{r['seconds']:.0f}", size]
        lines.append("| " + " | ".join([name, *figures, *tail]) + " |")
    note = f"The subject's own pictures among each other: {spread(pictures):.3f}. Chance of R@1: 0.125."
    (out / "table.md").write_text("\n".join([*lines, "", note]) + "\n", encoding="utf-8")
    sheet(drawn, pictures, out / "picture.png")


if __name__ == "__main__":
    main()
