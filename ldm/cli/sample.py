"""`ldm sample PROMPT...`: pictures from prompts."""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.options import Parser

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from ldm.checkpoint.students import FewSteps
    from ldm.pipeline import Guide, Settings, TextToImage


def parser() -> Parser:
    """Options of the verb; their names are those of diffusers' and CompVis' scripts where they have one."""
    p = Parser(
        prog="ldm sample",
        description="Draw pictures of prompts. The same seed gives the same pictures whatever the batch size.",
    )
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help='what to draw, such as "a red apple"')
    p.add_argument("--from-file", type=Path, metavar="FILE", help="one prompt a line, instead or besides")
    p.add_argument("--model", default="emoji", help="shipped name, run or diffusers folder, single file or hub id")
    p.add_argument("--lora", action="append", default=[], metavar="PATH[:WEIGHT]", help="merge a LoRA; may be repeated")
    p.add_argument(
        "--embedding", action="append", default=[], metavar="PATH", help="textual inversion; may be repeated"
    )
    own = "; of a few-step student its own, {}"
    p.add_argument("--sampler", help="see `ldm sample --list-samplers` (dpmpp_2m" + own.format("such as lcm") + ")")
    p.add_argument("--steps", type=int, help="(25" + own.format("4") + ")")
    p.add_argument(
        "--guidance", type=float, help="guidance scale, 1 is none (3" + own.format("1 where it is inside") + ")"
    )
    p.add_argument("--guide", default="cfg", help="cfg, projected (APG) or perpendicular (Perp-Neg)")
    p.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="shares of T that are guided")
    p.add_argument("--rescale", type=float, default=0.0, help="guidance rescale in [0, 1]")
    p.add_argument("--negative", default="", help="negative prompt")
    p.add_argument("--clip-guidance", type=float, default=0.0, metavar="S", help="strength of CLIP guidance; 0 is none")
    p.add_argument("--clip", default="clip_emoji", help="the CLIP of --clip-guidance, as in ldm evaluate --clip")
    p.add_argument("--eta", type=float, help="DDIM's noise, 0 to 1 (default: the sampler's own)")
    p.add_argument("--spacing", help="how the sampler's times are spaced (default: its own)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--count", type=int, default=1, help="pictures of each prompt")
    p.add_argument("--size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width (the model's own)")
    p.add_argument("--batch", type=int, default=16, help="pictures at a time")
    p.add_argument("--prompt-weights", action="store_true", help='read "(word:1.3)" in prompts')
    p.add_argument("--long-prompts", action="store_true", help="take prompts beyond the text tower's context in chunks")
    p.add_argument("--original-size", type=int, nargs=2, metavar=("H", "W"), help="what SDXL is told of the picture")
    p.add_argument("--crop", type=int, nargs=2, default=(0, 0), metavar=("TOP", "LEFT"), help="the same: its crop")
    p.add_argument("--target-size", type=int, nargs=2, metavar=("H", "W"), help="the same: its size after cropping")
    p.add_argument("--vae-tile", type=int, metavar="PIXELS", help="decode in bands of so many pixels squared")
    p.add_argument("--vae-slices", action="store_true", help="decode one picture at a time")
    p.add_argument("--attention-slice", type=int, metavar="N", help="let so many pixels attend at a time")
    p.add_argument("--offload", action="store_true", help="keep the model in the CPU's memory but for the part at work")
    p.add_argument("--compile", action="store_true", help="compile the U-Net first (minutes on a CPU)")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="fp32", help="of the U-Net")
    p.add_argument("--device", default=None, help="cpu, cuda, ...; default: a GPU if there is one")
    p.add_argument("--out", type=Path, default=Path("samples"), help="folder for the pictures")
    p.add_argument("--list-samplers", action="store_true", help="name the samplers and stop")
    return p


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_args(argv)
    if args.list_samplers:
        from ldm.sampling import SAMPLERS

        print("\n".join(SAMPLERS))
        return 0
    prompts = list(args.prompts) + _prompts_in(args.from_file)
    if not prompts:
        raise ValueError('no prompt given; such as: ldm sample "a red apple"')
    if args.count < 1:
        raise ValueError(f"--count: must be at least 1, got {args.count}")
    if args.size is not None and len(args.size) > 2:
        raise ValueError(f"--size: expected one or two numbers, got {args.size}")

    from ldm import dist
    from ldm.data.grid import sheet, to_pil
    from ldm.pipeline import TextToImage
    from ldm.progress import Bar

    settings = _settings(args, None)  # refuses before anything is loaded
    pipeline = TextToImage.load(args.model, device=args.device or dist.device(), precision=args.precision)
    settings = _settings(args, pipeline.student)
    args.sampler, args.steps, args.guidance = settings.sampler, settings.steps, settings.guidance
    _adapt(pipeline, args.lora, args.embedding)
    if args.offload:
        pipeline.offload(args.device or dist.device())
    if args.compile:
        pipeline.compile()
    each = [p for p in prompts for _ in range(args.count)]
    with warnings.catch_warnings(record=True) as caught, Bar("sampling", "steps", leave=False) as bar:
        warnings.simplefilter("always", UserWarning)
        guide = _guide(pipeline, args.clip, args.clip_guidance)
        pictures = to_pil(pipeline.sample(each, settings=settings, progress=bar.to, guide=guide))
    for line in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        print(f"ldm sample: {line}", file=sys.stderr)
    record = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in _NOT_SETTINGS}
    paths = [_save(p, args.out, i, each[i], {**record, "prompt": each[i], "index": i}) for i, p in enumerate(pictures)]
    columns = args.count if args.count > 1 else min(len(pictures), 8)
    grid = args.out / "grid.png"
    sheet(pictures, columns).save(grid, pnginfo=_info({**record, "prompts": prompts}))
    print("\n".join(map(str, [*paths, grid])))
    return 0


