"""DreamBooth, LoRA and textual inversion on one held-out subject: a table and a picture, one run folder a row.

    python examples/compare_finetuning.py --out runs/finetuning      (again: goes on where it stopped)

Writes OUT/table.md, OUT/picture.png and OUT/ROW/scores.json. Each row is one `ldm finetune` command, printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from ldm.cli.finetune import main as finetune
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.subject import Drawn, draw, five_views, load_pictures, score, sheet, spread

SUBJECT, NOUN, WORD = "1f9a4", "bird", "<dodo>"  # the dodo is in no training split of the shipped model
BOOTH = ["dreambooth", "--identifier", "sks", "--class", NOUN]
TURN = ["textual-inversion", "--token", WORD, "--initializer-token", NOUN]
ROWS: dict[str, list[str]] = {
    "DreamBooth": [*BOOTH],
    "DreamBooth without preservation": [*BOOTH, "--no-prior"],
    "DreamBooth LoRA, rank 4": [*BOOTH, "--lora", "--rank", "4"],
    "DreamBooth LoRA, rank 16": [*BOOTH, "--lora", "--rank", "16"],
    "textual inversion, 1 vector": [*TURN, "--num-vectors", "1"],
    "textual inversion, 4 vectors": [*TURN, "--num-vectors", "4"],
}


def main() -> None:
    p = argparse.ArgumentParser(description="Compare fine-tuning methods on a held-out subject.")
    p.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    p.add_argument("--steps", type=int, help="optimizer steps of every row (default: each method's own)")
    p.add_argument("--quick", action="store_true", help="a few steps and pictures, to see that it runs")
    p.add_argument("--only", nargs="+", choices=list(ROWS), help="these rows alone")
    args = p.parse_args()
    count, solver = (8, 4) if args.quick else (48, 25)
    settings = Settings(sampler="dpmpp_2m", steps=solver, guidance=3.0, seed=1, batch=24)
    images, class_folder = five_views(SUBJECT, args.out / "pictures"), args.out / "class_pictures"
    pictures = load_pictures(images, 64)
    base = draw(TextToImage.load("emoji"), NOUN, NOUN, count, settings)
    records = {"base model": score(base, base, pictures, NOUN).record() | {"seconds": 0.0, "bytes": 0}}
    drawn: list[tuple[str, Drawn]] = [("base model", base)]
    for name in args.only or ROWS:
        out = args.out / name.replace(",", "").replace(" ", "_")
        command = [*ROWS[name], "--images", str(images), "--out", str(out), "--batch", "4"]
        command += ["--steps", str(args.steps or 4)] if args.steps or args.quick else []
        if "dreambooth" in command and "--no-prior" not in command:
            few = ["--num-class-images", "4"] if args.quick else []
            command += ["--class-data-dir", str(class_folder), *few]
        print("ldm finetune", *command, flush=True)
        began = time.monotonic()
        done = (out / "done.json").is_file()
        if finetune(command):
            sys.exit(f"{name}: stopped; the same command goes on")
        seconds = out / "seconds.txt"
        if not done:
            seconds.write_text(str(time.monotonic() - began))
        called = WORD if "--token" in command else f"sks {NOUN}"
        with torch.no_grad():
            found = draw(TextToImage.load(out), called, NOUN, count, settings)
        files = [f for f in (out / "export").rglob("*.safetensors") if f.name != "kohya.safetensors"]
        files = [f for f in files if "a1111" not in f.parts]
        extra = {"seconds": float(seconds.read_text()), "bytes": sum(f.stat().st_size for f in files)}
        records[name] = score(found, base, pictures, NOUN).record() | extra
        (out / "scores.json").write_text(json.dumps(records[name], indent=1))
        drawn.append((name, found))
        write(args.out, records, drawn, pictures)


def write(
    out: Path, records: dict[str, dict[str, float]], drawn: list[tuple[str, Drawn]], pictures: torch.Tensor
) -> None:
    """The table and the picture of what is done so far."""
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
