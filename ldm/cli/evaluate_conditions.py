"""`ldm evaluate conditions`: what a told picture is worth to a model, against the same drawn without it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.counts import check
from ldm.cli.measured import loaded, model_options

if TYPE_CHECKING:
    from ldm.data.pairs import Pair
    from ldm.evaluate.conditions import Case, Found
    from ldm.pipeline import Settings, TextToImage

KINDS = ("canny", "grey", "blur", "small")
VERBS = {"mask": "inpaint", "fill": "inpaint", "source": "instruct", "small": "upscale"}


def add(verbs: Any) -> None:
    """Enter the verb."""
    p = verbs.add_parser(
        "conditions",
        help="what a picture that a model is told is worth: ControlNets, IP-Adapters, super-resolution, edits, "
        "inpainting",
    )
    p.add_argument("--model", default="emoji", help="base or conditional model: run, diffusers folder, ... (emoji)")
    p.add_argument("--control", metavar="CONTROLNET", help="measure this ControlNet over the model")
    p.add_argument("--condition", choices=KINDS, help="of the ControlNet (its run's own; canny)")
    p.add_argument("--ip-adapter", metavar="FILE", help="measure this IP-Adapter over the model")
    p.add_argument("--image-encoder", metavar="FOLDER", help="of the IP-Adapter (its own)")
    p.add_argument("--scale", type=float, default=1.0, help="of the ControlNet or IP-Adapter (1)")
    p.add_argument("--beside", metavar="MODEL", help="of an inpainting model: a base that inpaints by blending")
    p.add_argument("--level", type=int, help="noise on the small picture (20)")
    p.add_argument("--image-guidance", type=float, help="of instructions: guidance by the picture (1.5)")
    p.add_argument("--no-captions", action="store_true", help="draw under empty prompts: the picture alone tells")
    p.add_argument("--data", default="emoji", help="data set; of edits the one that `ldm data edits` made (emoji)")
    p.add_argument("--split", default="compositional", help="as in train, heldout, compositional (compositional)")
    p.add_argument("--count", type=int, help="pictures (256, or all of a smaller split)")
    p.add_argument("--seed", type=int, default=0, help="of the choice, the noise and the masks (0)")
    p.add_argument("--clip", default="clip_emoji", help="judge of captions: CLIP, a run, open_clip:ARCH:WEIGHTS, none")
    p.add_argument("--candidates", type=int, default=64, help="captions to choose from (64)")
    p.add_argument("--sampler", help="(dpmpp_2m; a few-step model has its own)")
    p.add_argument("--steps", type=int, help="(25; of a few-step model 4)")
    p.add_argument("--guidance", type=float, help="(3; 1 if guidance is distilled into the model)")
    p.add_argument("--batch", type=int, default=32, help="pictures drawn at once (32)")
    model_options(p)
    p.add_argument("--sheet", type=Path, metavar="FILE.png", help="also the first eight pictures of each row")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures and all settings here")
    p.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    """Measure and print."""
    from ldm.evaluate import measure

    check(args, level=0)

    if args.control and args.ip_adapter:
        raise ValueError("--control and --ip-adapter: one at a time")
    for option, of in (("condition", "control"), ("image_encoder", "ip_adapter")):
        if getattr(args, option) and not getattr(args, of):
            raise ValueError(f"--{option.replace('_', '-')}: is of --{of.replace('_', '-')}, which is not given")
    pipe = loaded(args.model, args)
    kind = "control" if args.control else "ip_adapter" if args.ip_adapter else VERBS.get(str(pipe.concat.kind))
    if kind is None:
        raise ValueError(
            f"--model {args.model!r} is told no picture; measure one that is (inpainting, instructions, "
            "super-resolution), or give --control or --ip-adapter"
        )
    settings = _settings(args, pipe, kind)
    case = _case(args, kind, measure.side_of(pipe))
    found, told = _found(args, kind, pipe, case, settings)
    rows = _figures(args, found, case)
    print(f"{len(case.images)} pictures, data {args.data}, split {args.split}: {_what(args, kind)} "
          f"({settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g})")  # fmt: skip
    for line in table(rows):
        print(line)
    if args.sheet is not None:
        _sheet(args.sheet, found)
    if args.out is not None:
        how = {"kind": kind, "weights": measure.model_hashes(pipe), "count": len(case.images), "sampler":
               settings.sampler, "steps": settings.steps, "guidance": settings.guidance, "captions":
               not args.no_captions, "image_guidance": settings.image_guidance}  # fmt: skip
        _write(args, how | told, rows)
    return 0


def _write(args: argparse.Namespace, told: dict[str, Any], rows: Mapping[str, Mapping[str, float]]) -> None:
    from ldm import __version__
    from ldm.checkpoint.files import write_text

    given = ("model", "data", "split", "seed", "scale", "clip", "candidates", "precision")
    protocol = {"measure": "conditions", "version": __version__, **{key: getattr(args, key) for key in given}, **told}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps({"protocol": protocol, "result": rows}, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {args.out}")


def table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines of figures, one a row of pictures."""
    from ldm.evaluate.conditions import columns

    names = columns(rows)
    wide = max(map(len, rows)) + 2
    lines = [" " * wide + "".join(f"{name:>16}" for name in names)]
    for name, row in rows.items():
        cells = (f"{row[column]:.3f}" if column in row else "-" for column in names)
        lines.append(f"{name:<{wide}}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def _what(args: argparse.Namespace, kind: str) -> str:
    return {"control": args.control, "ip_adapter": args.ip_adapter}.get(kind) or f"{kind} by {args.model}"


def _settings(args: argparse.Namespace, pipe: TextToImage, kind: str) -> Settings:
    from ldm.checkpoint.students import choose
    from ldm.pipeline import Settings

    if args.level is not None and kind != "upscale":
        raise ValueError(f"--level: is of super-resolution, and this is {kind}")
    if args.image_guidance is not None and kind != "instruct":
        raise ValueError(f"--image-guidance: is of instructions, and this is {kind}")
    if args.beside is not None and kind != "inpaint":
        raise ValueError(f"--beside: is of inpainting, and this is {kind}")
    sampler, steps, guidance = choose(pipe.student, args.sampler, args.steps, args.guidance, pipe.habit)
    more = {} if args.image_guidance is None else {"image_guidance": args.image_guidance}
    return Settings(sampler=sampler, steps=steps, guidance=guidance, seed=args.seed, batch=args.batch, **more)


def _case(args: argparse.Namespace, kind: str, side: int) -> Case:
    from dataclasses import replace

    from ldm.evaluate import conditions

    make = conditions.edits if kind == "instruct" else conditions.captioned
    case = make(args.data, args.split, args.count, side, args.seed)
    if len(case.images) < 2:
        raise ValueError("--count: 1 picture, and a comparison with another's needs at least 2")
    if args.no_captions and kind == "instruct":
        raise ValueError("--no-captions: an edit needs its instruction")
    return replace(case, prompts=("",) * len(case.prompts)) if args.no_captions else case


def _found(
    args: argparse.Namespace, kind: str, pipe: TextToImage, case: Case, settings: Settings
) -> tuple[Found, dict[str, Any]]:
    """What is drawn, and what the record tells of it."""
    import dataclasses

    from ldm.evaluate import conditions
    from ldm.progress import Bar

    draws = {"control": 3, "ip_adapter": 3}.get(kind, 1)
    with Bar("drawing", "steps", draws * -(-len(case.prompts) // settings.batch) * settings.steps) as bar:

        def step(*_: Any) -> None:
            bar.update()

        if kind == "control":
            from ldm.checkpoint.control_files import load_control
            from ldm.recipes.models import usable

            pair, network = condition(args.control, args.condition), load_control(usable(args.control, "--control"))
            told = {"control": args.control, "condition": dataclasses.asdict(pair)}
            return conditions.control(pipe, network, pair, case, settings, scale=args.scale, progress=step), told
        if kind == "ip_adapter":
            from ldm.recipes.image_prompts import load_pair

            both = load_pair(args.ip_adapter, args.image_encoder)
            told = {"ip_adapter": args.ip_adapter}
            return conditions.image_prompt(pipe, *both, case, settings, scale=args.scale, progress=step), told
        if kind == "upscale":
            found = conditions.upscale(pipe, case, settings, level=args.level, progress=step)
            return found, {"level": args.level}
        if kind == "inpaint":
            beside = None if args.beside is None else loaded(args.beside, args)
            return conditions.inpaint(pipe, case, settings, beside=beside, progress=step), {"beside": args.beside}
        return conditions.instruct(pipe, case, settings, progress=step), {}


def condition(source: str, asked: str | None) -> Pair:
    """What a ControlNet is shown: its run's own pair `condition`, or a kind with its usual settings.

    Raises ValueError for a run whose conditions are stored, which no picture's own can be.
    """
    from ldm.config.load import read
    from ldm.data.pairs import Canny, told

    if asked is not None:
        return told({"kind": asked} | ({"enlarge": True} if asked == "small" else {}), "--condition")
    written = Path(source) / "config.yaml"
    if not written.is_file():
        return Canny()
    own = read(written).get("data", {}).get("pairs", {}).get("condition")
    if not isinstance(own, dict) or own.get("kind") not in KINDS:
        raise ValueError(f"--control {source!r}: its conditions are {own}; only {', '.join(KINDS)} can be made of a "
                         "picture: give --condition")  # fmt: skip
    return told(own, "data.pairs.condition")


def _figures(args: argparse.Namespace, found: Found, case: Case) -> dict[str, dict[str, float]]:
    from ldm.evaluate.conditions import figures
    from ldm.evaluate.measure import exported
    from ldm.metrics.features import EfficientNetLite0, perceptual_distance
    from ldm.recipes.sources import load_clip

    network = EfficientNetLite0()

    def distances(a: Any, b: Any) -> Any:
        import torch

        with torch.no_grad():
            parts = zip(a.split(16), b.split(16))
            maps = network.perceptual_features
            return torch.cat([perceptual_distance(maps(x), maps(y)) for x, y in parts])

    clip = None if args.clip == "none" else load_clip(exported(args.clip))
    return figures(found, case, network, distances, clip, candidates=args.candidates, seed=args.seed)


def _sheet(path: Path, found: Found, most: int = 8) -> None:
    """Rows of pictures: what was shown, then each row's."""
    from ldm.data.grid import sheet, to_pil

    rows = [found.shown, *found.rows.values()]
    pictures = [picture for row in rows for picture in to_pil(row[:most])]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures, min(most, len(found.shown))).save(path)
    print(f"written: {path} (rows: shown, {', '.join(found.rows)})")
