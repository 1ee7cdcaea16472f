"""`ldm sample PROMPT...`: pictures from prompts."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import adapting, control, image_prompt, kept, opening
from ldm.cli.options import TEXT_PRECISION_HELP, TEXT_PRECISIONS, Parser
from ldm.models.shipped import DEFAULT

if TYPE_CHECKING:
    from PIL import Image

    from ldm.checkpoint.students import FewSteps
    from ldm.pipeline import Guide, Settings, TextToImage


def parser() -> Parser:
    """Options of the verb; their names are those of diffusers' and CompVis' scripts where they have one."""
    p = Parser(
        prog="ldm sample",
        description="Draw pictures of prompts, as PNG files that hold their settings. The same seed gives the same "
        "pictures whatever the batch size.",
    )
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help='what to draw, such as "a red apple"')
    p.add_argument("--from-file", type=Path, metavar="FILE", help="more prompts, one a line")
    p.add_argument(
        "--from-png", type=Path, metavar="PNG",
        help="draw this picture again with the settings stored in it; other options given change them; also reads "
        "A1111's and ComfyUI's, as far as they are known here",
    )  # fmt: skip
    p.add_argument("--model", default=DEFAULT, help="shipped name, run or diffusers folder, single file or hub id")
    adapting.add(p)
    control.add(p)
    image_prompt.add(p)
    p.add_argument(
        "--lenient", action="store_true", help="leave out, and name, unknown tensors of a file instead of refusing it"
    )
    opening.add(p)
    p.add_argument(
        "--clean-captions", action="store_true",
        help="clean prompts of links, markup, names of files and more, as PixArt's pipelines do (clean_caption); needs "
        "beautifulsoup4; PixArt alone",
    )  # fmt: skip
    p.add_argument("--text", metavar="FOLDER", help="model folder with the text encoders that a single file lacks")
    p.add_argument("--vae", metavar="PATH", help="model folder or ae.safetensors, where a single file lacks its own")
    _add_sampler(p)
    p.add_argument("--seed", type=int, default=0, help="any whole number")
    p.add_argument("--count", type=int, help="pictures of each prompt (default: 1)")
    p.add_argument(
        "--index", type=int, nargs="+", metavar="N",
        help="draw only these of all pictures, counted from 0; every bit is as when all are drawn",
    )  # fmt: skip
    p.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side, or height and width, multiples of 8 (default: the model's own)",
    )
    p.add_argument("--batch", type=int, default=16, help="pictures at a time")
    _add_prompts_and_memory(p)
    p.add_argument("--out", type=Path, default=Path("samples"), help="folder for the pictures")
    p.add_argument("--list-samplers", action="store_true", help="name the samplers and stop")
    return p


def _add_sampler(p: Parser) -> None:
    """Sampler and guidance."""
    own = "; Stable Diffusion 3, FLUX.1, PixArt and Z-Image have theirs; a few-step model has its own, {}"
    p.add_argument("--sampler", help="see `ldm sample --list-samplers` (dpmpp_2m" + own.format("such as lcm") + ")")
    p.add_argument("--steps", type=int, help="(25" + own.format("4") + ")")
    p.add_argument(
        "--guidance",
        type=float,
        help="guidance scale, 1 is none (3" + own.format("1 if guidance is distilled into it") + ")",
    )
    p.add_argument("--guide", default="cfg", help="kind of guidance: cfg, projected (APG) or perpendicular (Perp-Neg)")
    p.add_argument(
        "--interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only between these shares of the time range, such as 0.2 0.8",
    )
    p.add_argument(
        "--rescale", type=float, default=0.0, help="guidance rescale, 0 (off) to 1: less over-exposure at high guidance"
    )
    p.add_argument("--negative", default="", help="negative prompt")
    p.add_argument("--skip-layers", type=int, nargs="+", default=[], metavar="N",
                   help="skip-layer guidance: blocks to leave out (Stable Diffusion 3.5 medium: 7 8 9)")  # fmt: skip
    p.add_argument("--skip-layer-scale", type=float, default=2.8, metavar="S", help="strength of skip-layer guidance")
    p.add_argument("--skip-layer-interval", type=float, nargs=2, default=(0.01, 0.2), metavar=("FROM", "TO"),
                   help="the share of the steps in which it works")  # fmt: skip
    p.add_argument("--clip-guidance", type=float, default=0.0, metavar="S", help="strength of CLIP guidance; 0 is none")
    p.add_argument("--clip", default="clip_emoji", help="the CLIP model of --clip-guidance, as in ldm evaluate --clip")
    p.add_argument("--eta", type=float, help="noise added in each step, 0 to 1 (default: the sampler's own)")
    p.add_argument("--spacing", help="time spacing, such as trailing or karras (default: the sampler's own)")


def _add_prompts_and_memory(p: Parser) -> None:
    """How prompts are read, what SDXL is told, and what takes less memory or time."""
    p.add_argument("--prompt-weights", action="store_true", help='read "(word:1.3)", "((word))", "[word]"')
    p.add_argument(
        "--long-prompts", action="store_true", help="encode prompts longer than the text encoder's context in chunks"
    )
    p.add_argument(
        "--original-size", type=int, nargs=2, metavar=("H", "W"), help="SDXL: the original size that it is told"
    )
    p.add_argument(
        "--crop", type=int, nargs=2, default=(0, 0), metavar=("TOP", "LEFT"), help="SDXL: the crop that it is told"
    )
    p.add_argument(
        "--target-size", type=int, nargs=2, metavar=("H", "W"), help="SDXL: the size after cropping that it is told"
    )
    p.add_argument("--vae-tile", type=int, metavar="PIXELS", help="less memory: decode in tiles of this side")
    p.add_argument("--vae-slices", action="store_true", help="less memory: decode one picture at a time")
    p.add_argument(
        "--attention-slice", type=int, metavar="N", help="less memory: compute attention for N pixels at a time"
    )
    p.add_argument(
        "--offload",
        action="store_true",
        help="less GPU memory: keep the parts of the model in the CPU's memory until each is used",
    )
    p.add_argument(
        "--blocks-on-device", type=int, metavar="N",
        help="less GPU memory: keep N blocks of the network on the device at once, and fetch the others from the CPU's "
        "memory before they run; text encoders and autoencoder are there only while they are used",
    )  # fmt: skip
    p.add_argument(
        "--compile", action="store_true", help="compile the network first with torch.compile (minutes on a CPU)"
    )
    p.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="fp32", help="what the network computes in"
    )
    p.add_argument("--text-precision", choices=TEXT_PRECISIONS, help=TEXT_PRECISION_HELP + " (as --precision)")
    p.add_argument("--device", default=None, help="cpu, cuda, ...; default: a GPU if there is one")


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args, recorded = _parsed(argv)
    if args.list_samplers:
        from ldm.sampling import SAMPLERS

        print("\n".join(SAMPLERS))
        return 0
    control.check(args)
    image_prompt.check(args)
    job = _job(args, recorded)
    settings = _settings(args, None)  # refuses before anything is loaded
    pipeline, settings, record = _loaded(args, settings)
    differs = [key for key in ("precision", "text_precision") if recorded.get(key, record[key]) != record[key]]
    if differs:  # then the weights are others too
        told = ", ".join(f"{key} {recorded[key]}, now {record[key]}" for key in differs)
        _say([f"{args.from_png}: drawn with {told}: the picture will be another"])
    elif recorded.get("weights", record["weights"]) != record["weights"]:
        _say([f"{args.from_png}: drawn by a model of other weights than {args.model}: the picture will be another"])
    for key, what in (("conditions", "under other condition pictures"), ("references", "with other image prompts")):
        if recorded.get(key, record[key]) != record[key]:
            _say([f"{args.from_png}: drawn {what}: the picture will be another"])
    return _draw(_Drawing(job, pipeline, settings, record, args.out), args)


@dataclass(frozen=True)
class _Job:
    """What is drawn: a prompt for each place, the index of its noise, and which places are kept (None: all)."""

    prompts: list[str]
    each: list[str]
    indices: list[int]
    only: list[int] | None


def _job(args: argparse.Namespace, recorded: Mapping[str, Any]) -> _Job:
    given = list(args.prompts) + _prompts_in(args.from_file)
    prompts = given or list(recorded.get("prompts", [recorded["prompt"]] if "prompt" in recorded else []))
    if not prompts:
        raise ValueError('no prompt given; such as: ldm sample "a red apple"')
    if args.count is not None and args.count < 1:
        raise ValueError(f"--count: must be at least 1, got {args.count}")
    if args.offload and args.blocks_on_device is not None:
        raise ValueError("--offload moves the network whole and --blocks-on-device by its blocks: give one of both")
    if args.size is not None and len(args.size) > 2:
        raise ValueError(f"--size: expected one or two numbers, got {args.size}")
    if "index" in recorded and args.count is None and args.index is None and len(prompts) == 1:
        rows = int(recorded.get("rows", 1))  # a batch of the same shape: the other rows change no bit
        return _Job(prompts, prompts * rows, [int(recorded["index"])] * rows, [int(recorded.get("row", 0))])
    each = [p for p in prompts for _ in range(args.count or 1)]
    for index in args.index or ():
        if not 0 <= index < len(each):
            raise ValueError(
                f"--index: {index} is none of the {len(each)} pictures, 0 to {len(each) - 1}; give the prompts and the "
                "--count that it was drawn with"
            )
    return _Job(prompts, each, list(range(len(each))), args.index)


def _parsed(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options, and what a picture of --from-png says, whose settings are the options' defaults."""
    p = parser()
    args = p.parse_args(argv)
    if args.from_png is None:
        return args, {}
    from ldm.cli import drawn
    from ldm.sampling import foreign

    recorded = drawn.record(args.from_png)
    if recorded is None:
        try:
            found = foreign.read(drawn.texts(args.from_png))
        except ValueError as error:
            raise ValueError(f"--from-png {str(args.from_png)!r}: {error}") from error
        lines = [f"{args.from_png}: settings of {found.program}; the noise is not its own: the picture will be another"]
        _say(lines + [f"not used: {entry}" for entry in found.unused])
        recorded = found.options
        p.set_defaults(model=None)
    elif "command" in recorded:
        command = shlex.join(["ldm", *map(str, recorded["command"])])
        raise ValueError(f"--from-png {str(args.from_png)!r}: an edited picture; this draws it again: {command}")
    known = {action.dest for action in p._actions} - {"prompts", "index", "out", "device", "from_png", "from_file"}
    if odd := sorted(recorded.keys() - known - set(_TOLD)):
        raise ValueError(f"--from-png {str(args.from_png)!r}: settings that are not known here: {', '.join(odd)}")
    defaults = {k: v for k, v in recorded.items() if k in known}
    if "index" in recorded:
        defaults["count"] = None
    p.set_defaults(**defaults)
    args = p.parse_args(argv)
    if args.model is None:
        raise ValueError(f"--from-png {str(args.from_png)!r}: say with --model where its model {found.model!r} is")
    return args, recorded


