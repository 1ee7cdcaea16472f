"""`ldm data build|edits|index|inspect|encode|captions|check`: make data sets, look at them, cache their latents."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import data_folder
from ldm.cli.options import TEXT_PRECISION_HELP, TEXT_PRECISIONS, Parser

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.data.buckets import BucketConfig
    from ldm.data.manifest import Manifest
    from ldm.data.pairs import Pairs
    from ldm.models.vae.latents import LatentCodec
    from ldm.recipes.aligning import AlignTarget


_PAIRS_HELP = "as data.pairs: '{condition: {kind: canny}}', or a config file that tells it"


def main(argv: list[str]) -> int:
    """Run one of the subcommands; ValueError for users' mistakes."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def _parser() -> Parser:
    parser = Parser(
        prog="ldm data", description="Make data sets (WebDataset shards), look at them, and cache latents and text."
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_build(verbs)

    _add_index(
        verbs.add_parser("index", help="use existing WebDataset tars: write a manifest and offset indexes for them")
    )

    inspect = verbs.add_parser("inspect", help="contact sheet, statistics and look-alikes of a data set")
    inspect.add_argument("data", help="a shipped data set's name, a folder or a manifest")
    inspect.add_argument("--out", type=Path, help="folder for contact.png, statistics.json, index.html (DATA-inspect)")
    inspect.add_argument("--split", default="all", help="which part, such as train")
    inspect.add_argument("--limit", type=int, default=20_000, help="look at so many samples at most, evenly spaced")
    inspect.add_argument("--pictures", type=int, default=96, help="on the contact sheet")
    inspect.add_argument("--pairs", metavar="PAIRS", help="show these beside each picture: " + _PAIRS_HELP)
    inspect.set_defaults(run=_inspect)

    _add_encode(verbs)
    edits = verbs.add_parser(
        "edits", help="instruction edits of a set's own pictures, as of the emoji: other skin tones and genders"
    )
    edits.add_argument(
        "data", help="a shipped data set's name, a folder or a manifest; its samples tell tone and gender"
    )
    edits.add_argument("out", type=Path, help="folder to make")
    edits.set_defaults(run=_edits)
    data_folder.add(verbs)
    return parser


def _add_encode(verbs: Any) -> None:
    encode = verbs.add_parser(
        "encode",
        help="cache latents and text states; any number of processes share the work, the same command resumes",
    )
    encode.add_argument("data", help="a shipped data set's name, a folder, an address or a manifest")
    encode.add_argument("out", type=Path, help="folder of the cache")
    encode.add_argument("--vae", help="autoencoder: a model folder, a run's export, or a shipped one's name")
    encode.add_argument("--text", help="text encoders: the same")
    encode.add_argument(
        "--align", metavar="TARGET", help="also the features that task.options.align draws training to: "
        "efficientnet_lite0, or a CLIP's folder or name"
    )  # fmt: skip
    encode.add_argument("--align-size", type=int, metavar="SIDE", help="side at which the target sees pictures")
    encode.add_argument("--splits", nargs="+", default=["train"], help="which parts to encode")
    shape = encode.add_mutually_exclusive_group(required=True)
    shape.add_argument("--size", type=int, help="side of the square pictures")
    shape.add_argument("--buckets", action="store_true", help="instead: each picture in the shape of its bucket")
    encode.add_argument("--crop", choices=("center", "random"), default="center", help="where to cut")
    encode.add_argument("--flip", action="store_true", help="mirror variants beyond the first at random")
    encode.add_argument("--variants", type=int, default=1, help="how many crops and flips of each picture to store")
    encode.add_argument("--template", default="{}", help="wraps each caption: 'a photo of {}', '{}[, {group}]'")
    encode.add_argument("--pairs", metavar="PAIRS", help=_PAIRS_HELP)
    encode.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="type to store")
    encode.add_argument("--batch", type=int, default=64, help="pictures at a time")
    encode.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="fp32", help="what the autoencoder computes in"
    )
    encode.add_argument("--text-precision", choices=TEXT_PRECISIONS, default="fp32", help=TEXT_PRECISION_HELP)
    encode.add_argument(
        "--t5-padding", choices=("unmodified", "zero"), default="unmodified", help="of SD3 and FLUX.1, whose networks "
        "see it: as their pipelines have it, or hidden from T5 and zeros, which are not stored (task.t5_padding)"
    )  # fmt: skip
    encode.set_defaults(run=_encode)


