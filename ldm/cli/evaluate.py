"""`ldm evaluate MEASURE`: figures of models and pictures, with how they were measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import evaluate_conditions, evaluate_inversion, evaluate_prompts, evaluate_samplers
from ldm.cli.counts import check
from ldm.cli.measured import loaded, model_options
from ldm.cli.options import Parser

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm.evaluate.divided import Parts, Rows


def main(argv: list[str]) -> int:
    """Run one of the subcommands; ValueError for users' mistakes.

    Several processes divide the pictures of what draws them; of another measure, rank 0 does all.
    """
    args = _parser().parse_args(argv)
    check(args, count=1, steps=1, batch=1, candidates=2, size=1, each=1, refine=0, reference=2)
    run: Callable[[argparse.Namespace], int] = args.run

    from ldm import dist

    if run in (_reconstruction, _nll, evaluate_inversion.main, evaluate_conditions.main):
        if dist.world_size() > 1:
            dist.say("ldm evaluate: this measure is not divided; rank 0 does all")
        return run(args) if dist.rank() == 0 else 0
    with dist.group():
        return run(args)


def _parser() -> Parser:
    parser = Parser(
        prog="ldm evaluate",
        description="Measure models and pictures. Several processes: python -m launch local --procs 2 -- ldm evaluate",
    )
    verbs = parser.add_subparsers(metavar="MEASURE", required=True)

    retrieval = verbs.add_parser("retrieval", help="how often a CLIP model finds a picture's caption among others")
    _data(retrieval, split="train")
    _drawing(retrieval)
    retrieval.add_argument(
        "--clip", default="clip_emoji", help="shipped CLIP, a run, or open_clip:ARCH:WEIGHTS (clip_emoji)"
    )
    retrieval.add_argument("--candidates", type=int, default=64, help="captions to choose from (64)")
    retrieval.add_argument("--real", action="store_true", help="the captions' real pictures instead: an upper bound")
    retrieval.set_defaults(run=_retrieval)

    reconstruction = verbs.add_parser("reconstruction", help="PSNR and SSIM of an autoencoder")
    _data(reconstruction, split="heldout")
    reconstruction.add_argument("--model", default="emoji", help="shipped model, run, or a folder with vae/ (emoji)")
    reconstruction.add_argument("--size", type=int, default=64, help="side of the pictures (64)")
    reconstruction.add_argument("--batch", type=int, default=32, help="pictures at a time")
    reconstruction.set_defaults(run=_reconstruction)

    features = verbs.add_parser(
        "features", help="distances of drawn to real pictures: Fréchet (FID), kernel (KID), precision and recall"
    )
    _data(features, split="train")
    _drawing(features)
    features.add_argument("--pictures", type=Path, help="measure the pictures of this folder instead of a model's")
    features.add_argument(
        "--network",
        default="efficientnet_lite0",
        help="inception, clip:CLIP as in --clip of retrieval (efficientnet_lite0)",
    )
    features.add_argument("--weights", type=Path, help="file of inception's weights, where there is no network")
    features.add_argument("--cache", type=Path, help="folder that keeps the features of real pictures")
    features.set_defaults(run=_features)

    prompts = verbs.add_parser("prompts", help="CLIP score, retrieval and diversity for each prompt, and CMMD")
    _data(prompts, split="compositional")
    _drawing(prompts)
    evaluate_prompts.add(prompts, _drawn, _protocol)

    nll = verbs.add_parser("nll", help="bound on the negative log-likelihood of real pictures' latents")
    _data(nll, split="heldout")
    nll.add_argument("--model", default="emoji", help="shipped model, run, diffusers folder or single file (emoji)")
    nll.add_argument("--steps", type=int, default=50, help="time steps of the bound; all of them make it tightest (50)")
    nll.add_argument(
        "--variance", choices=("small", "large", "learned"), default="large", help="of the reverse steps (large)"
    )
    nll.add_argument("--batch", type=int, default=32, help="pictures at a time")
    model_options(nll)
    nll.set_defaults(run=_nll)
    evaluate_samplers.add(verbs)
    evaluate_inversion.add(verbs)
    evaluate_conditions.add(verbs)
    return parser


def _data(parser: Parser, split: str) -> None:
    parser.add_argument("--data", default="emoji", help="a shipped data set's name, a folder or a manifest (emoji)")
    parser.add_argument("--split", default=split, help=f"as in train, heldout, compositional ({split})")
    parser.add_argument("--count", type=int, help="pictures, of distinct captions (256, or all of a smaller split)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice, the noise and the candidates (0)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures and all settings here")


def _drawing(parser: Parser) -> None:
    parser.add_argument("--model", default="emoji", help="shipped model, run, diffusers folder or single file (emoji)")
    parser.add_argument("--sampler", help="(dpmpp_2m; a few-step model has its own)")
    parser.add_argument("--steps", type=int, help="(25; of a few-step model 4)")
    parser.add_argument("--guidance", type=float, help="(3; 1 if guidance is distilled into the model)")
    parser.add_argument("--batch", type=int, default=32, help="pictures drawn at once (32)")
    model_options(parser)
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="leave the pictures and finished parts here, each named by split, "
        "index and settings; a stopped evaluation then goes on (several nodes need it to be shared)"
    )  # fmt: skip


def _retrieval(args: argparse.Namespace) -> int:
    from ldm import dist
    from ldm.evaluate import divided, measure
    from ldm.metrics import worth
    from ldm.recipes.sources import load_clip

    drawn = measure.draw(args.data, args.split, args.count, seed=args.seed)
    candidates = measure.candidates(args.candidates, drawn.pool)
    clip, config = load_clip(measure.exported(args.clip))
    protocol = _protocol(args, "retrieval", len(drawn.captions))
    judge = measure.judge_protocol(args.clip, clip, config)

    def describe(images: Tensor, part: range) -> Rows:
        return {"clip": measure.clip_features(images, clip, config)}

    if args.real:

        def real(part: range) -> Rows:
            ids = [drawn.ids[i] for i in part]
            return describe(measure.real_pictures(args.data, args.split, ids, config.image_size), part)

        rows = divided.described(len(drawn.ids), args.batch, real)
        what = "real pictures"
    else:
        rows, how, _ = _drawn(args, drawn.captions, describe, judge, clip=clip)
        protocol |= how
        what = f"pictures of {args.model} ({args.sampler}, {args.steps} steps, guidance {args.guidance:g})"
    if dist.rank():
        return 0
    found = measure.retrieval_of_features(
        rows["clip"], drawn.captions, drawn.pool, clip, config, candidates=candidates, seed=args.seed
    )
    said = worth.candidates(args.candidates, candidates) + worth.rates(found.images)
    said += worth.judged(protocol.get("judge_knows_text", False))
    protocol |= judge | {"pictures": "real" if args.real else "drawn"}
    print(f"{found.images} {what}, data {args.data}, split {args.split}: own caption among {found.candidates}")
    print(f"{'':6}{'rate':>8}{'95 % interval':>18}{'chance':>9}{'x chance':>10}")
    for r in found.recalls:
        interval = f"{r.low:.3f} .. {r.high:.3f}"
        print(f"{f'R@{r.k}':6}{r.rate:8.3f}{interval:>18}{r.chance:9.3f}{r.times_chance:10.1f}")
    _warn(said)
    _write(args.out, protocol, found.record() | {"warnings": said})
    return 0


def _reconstruction(args: argparse.Namespace) -> int:
    from ldm.evaluate import measure
    from ldm.recipes.sources import load_autoencoder, weights_hash

    drawn = measure.draw(args.data, args.split, args.count, seed=args.seed)
    autoencoder = load_autoencoder(measure.exported(args.model))
    if args.size < 11 or args.size % autoencoder.factor:
        raise ValueError(f"size: {args.size} is not a multiple of {autoencoder.factor} of at least 11 pixels")
    images = measure.real_pictures(args.data, args.split, drawn.ids, args.size)
    found = measure.reconstruction_of(autoencoder, images, args.batch)
    print(f"{found['pictures']} pictures of {args.size} pixels, data {args.data}, split {args.split}: {args.model}")
    print(f"PSNR {found['psnr']['mean']:.2f} dB (std {found['psnr']['std']:.2f})")
    print(f"SSIM {found['ssim']['mean']:.4f} (std {found['ssim']['std']:.4f})")
    protocol = _protocol(args, "reconstruction", len(images))
    _write(args.out, protocol | {"model": args.model, "weights": {"vae": weights_hash(autoencoder)}}, found)
    return 0


def _features(args: argparse.Namespace) -> int:
    from ldm import dist
    from ldm.evaluate import divided, measure
    from ldm.evaluate.statistics import real_features
    from ldm.metrics import fid
    from ldm.metrics.features import extract, in_batches

    check(args, count=2)
    network = measure.feature_network(args.network, args.weights)
    images = None if args.pictures is None else measure.folder_pictures(args.pictures)
    if images is not None and len(images) < 2:
        raise ValueError(f"--pictures: 1 picture in {str(args.pictures)!r}, and a distance needs at least 2")
    drawn = measure.draw(args.data, args.split, args.count, seed=args.seed)
    if len(drawn.captions) < 2:
        raise ValueError(f"split {args.split!r}: 1 distinct caption, and a distance needs the pictures of at least 2")
    protocol = _protocol(args, "features", len(drawn.captions))

    def describe(images: Tensor, part: range) -> Rows:
        return {"features": extract(network, in_batches(images))}

    if images is not None:
        rows = divided.described(len(images), 64, lambda part: describe(images[part.start : part.stop], part))
        protocol |= {"pictures": "folder", "size": images.shape[-1]}
    else:
        rows, how, _ = _drawn(args, drawn.captions, describe, {"network": network.name})
        protocol |= how | {"pictures": "drawn"}
    real = real_features(network, args.data, args.split, drawn.ids, protocol["size"], args.cache)
    if dist.rank():
        return 0
    found = fid.compare(real, rows["features"], network=network.name, seed=args.seed)
    count = len(rows["features"])
    protocol |= {"network": network.name}
    print(f"{count} pictures against the captions' {len(real)} real ones, data {args.data}, split {args.split}")
    for name, value in found.items():
        if name == "warnings":
            continue
        shown = f"{value['mean']:.6g} (std {value['std']:.2g})" if isinstance(value, dict) else value
        print(f"{name}: {shown:.6g}" if isinstance(shown, float) else f"{name}: {shown}")
    _warn(found["warnings"])
    _write(args.out, protocol, found)
    return 0


def _nll(args: argparse.Namespace) -> int:
    from ldm.evaluate import measure

    drawn = measure.draw(args.data, args.split, args.count, seed=args.seed)
    pipeline = loaded(args.model, args)
    size = measure.side_of(pipeline)
    images = measure.real_pictures(args.data, args.split, drawn.ids, size)
    how = {"steps": args.steps, "variance": args.variance}
    found = measure.nll_of(pipeline, images, drawn.captions, batch=args.batch, seed=args.seed, **how)
    print(f"{found['pictures']} pictures of {size} pixels, data {args.data}, split {args.split}: {args.model}")
    print(f"bound {found['bits_per_dim']['mean']:.4f} bits a latent dimension (std {found['bits_per_dim']['std']:.4f})")
    print(
        f"of it prior {found['prior']:.4f}, {args.steps - 1} steps {found['steps']:.4f}, decoder {found['decoder']:.4f}"
    )
    weights = {"model": args.model, "weights": measure.model_hashes(pipeline), "precision": args.precision}
    _write(args.out, _protocol(args, "nll", len(images)) | weights | how, found)
    return 0


def _drawn(
    args: argparse.Namespace,
    captions: tuple[str, ...],
    describe: Callable[[Tensor, range], Rows],
    judge: Mapping[str, Any],
    *,
    each: int = 1,
    pictures: Path | None = None,
    clip: nn.Module | None = None,
) -> tuple[Rows, dict[str, Any], Parts | None]:
    """What `describe` says of the model's pictures of the captions, how they came about, and where their files are.

    The ranks divide them, `each` neighbours never apart. `judge` is what the rows depend on beside the pictures;
    `pictures` a folder that gets them as files, --keep if None. `clip` is the judge, of which is told whether its text
    tower is the model's.
    """
    from ldm.checkpoint.students import choose
    from ldm.data.grid import to_pil
    from ldm.evaluate import divided, measure
    from ldm.pipeline import Settings

    pipeline = loaded(args.model, args)
    args.sampler, args.steps, args.guidance = choose(
        pipeline.student, args.sampler, args.steps, args.guidance, pipeline.habit
    )
    settings = Settings(
        sampler=args.sampler, steps=args.steps, guidance=args.guidance, seed=args.seed, batch=args.batch
    )
    how = {
        "model": args.model, "weights": measure.model_hashes(pipeline), "sampler": args.sampler, "steps": args.steps,
        "guidance": args.guidance, "precision": args.precision, "size": measure.side_of(pipeline),
    }  # fmt: skip
    how |= {} if args.text_precision is None else {"text_precision": args.text_precision}
    told = {**how, **judge, "data": args.data, "seed": args.seed, "captions": captions}
    if clip is not None:
        how["judge_knows_text"] = measure.knows_text(pipeline, clip)
    folder = args.keep or pictures
    parts = None if folder is None else divided.Parts(folder, args.split, told)
    size = max(each, args.batch // each * each)
    with _bar(len(divided.split(len(captions), size)) * args.steps) as bar:

        def part(indices: range) -> Rows:
            texts = [captions[i] for i in indices]
            images = pipeline.sample(texts, settings=settings, indices=indices, progress=lambda *_: bar.update())
            if parts is not None:
                parts.folder.mkdir(parents=True, exist_ok=True)
                for i, picture in zip(indices, to_pil(images), strict=True):
                    picture.save(parts.picture(i))
            return describe(images, indices)

        return divided.described(len(captions), size, part, parts), how, parts


def _bar(total: int) -> Any:
    """Steps of all batches, on rank 0; the ranks advance alike."""
    from ldm import dist
    from ldm.progress import Bar

    return Bar("drawing", "steps", -(-total // dist.world_size()))


def _protocol(args: argparse.Namespace, what: str, count: int) -> dict[str, Any]:
    from ldm import __version__

    where = {"data": args.data, "split": args.split, "count": count, "seed": args.seed}
    return {"measure": what, "version": __version__, **where}


def _warn(said: Sequence[str]) -> None:
    for line in said:
        print(f"warning: {line}")


def _write(path: Path | None, protocol: dict[str, Any], result: dict[str, Any]) -> None:
    if path is None:
        return
    from ldm.checkpoint.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"protocol": protocol, "result": result}, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {path}")
