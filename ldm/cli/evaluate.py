"""`ldm evaluate MEASURE`: figures of models and pictures, with how they were measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import evaluate_inversion, evaluate_prompts, evaluate_samplers

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.pipeline import Settings, TextToImage


def main(argv: list[str]) -> int:
    """Run one of the subcommands; ValueError for users' mistakes."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ldm evaluate", description="Measure models and pictures.")
    verbs = parser.add_subparsers(metavar="MEASURE", required=True)

    retrieval = verbs.add_parser("retrieval", help="how often a CLIP finds a picture's caption among others")
    _data(retrieval, split="train")
    _drawing(retrieval)
    retrieval.add_argument("--clip", default="clip_emoji", help="shipped CLIP or a run's export (clip_emoji)")
    retrieval.add_argument("--candidates", type=int, default=64, help="captions to choose from (64)")
    retrieval.add_argument("--real", action="store_true", help="the captions' real pictures instead: an upper bound")
    retrieval.set_defaults(run=_retrieval)

    reconstruction = verbs.add_parser("reconstruction", help="PSNR and SSIM of an autoencoder")
    _data(reconstruction, split="heldout")
    reconstruction.add_argument("--model", default="emoji", help="shipped model, run, or a folder with vae/ (emoji)")
    reconstruction.add_argument("--size", type=int, default=64, help="side of the pictures (64)")
    reconstruction.add_argument("--batch", type=int, default=32)
    reconstruction.set_defaults(run=_reconstruction)

    features = verbs.add_parser("features", help="Fréchet and kernel distances to a split's pictures")
    _data(features, split="train")
    _drawing(features)
    features.add_argument("--pictures", type=Path, help="measure the pictures of this folder instead of a model's")
    features.add_argument("--network", default="efficientnet_lite0", help="or inception (efficientnet_lite0)")
    features.add_argument("--weights", type=Path, help="file of inception's weights, where there is no network")
    features.add_argument("--cache", type=Path, help="folder that keeps the features of real pictures")
    features.set_defaults(run=_features)

    prompts = verbs.add_parser("prompts", help="CLIP score, retrieval and diversity prompt by prompt, and CMMD")
    _data(prompts, split="compositional")
    _drawing(prompts)
    evaluate_prompts.add(prompts, _draw, _protocol)

    nll = verbs.add_parser("nll", help="bound on the negative log-likelihood of real pictures' latents")
    _data(nll, split="heldout")
    nll.add_argument("--model", default="emoji", help="shipped model, run, diffusers folder or single file (emoji)")
    nll.add_argument("--steps", type=int, default=50, help="times of the bound; all of them make it tightest (50)")
    nll.add_argument(
        "--variance", choices=("small", "large", "learned"), default="large", help="of the reverse steps (large)"
    )
    nll.add_argument("--batch", type=int, default=32)
    nll.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="fp32", help="of the U-Net (fp32)"
    )
    nll.add_argument("--device", help="cpu, cuda, ...; default: a GPU if there is one")
    nll.set_defaults(run=_nll)
    evaluate_samplers.add(verbs)
    evaluate_inversion.add(verbs)
    return parser


def _data(parser: argparse.ArgumentParser, split: str) -> None:
    parser.add_argument("--data", default="emoji", help="a shipped data set's name, a folder or a manifest (emoji)")
    parser.add_argument("--split", default=split, help=f"as in train, heldout, compositional ({split})")
    parser.add_argument("--count", type=int, help="pictures, of distinct captions (256, or all of a smaller split)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice, the noise and the candidates (0)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures and the protocol here")


def _drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="emoji", help="shipped model, run, diffusers folder or single file (emoji)")
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=32, help="pictures drawn at once (32)")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="fp32", help="of the U-Net (fp32)"
    )
    parser.add_argument("--device", help="that draws: cpu, cuda, ...; default: a GPU if there is one")