def _add_build(verbs: Any) -> None:
    build = verbs.add_parser("build", help="make a data set of a folder of pictures with captions")
    build.add_argument(
        "source", type=Path, help="folder of pictures, or its metadata.jsonl (.json, .csv, .tsv, .parquet)"
    )
    build.add_argument("out", type=Path, help="folder to make")
    build.add_argument("--size", type=int, help="shrink the short side to this many pixels")
    build.add_argument(
        "--format", choices=("keep", "jpg", "png", "webp"), default="keep", help="of the stored pictures"
    )
    build.add_argument("--quality", type=int, default=95, help="of jpg and webp")
    build.add_argument(
        "--heldout", type=float, default=0.0, help="share of the pictures to keep out of training, as the split heldout"
    )
    build.add_argument(
        "--captions-from",
        choices=("files", "folder", "name"),
        default="files",
        help="text files, the folder's name or the picture's",
    )
    build.add_argument(
        "--pair", action="append", default=[], metavar="NAME[=WHERE]", help="further pictures that each picture has: "
        "condition, original (before an edit), mask, ...; WHERE is a suffix (.condition, _mask), a folder "
        "(conditioning_images/) or a table's column (conditioning_image), the usual ones if left out; may be repeated"
    )  # fmt: skip
    build.add_argument(
        "--masks", choices=("white", "transparent"), default="white", help="what of a mask is to be painted"
    )
    build.add_argument("--image-column", help="a table's column of the picture (file_name; of edits edited_image)")
    build.add_argument("--caption-column", help="a table's column of the caption or instruction")
    build.add_argument("--without-captions", action="store_true", help="keep pictures that have no caption")
    build.add_argument("--min-side", type=int, default=1, help="leave out pictures with a side shorter than this")
    build.add_argument("--max-pixels", type=int, default=100_000_000, help="leave out pictures with more pixels")
    _add_buckets(build)
    build.add_argument("--shard-bytes", type=int, default=256 << 20, help="size of a tar at most")
    build.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    build.set_defaults(run=_build)


def _add_index(index: Parser) -> None:
    index.add_argument(
        "folder", help="a folder of tars, or an address (https://, s3://, gs://, hf://), as with {00000..00099}.tar"
    )
    index.add_argument(
        "--out",
        type=Path,
        help="folder for manifest and indexes (the folder of the tars); the tars stay where they are",
    )
    index.add_argument("--split", default="train", help="what this part is called")
    index.add_argument("--where", help="keep samples by their json, as in 'width >= 256 and pwatermark < 0.5'")
    index.add_argument("--name", help="the data set's name (the folder's)")
    _add_buckets(index)
    index.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    index.set_defaults(run=_index)


def _add_buckets(parser: Parser) -> None:
    parser.add_argument("--buckets", type=int, metavar="SIZE", help="aspect-ratio buckets, at most SIZE x SIZE pixels")
    parser.add_argument("--bucket-step", type=int, default=64, help="sides are multiples of this")
    parser.add_argument("--bucket-ratio", type=float, default=2.0, help="longest aspect ratio")
    parser.add_argument(
        "--bucket-least", type=int, default=64, help="buckets of fewer pictures are merged into the nearest"
    )


def _buckets(args: argparse.Namespace) -> BucketConfig | None:
    from ldm.data.buckets import BucketConfig

    if args.buckets is None:
        return None
    return BucketConfig(size=args.buckets, step=args.bucket_step, ratio=args.bucket_ratio, least=args.bucket_least)


