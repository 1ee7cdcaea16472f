"""The shipped model and its distilled student at a few steps, from the same noise: one picture.

python examples/few_steps.py --out few_steps.png
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

import ldm
from launch.options import Parser

PROMPTS = (
    "a red apple", "a smiling face with sunglasses", "cat", "police car", "an owl", "a red heart",
    "woman firefighter, medium-dark skin tone", "snowman",
)  # fmt: skip
TEACHER, STUDENT = {"sampler": "euler", "guidance": 3.0}, {"sampler": "lcm", "guidance": 1.0}
SIDE, MARGIN = 112, 120


def main() -> None:
    p = Parser(description="Teacher and student at a few steps.")
    p.add_argument("--out", type=Path, default=Path("few_steps.png"))
    p.add_argument("--seed", type=int, default=3)
    args = p.parse_args()
    rows = [("teacher", "emoji_128", TEACHER, n) for n in (1, 4, 25)]
    rows += [("student", "emoji_128_lcm", STUDENT, n) for n in (1, 2, 4)]
    models = {name: ldm.load(name) for name in ("emoji_128", "emoji_128_lcm")}
    sheet = Image.new("RGB", (MARGIN + SIDE * len(PROMPTS), SIDE * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, model, how, steps) in enumerate(rows):
        draw.text((8, i * SIDE + SIDE // 2 - 6), f"{name}, {steps} step{'s' * (steps > 1)}", fill=(40, 40, 40))
        for j, picture in enumerate(models[model](list(PROMPTS), steps=steps, seed=args.seed, **how)):
            sheet.paste(
                picture.resize((SIDE - 4, SIDE - 4), Image.Resampling.BICUBIC), (MARGIN + j * SIDE, i * SIDE + 2)
            )
    sheet.save(args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
