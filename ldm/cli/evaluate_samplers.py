"""`ldm evaluate samplers`: quality against steps, samplers, models and guidance, as rows, a table and a figure."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.measured import loaded, model_options
from ldm.words import expanded

if TYPE_CHECKING:
    from ldm.evaluate.sampler_rows import Entry

TABLE, FIGURE = "table.md", "figure.svg"


def add(verbs: Any) -> None:
    """Enter the verb."""
    p = verbs.add_parser(
        "samplers",
        help="quality and time against steps, for samplers, models and guidance scales; resumable",
        description="Kernel distance and caption retrieval of drawn pictures, a row for each way of drawing. Each row "
        "is a file in OUT/rows; the same command again measures only what is missing, and other rows may be added.",
    )
    p.add_argument(
        "--model", action="append", metavar="MODEL", help="shipped name, run or folder, or NAME=PATH[:SAMPLER,...]"
        "[:steps=1,2,4][:guidance=1][:spacing=NAME] for one with choices of its own; repeat it for more (emoji)"
    )  # fmt: skip
    p.add_argument("--samplers", default="ddpm,ddim,dpmpp_2m,unipc", help="see `ldm sample --list-samplers`")
    p.add_argument("--steps", default="1,2,4,8,16,50,250", help="one or more")
    p.add_argument("--guidance", default="3", help="classifier-free guidance, one or more (3)")
    p.add_argument("--clip-guidance", default="0", help="strengths of CLIP guidance, one or more (0: none)")
    p.add_argument("--splits", default="train,compositional", help="captions of these parts of the data")
    p.add_argument(
        "--count", default="1000", metavar="N[,STEPS:N...]",
        help="pictures a row; 1000,250:256 means 256 from 250 steps on (1000)",
    )  # fmt: skip
    p.add_argument("--data", default="emoji", help="a shipped data set's name, a folder or a manifest (emoji)")
    p.add_argument("--reference", type=int, default=1500, help="real pictures of a split to compare with (1500)")
    p.add_argument(
        "--network", default="efficientnet_lite0", help="features of the kernel distance: this, inception, or clip:CLIP"
    )
    p.add_argument("--weights", type=Path, help="file of inception's weights, where there is no network")
    p.add_argument(
        "--clip",
        default="clip_emoji",
        help="judge of retrieval: shipped CLIP, a run, or open_clip:ARCH:WEIGHTS (clip_emoji)",
    )
    p.add_argument("--candidates", type=int, default=64, help="captions to choose from (64)")
    p.add_argument("--seed", type=int, default=0, help="of the choice and the noise")
    p.add_argument("--batch", type=int, default=32, help="pictures drawn at once (32)")
    model_options(p)
    p.add_argument(
        "--no-bounds", action="store_true", help="leave out the rows of real pictures and of the autoencoder"
    )
    p.add_argument("--out", type=Path, default=Path("samplers"), help="folder of rows, table and figure (samplers)")
    p.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Measure, and write the table and the figure of all rows of the folder."""
    samplers, splits = _words("samplers", args.samplers), _words("splits", args.splits)
    steps = tuple(_number("steps", v, int) for v in _words("steps", args.steps))
    guidance = tuple(_number("guidance", v, float) for v in _words("guidance", args.guidance))
    clips = tuple(_number("clip-guidance", v, float) for v in _words("clip-guidance", args.clip_guidance))

    from ldm import dist, progress
    from ldm.checkpoint.files import write_text
    from ldm.evaluate import measure, sampler_measure, sampler_rows, sampler_table
    from ldm.pipeline import TextToImage
    from ldm.recipes.sources import load_clip
    from ldm.sampling import lookup

    models = tuple(entry(text) for text in args.model or ["emoji"])
    for name in {*samplers, *(s for m in models for s in m.samplers or ())}:
        lookup(name)
    plan = sampler_rows.Plan(
        models=models, samplers=samplers, steps=steps, guidance=guidance, clip_guidance=clips, splits=splits,
        counts=_counts(args.count), bounds=not args.no_bounds,
    )  # fmt: skip
    clip, config = load_clip(measure.exported(args.clip))
    judge = sampler_measure.Judge(
        network=measure.feature_network(args.network, args.weights), clip=clip, clip_config=config, clip_name=args.clip,
        data=args.data, reference=args.reference, candidates=args.candidates, seed=args.seed,
    )  # fmt: skip

    def load(source: str) -> TextToImage:
        return loaded(source, args)

    table = sampler_table.Table(args.out, judge, load, batch=args.batch, precision=args.precision)
    with progress.Bar("drawing a batch", "steps", leave=False) as bar:
        rows = table.run(plan, progress.line, bar.to)
    if dist.rank():
        return 0
    write_text(args.out / TABLE, sampler_table.markdown(rows))
    write_text(args.out / FIGURE, figure(rows))
    print(sampler_table.markdown(rows), end="")
    print(f"written: {args.out}/results.json, {TABLE}, {FIGURE}")
    return 0