def _loaded(args: argparse.Namespace, settings: Settings) -> tuple[TextToImage, Settings, dict[str, Any]]:
    """The model with all that is loaded into it, the settings that it decides, and what pictures will say of both."""
    from ldm import dist
    from ldm.cli.drawn import fingerprint
    from ldm.recipes.models import usable

    device = args.device or dist.device()
    pipeline = kept.load(
        usable(args.model, "--model"), device=device, precision=args.precision, lenient=args.lenient, text=args.text,
        vae=args.vae, text_precision=args.text_precision, blocks_on_device=args.blocks_on_device, **opening.which(args),
    )  # fmt: skip
    settings = _settings(args, pipeline.student, pipeline.habit)
    args.sampler, args.steps, args.guidance = settings.sampler, settings.steps, settings.guidance
    if args.clean_captions or args.offload or args.compile:
        kept.drop(pipeline)
    adapting.adapt(pipeline, args, "sample")
    if args.clean_captions:
        pipeline.clean_captions()
    pipeline = image_prompt.prompted(control.controlled(pipeline, args), args)
    if args.offload:
        pipeline.offload(device)
    if args.compile:
        pipeline.compile(None if args.blocks_on_device is None else "blocks")
    record = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in _NOT_SETTINGS}
    record |= {
        "size": list(pipeline.size(settings.size)), "precision": _PRECISIONS[str(pipeline.dtype)],
        "device": str(pipeline.device), "count": args.count or 1,
        "weights": fingerprint([pipeline.network, *pipeline.others]), **control.digests(args),
        **image_prompt.digests(args),
    }  # fmt: skip
    return pipeline, settings, record