def _build(args: argparse.Namespace) -> int:
    from ldm.data.build import BuildConfig, build, quiet
    from ldm.progress import Bar

    quiet()
    config = BuildConfig(
        size=args.size,
        format=args.format,
        quality=args.quality,
        heldout=args.heldout,
        captions_from=args.captions_from,
        require_captions=not args.without_captions,
        pairs=_pairs(args.pair),
        masks=args.masks,
        image_column=args.image_column,
        caption_column=args.caption_column,
        min_side=args.min_side,
        max_pixels=args.max_pixels,
        buckets=_buckets(args),
        shard_bytes=args.shard_bytes,
        workers=args.workers,
    )
    with Bar("reading", "pictures") as bar:
        report = build(args.source, args.out, config, bar.to)
    for entry in report.bad[:20]:
        print(f"left out: {entry['name']}: {entry['reason']}: {entry['error']}")
    if len(report.bad) > 20:
        print(f"... and {len(report.bad) - 20} more in {args.out / 'quarantine.jsonl'}")
    for remark in report.remarks[:20]:
        print(f"note: {remark}")
    if len(report.remarks) > 20:
        print(f"... and {len(report.remarks) - 20} more notes of this kind")
    _print_buckets(report.manifest)
    splits = ", ".join(f"{report.manifest.samples(s)} {s}" for s in report.manifest.splits)
    print(f"{report.written} of {report.found} pictures in {len(report.manifest.shards)} shards ({splits}): {args.out}")
    if report.bad:
        print("left out: " + ", ".join(f"{count} {reason}" for reason, count in report.reasons.most_common()))
    return 0


def _pairs(told: list[str]) -> dict[str, str | None]:
    """NAME or NAME=WHERE of each --pair."""
    found: dict[str, str | None] = {}
    for one in told:
        name, equals, where = one.partition("=")
        if name in found:
            raise ValueError(f"--pair {one}: {name!r} is given twice")
        found[name] = where if equals else None
    return found


def _told_pairs(told: str | None) -> Pairs:
    """What --pairs says, or the config that it names."""
    from ldm.config.load import decode, read
    from ldm.config.written import parse_value
    from ldm.data.pairs import Pair, check_pairs

    if told is None:
        return {}
    tree: Any = parse_value(told)[0]
    if told.endswith((".yaml", ".yml")):
        data = read(told).get("data")
        tree = data.get("pairs") if isinstance(data, dict) else None
        if tree is None:
            raise ValueError(f"--pairs {told}: has no data.pairs")
    if not isinstance(tree, dict):
        raise ValueError(f"--pairs {told}: expected names with what they are, as in '{{condition: {{kind: canny}}}}'")
    pairs: Pairs = decode(dict[str, Pair], tree, "--pairs")  # type: ignore[arg-type]
    check_pairs(pairs)
    return pairs


def _edits(args: argparse.Namespace) -> int:
    from ldm.data.edits import write_edits
    from ldm.data.manifest import Manifest, resolve

    manifest = write_edits(Manifest.read(resolve(args.data)), args.out)
    splits = ", ".join(f"{manifest.samples(s)} {s}" for s in manifest.splits)
    print(f"{manifest.samples()} edits ({splits}): {args.out}")
    print("train on them with data.pairs={original: {kind: stored, cache: latents}}")
    return 0


def _index(args: argparse.Namespace) -> int:
    from ldm.data.indexing import index, quarantine, repeated
    from ldm.data.manifest import printable
    from ldm.progress import Bar

    with Bar("indexing", "tars") as bar:
        manifest, results = index(
            args.folder,
            out=args.out,
            split=args.split,
            where=args.where,
            name=args.name,
            buckets=_buckets(args),
            workers=args.workers,
            progress=bar.to,
        )
    problems = [p for r in results for p in r.problems]
    for problem in problems[:20]:
        print(printable(f"problem: {problem}"))
    if problems:
        print(f"{len(problems)} problems in {quarantine(manifest.folder, results)}")
    if note := repeated(results):
        print(printable(f"note: {note}"))
    _print_buckets(manifest)
    left_out = sum(r.left_out for r in results)
    print(f"{manifest.samples()} samples in {len(manifest.shards)} shards, {left_out} left out by the filter")
    if unusable := sum(r.shard is None for r in results):
        print(f"{unusable} of {len(results)} tars cannot be used")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from ldm.data.inspection import inspect
    from ldm.data.manifest import Manifest, resolve
    from ldm.progress import Bar

    manifest = Manifest.read(resolve(args.data))
    if manifest.cached is not None:
        raise ValueError(f"data {args.data!r} holds cached latents; inspect the data set it was made from")
    out = args.out or Path(f"{manifest.name}-inspect")
    with Bar("looking", "samples") as bar:
        summary = inspect(
            manifest,
            out,
            split=args.split,
            limit=args.limit,
            pictures=args.pictures,
            pairs=_told_pairs(args.pairs),
            progress=bar.to,
        )
    for key in ("samples", "looked_at", "bad", "formats", "partners", "width", "height", "aspect", "caption_words"):
        print(f"{key.replace('_', ' ')}: {summary[key]}")
    for bucket, count in summary["buckets"].items():
        print(f"bucket {bucket}: {count} pictures")
    print(f"look-alike groups: {summary['look_alike_groups']}")
    print(f"page: {out / 'index.html'}   contact sheet: {out / 'contact.png'}")
    return 0