def entry(text: str) -> Entry:
    """A model from its option: PATH, or NAME=PATH with choices after colons."""
    from ldm.evaluate.sampler_rows import Entry

    name, equal, rest = text.partition("=")
    if not equal:
        return Entry(name=Path(text).name or text, source=text)
    source, *choices = expanded(rest).split(":")
    found: dict[str, Any] = {}
    for choice in choices:
        key, given, value = choice.partition("=")
        key, value = (key, value) if given else ("samplers", choice)
        if key == "samplers":
            found[key] = _words(key, value)
        elif key == "steps":
            found[key] = tuple(_number(key, v, int) for v in _words(key, value))
        elif key == "guidance":
            found[key] = tuple(_number(key, v, float) for v in _words(key, value))
        elif key == "spacing":
            found[key] = value
        else:
            raise ValueError(f"--model: {key!r} in {text!r} is not one of ['guidance', 'samplers', 'spacing', 'steps']")
    return Entry(name=name, source=source, **found)


def _words(key: str, text: str) -> tuple[str, ...]:
    words = tuple(w.strip() for w in text.split(",") if w.strip())
    if not words:
        raise ValueError(f"--{key}: expected one or more, separated by commas, got {text!r}")
    return words


def _number(key: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"--{key}: {text!r} is not a number") from None


def _counts(text: str) -> tuple[tuple[int, int], ...]:
    pairs = []
    for word in _words("count", text):
        least, colon, count = word.rpartition(":")
        pairs.append((_number("count", least, int) if colon else 0, _number("count", count, int)))
    return tuple(pairs)


def figure(rows: list[dict[str, Any]]) -> str:
    """KID and R@1 of each split, against whichever was varied most: steps, guidance or CLIP guidance."""
    from ldm.evaluate.sampler_rows import BOUNDS
    from ldm.web.chart import Curve
    from ldm.web.figure import Panel, svg

    drawn = [row for row in rows if row["protocol"]["sampler"] not in BOUNDS]
    axes = {"steps": "steps", "guidance": "guidance", "clip_guidance": "CLIP guidance"}
    axis = max(axes, key=lambda key: len({row["protocol"][key] for row in drawn}))
    others: dict[tuple[str, str], dict[str, set[float]]] = {}
    for p in (row["protocol"] for row in drawn):
        for key in axes.keys() - {axis}:
            others.setdefault((p["model"], p["sampler"]), {}).setdefault(key, set()).add(p[key])
    splits = sorted({row["protocol"]["split"] for row in drawn}, key=lambda s: (s != "train", s))
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    several = len({row["protocol"]["model"] for row in drawn}) > 1
    for row in drawn:
        p = row["protocol"]
        label = f"{p['model']} {p['sampler']}" if several else p["sampler"]
        varied = others[p["model"], p["sampler"]]
        label += "".join(f", {axes[key]} {p[key]:g}" for key in axes if len(varied.get(key, ())) > 1)
        curves.setdefault(label, {}).setdefault(p["split"], []).append(row)
    panels = []
    for name, of in (("KID", lambda r: 1000 * r["kernel_distance"]["mean"]), ("R@1", lambda r: r["R@1"]["rate"])):
        for split in splits:
            lines = []
            for label, found in curves.items():
                points = sorted((row["protocol"][axis], of(row["result"])) for row in found.get(split, []))
                lines.append(Curve(label, [x for x, _ in points], [y for _, y in points]))
            unit = "KID · 10³" if name == "KID" else "R@1"
            steps = axis == "steps"
            panels.append(Panel(f"{split}: {unit}", lines, axes[axis], log_x=steps, log_y=steps and name == "KID"))
    return svg(panels)