class _Drawing:
    """One call's pictures: each batch is written as it is drawn, and stays if the rest is interrupted."""

    def __init__(
        self, job: _Job, pipeline: TextToImage, settings: Settings, record: dict[str, Any], folder: Path
    ) -> None:
        from ldm.cli.drawn import GRID_PIXELS, Album

        self.job, self.pipeline, self.settings, self.record = job, pipeline, settings, record
        self.album = Album(folder)
        chosen = range(len(job.each)) if job.only is None else sorted(set(job.only))
        self.number = {place: k for k, place in enumerate(chosen)}
        self.rows = {
            place: {"row": row, "rows": len(batch)}
            for batch in pipeline.batches(job.each, settings)
            for row, place in enumerate(batch)
        }
        height, width = record["size"]
        self.most = max(1, GRID_PIXELS // (height * width))
        self.shown: dict[int, Image.Image] = {}
        self.done = 0

    def batches(self, guide: Guide | None) -> None:
        """Draw, write and name each picture."""
        from ldm.data.grid import to_pil
        from ldm.progress import Bar, line

        job = self.job
        with Bar("sampling", "steps", leave=False) as bar:
            for places, images in self.pipeline.drawn(
                job.each, settings=self.settings, indices=job.indices, only=job.only, progress=bar.to, guide=guide
            ):
                for place, picture in zip(places, to_pil(images), strict=True):
                    own = {"prompt": job.each[place], "index": job.indices[place], **self.rows[place]}
                    path = self.album.add(picture, self.number[place], job.each[place], {**self.record, **own})
                    self.done += 1
                    line(str(path))
                    if self.number[place] < self.most:
                        self.shown[self.number[place]] = picture

    def grid(self, columns: int) -> None:
        """The contact sheet of what was drawn, unless single pictures were asked for."""
        from ldm.data.grid import sheet

        if self.job.only is not None or not self.shown:
            return
        pictures = [self.shown[k] for k in sorted(self.shown)]
        name = f"grid-{self.album.first:04d}" if self.album.first else "grid"
        path = self.album.name(sheet(pictures, columns), name, {**self.record, "prompts": self.job.prompts})
        if len(pictures) < self.done:
            _say([f"{path.name} shows {len(pictures)} of {self.done} pictures"])
        print(path)


def _draw(drawing: _Drawing, args: argparse.Namespace) -> int:
    """0, or 130 when it was interrupted."""
    job, album = drawing.job, drawing.album
    code = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        drawing.pipeline.check([job.each[i] for i in drawing.number], drawing.settings)
        _say([album.told] if album.told else [], caught)
        try:
            drawing.batches(_guide(drawing.pipeline, args.clip, args.clip_guidance))
        except KeyboardInterrupt:
            code = 130
        _say([], caught)
    drawing.grid(args.count if (args.count or 1) > 1 else min(len(job.each), 8))
    if code:
        _say([f"interrupted: {drawing.done} of {len(drawing.number)} pictures are in {album.folder}"])
    return code


def _say(lines: list[str], caught: list[warnings.WarningMessage] | None = None) -> None:
    """Lines on standard error, and warnings, which are taken out of their list."""
    found = [str(w.message) for w in caught or () if issubclass(w.category, UserWarning)]
    if caught is not None:
        caught.clear()
    for line in dict.fromkeys([*lines, *found]):
        print(f"ldm sample: {line}", file=sys.stderr)


def _settings(
    args: argparse.Namespace, student: FewSteps | None, habit: tuple[str, int, float] | None = None
) -> Settings:
    """What is asked for; a student, or the model's habit, says what is not."""
    from ldm.checkpoint.students import PLAIN, choose
    from ldm.pipeline import Settings

    sampler, steps, guidance = choose(student, args.sampler, args.steps, args.guidance, habit or PLAIN)
    return Settings(
        sampler=sampler, steps=steps, guidance=guidance, rescale=args.rescale, negative=args.negative,
        guide=args.guide, interval=None if args.interval is None else (args.interval[0], args.interval[1]),
        eta=args.eta, spacing=args.spacing, seed=args.seed, batch=args.batch,
        size=None if args.size is None else (args.size[0], args.size[-1]),
        weights=args.prompt_weights, long=args.long_prompts, original=_pair(args.original_size),
        crop=_pair(args.crop) or (0, 0), target=_pair(args.target_size), tile=args.vae_tile, slices=args.vae_slices,
        queries=args.attention_slice, skip_layers=tuple(args.skip_layers), skip_scale=args.skip_layer_scale,
        skip_interval=(args.skip_layer_interval[0], args.skip_layer_interval[1]),
    )  # fmt: skip


def _pair(values: Sequence[int] | None) -> tuple[int, int] | None:
    return None if values is None else (values[0], values[1])


def _guide(pipeline: TextToImage, clip: str, scale: float) -> Guide | None:
    if scale == 0:
        return None
    from ldm.editing import clip_guide
    from ldm.recipes.sources import load_clip

    model, config = load_clip(clip)
    return clip_guide(pipeline, model.to(pipeline.device), config, scale)


_NOT_SETTINGS = ("prompts", "from_file", "from_png", "index", "out", "list_samplers", "blocks_on_device")
_TOLD = ("version", "prompt", "prompts", "index", "row", "rows", "weights", "device", "conditions", "references")
"""What pictures say beside the options."""
_PRECISIONS = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


def _prompts_in(path: Path | None) -> list[str]:
    """One prompt a line, in UTF-8 or with a mark of its encoding; lines that begin with # are comments."""
    if path is None:
        return []
    if not path.is_file():
        raise ValueError(f"--from-file: {str(path)!r}: no such file")
    from ldm.data.texts import read_lines

    lines = [" ".join(line.split()) for line in read_lines(path)]
    prompts = [line for line in lines if not line.startswith("#")]
    if comments := len(lines) - len(prompts):
        _say([f"{path}: {comments} lines that begin with # are left out as comments"])
    if odd := next((m for line in prompts if (m := _LINE_OPTION.search(line))), None):
        _say([f"{path}: {odd[0].strip()!r} is read as words: lines have no options here"])
    return prompts


_LINE_OPTION = re.compile(r"(?:^|\s)--(?:[whdlsn]|prompt|negative_prompt|steps|seed|cfg_scale|width|height)\s+\S+")