def _encode(args: argparse.Namespace) -> int:
    from ldm import dist
    from ldm.allocator import keep_freed_memory
    from ldm.data.encode import EncodeConfig, encode, finish, missing
    from ldm.models.text import pad_with
    from ldm.models.vae.latents import LatentCodec
    from ldm.progress import Bar
    from ldm.recipes.sources import cache_hashes, load_autoencoder, load_towers, text_encoder

    if args.vae is None and args.text is None:
        raise ValueError("nothing to encode: give --vae, --text or both")
    if args.vae is None and args.pairs is not None:
        raise ValueError("--pairs: they are cached beside latents; give --vae")
    pairs = _told_pairs(args.pairs)
    told = {k: vars(args)[k] for k in ("buckets", "crop", "flip", "variants", "template", "dtype", "batch")}
    config = EncodeConfig(
        path=args.data, splits=tuple(args.splits), size=args.size or EncodeConfig.size, pairs=pairs, **told
    )
    dist.check(meeting=False)
    device = dist.device()
    keep_freed_memory(device.type)
    hashes, moments, text, features = {}, None, None, None
    if args.vae is not None:
        autoencoder = load_autoencoder(args.vae).to(device)
        codec = LatentCodec.of(autoencoder)
        hashes |= cache_hashes(autoencoder)
        moments, kind = _moments(codec, args.precision, device)
        hashes |= {} if kind == "fp32" else {"precision": kind}  # parts of one cache are computed alike
    if args.align is not None:
        target = _target(args, device)
        features, hashes = target.encode, hashes | target.hashes
    if args.text is not None:
        towers = [tower.to(device) for tower in load_towers(args.text, args.text_precision)]
        pad_with(towers, args.t5_padding, "--t5-padding")
        encode_text = text_encoder(towers)
        hashes |= cache_hashes(towers=towers)
        text = lambda texts: dict(encode_text(texts))  # noqa: E731
    with Bar("encoding", "pictures") as bar:
        encode(
            config,
            args.out,
            moments=moments,
            text=text,
            hashes=hashes,
            features=features,
            rank=dist.rank(),
            world=dist.world_size(),
            progress=bar.update,
        )
    if left := missing(config, args.out):
        print(f"done here; {left} parts are left to other processes, the last of which writes the manifest")
        return 0
    manifest = finish(config, args.out)
    _print_buckets(manifest)
    errors = ", ".join(f"{k} {v:.1e}" for k, v in manifest.notes["relative_rms_error"].items())
    print(f"{manifest.samples()} samples, {manifest.notes['bytes_per_sample']} bytes each, {manifest.notes['bad']} bad")
    if each := manifest.notes.get("text_bytes_per_caption"):
        print(f"text: {manifest.notes['captions']} captions, {each} bytes each")
    print(f"relative error of storing as {config.dtype}: {errors}")
    return 0


def _target(args: argparse.Namespace, device: torch.device) -> AlignTarget:
    from ldm.recipes.aligning import named_target

    if args.vae is None:
        raise ValueError("--align: features are cached beside latents; give --vae")
    return named_target(args.align, args.align_size, device, "--align")


def _moments(codec: LatentCodec, precision: str, device: torch.device) -> tuple[Callable[[Tensor], Tensor], str]:
    """The codec's moments under autocast, as float32, and what `precision` means here."""
    import torch

    from ldm.precision import DTYPES, chosen

    kind = chosen(precision, device)

    def moments(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=DTYPES[kind], enabled=kind != "fp32"):
            return codec.moments(images).float()

    return moments, kind


def _print_buckets(manifest: Manifest) -> None:
    for bucket, entry in manifest.notes.get("buckets", {}).items():
        merged = ", ".join(f"{n} from {shape}" for shape, n in entry["merged"].items())
        print(f"bucket {bucket}: {entry['pictures']} pictures" + (f" ({merged})" if merged else ""))