def _retrieval(args: argparse.Namespace) -> int:
    from ldm.recipes import measure
    from ldm.recipes.sources import load_clip, weights_hash

    drawn = measure.draw(args.data, args.split, args.count, seed=args.seed)
    if not 2 <= args.candidates <= len(drawn.pool):
        raise ValueError(
            f"candidates: {args.candidates} is not between 2 and {len(drawn.pool)}, "
            f"the distinct captions of split {args.split!r}"
        )
    clip, config = load_clip(measure.exported(args.clip))
    protocol = _protocol(args, "retrieval", len(drawn.captions))
    if args.real:
        images = measure.real_pictures(args.data, args.split, drawn.ids, config.image_size)
        what = "real pictures"
    else:
        images, how = _draw(args, drawn.captions)
        protocol |= how
        what = f"pictures of {args.model} ({args.sampler}, {args.steps} steps, guidance {args.guidance:g})"
    found = measure.retrieval_of(
        images, drawn.captions, drawn.pool, clip, config, candidates=args.candidates, seed=args.seed
    )
    protocol |= {"pictures": "real" if args.real else "drawn", "clip": args.clip, "clip_weights": weights_hash(clip)}
    print(f"{found.images} {what}, data {args.data}, split {args.split}: own caption among {found.candidates}")
    print(f"{'':6}{'rate':>8}{'95 % interval':>18}{'chance':>9}{'x chance':>10}")
    for r in found.recalls:
        interval = f"{r.low:.3f} .. {r.high:.3f}"
        print(f"{f'R@{r.k}':6}{r.rate:8.3f}{interval:>18}{r.chance:9.3f}{r.times_chance:10.1f}")
    _write(args.out, protocol, found.record())
    return 0


def _reconstruction(args: argparse.Namespace) -> int:
    from ldm.recipes import measure
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
    from ldm.evaluate import fid
    from ldm.evaluate.features import extract, in_batches, load_network
    from ldm.recipes import measure
    from ldm.recipes.statistics import real_features

    network = load_network(args.network, args.weights)
    drawn = measure.draw(args.data, args.split, args.count, seed=args.seed)
    protocol = _protocol(args, "features", len(drawn.captions))
    if args.pictures is not None:
        images = measure.folder_pictures(args.pictures)
        protocol |= {"pictures": "folder"}
    else:
        images, how = _draw(args, drawn.captions)
        protocol |= how | {"pictures": "drawn"}
    size = images.shape[-1]
    real = real_features(network, args.data, args.split, drawn.ids, size, args.cache)
    found = fid.compare(real, extract(network, in_batches(images)), network=network.name, seed=args.seed)
    protocol |= {"size": size, "network": network.name}
    print(f"{len(images)} pictures against the captions' {len(real)} real ones, data {args.data}, split {args.split}")
    for name, value in found.items():
        shown = f"{value['mean']:.6g} (std {value['std']:.2g})" if isinstance(value, dict) else value
        print(f"{name}: {shown:.6g}" if isinstance(shown, float) else f"{name}: {shown}")
    if min(len(images), len(real)) < 2048:
        print("few pictures: compare at equal counts only, and rather by the kernel distance")
    _write(args.out, protocol, found)
    return 0


def _nll(args: argparse.Namespace) -> int:
    from ldm import dist
    from ldm.pipeline import TextToImage
    from ldm.recipes import measure

    drawn = measure.draw(args.data, args.split, args.count, seed=args.seed)
    pipeline = TextToImage.load(args.model, device=args.device or dist.device(), precision=args.precision)
    size = pipeline.latent_shape(None)[1] * pipeline.codec.factor
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


def _draw(args: argparse.Namespace, captions: tuple[str, ...]) -> tuple[Tensor, dict[str, Any]]:
    """The model's pictures of the captions, and the part of the protocol that says how they came about."""
    from ldm import dist
    from ldm.pipeline import Settings, TextToImage
    from ldm.recipes.measure import model_hashes

    settings = Settings(
        sampler=args.sampler, steps=args.steps, guidance=args.guidance, seed=args.seed, batch=args.batch
    )
    pipeline = TextToImage.load(args.model, device=args.device or dist.device(), precision=args.precision)
    how = {
        "model": args.model,
        "weights": model_hashes(pipeline),
        "sampler": args.sampler,
        "steps": args.steps,
        "guidance": args.guidance,
        "precision": args.precision,
    }
    return _sampled(pipeline, captions, settings), how


def _sampled(pipeline: TextToImage, captions: tuple[str, ...], settings: Settings) -> Tensor:
    from tqdm import tqdm

    with tqdm(unit=" step", desc="drawing", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return pipeline.sample(list(captions), settings=settings, progress=progress)


def _protocol(args: argparse.Namespace, what: str, count: int) -> dict[str, Any]:
    from ldm import __version__

    where = {"data": args.data, "split": args.split, "count": count, "seed": args.seed}
    return {"measure": what, "version": __version__, **where}


def _write(path: Path | None, protocol: dict[str, Any], result: dict[str, Any]) -> None:
    if path is None:
        return
    from ldm.checkpoint.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"protocol": protocol, "result": result}, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {path}")