def _settings(args: argparse.Namespace, student: FewSteps | None) -> Settings:
    """What is asked for; a student says what is not."""
    from ldm.checkpoint.students import choose
    from ldm.pipeline import Settings

    sampler, steps, guidance = choose(student, args.sampler, args.steps, args.guidance)
    return Settings(
        sampler=sampler, steps=steps, guidance=guidance, rescale=args.rescale, negative=args.negative,
        guide=args.guide, interval=None if args.interval is None else (args.interval[0], args.interval[1]),
        eta=args.eta, spacing=args.spacing, seed=args.seed, batch=args.batch,
        size=None if args.size is None else (args.size[0], args.size[-1]),
        weights=args.prompt_weights, long=args.long_prompts, original=_pair(args.original_size),
        crop=_pair(args.crop) or (0, 0), target=_pair(args.target_size), tile=args.vae_tile, slices=args.vae_slices,
        queries=args.attention_slice,
    )  # fmt: skip


def _pair(values: Sequence[int] | None) -> tuple[int, int] | None:
    return None if values is None else (values[0], values[1])


def _adapt(pipeline: TextToImage, loras: list[str], embeddings: list[str]) -> None:
    """Load `--lora` and `--embedding`."""
    for i, entry in enumerate(loras):
        path, colon, weight = entry.rpartition(":")
        path, weight = (path, weight) if colon and not Path(entry).exists() else (entry, "1")
        try:
            strength = float(weight)
        except ValueError:
            raise ValueError(f"--lora {entry!r}: expected PATH or PATH:WEIGHT, such as style.safetensors:0.8") from None
        pipeline.load_lora(path, strength, name=f"{i} {path}")
    for path in embeddings:
        pipeline.load_embedding(path)


def _guide(pipeline: TextToImage, clip: str, scale: float) -> Guide | None:
    if scale == 0:
        return None
    from ldm.editing import clip_guide
    from ldm.recipes.sources import load_clip

    model, config = load_clip(clip)
    return clip_guide(pipeline, model.to(pipeline.device), config, scale)


_NOT_SETTINGS = ("prompts", "from_file", "out", "list_samplers", "batch")


def _prompts_in(path: Path | None) -> list[str]:
    if path is None:
        return []
    if not path.is_file():
        raise ValueError(f"--from-file: {str(path)!r}: no such file")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _save(picture: Image.Image, folder: Path, index: int, prompt: str, record: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
    path = folder / f"{index:04d}-{name}.png"
    picture.save(path, pnginfo=_info(record))
    return path


def _info(record: dict[str, object]) -> PngInfo:
    """The settings as PNG text, one key `ldm` of JSON."""
    from PIL.PngImagePlugin import PngInfo

    from ldm import __version__

    info = PngInfo()
    info.add_text("ldm", json.dumps({"version": __version__, **record}))
    return info
