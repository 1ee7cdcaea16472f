"""`ldm finetune METHOD --images FOLDER` (dreambooth, lora, controlnet, ...): from pictures to a tuned model.

`ldm finetune --from FILE` is `ldm.cli.finetune_from`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.cli import finetune_from, finetune_options, finetune_training, starts
from ldm.cli.options import TEXT_PRECISION_HELP, TEXT_PRECISIONS, Parser, is_override

_EPILOG = (
    "The resolved config is written into the run folder. The same command again resumes; several processes: "
    "python -m launch local --procs 2 -- ldm finetune ..."
)


def parser() -> Parser:
    """Options of the verb; their names are those of diffusers' scripts where they have one."""
    p = Parser(prog="ldm finetune", description="Fine-tune a model on a folder of pictures.")
    finetune_from.add(p)
    methods = p.add_subparsers(dest="method")

    d = methods.add_parser(
        "dreambooth", help="teach a subject from 3 to 10 pictures, under a rare word", epilog=_EPILOG
    )
    _common(d, "400, with --lora or --pivotal 500", "5e-6, of a shipped model 1e-4; with those 1e-4 and 4e-3")
    d.add_argument("--identifier", help="the rare word that names the subject (default: sks, with --pivotal <thing>)")
    d.add_argument("--class", dest="noun", required=True, metavar="NOUN", help="the class of the subject, such as dog")
    d.add_argument("--instance-prompt", metavar="TEXT", help="caption of the pictures (default: a IDENTIFIER NOUN)")
    d.add_argument("--class-prompt", metavar="TEXT", help="caption of the class pictures (default: a NOUN)")
    d.add_argument("--num-class-images", type=int, default=100, help="class pictures for prior preservation")
    d.add_argument("--class-data-dir", type=Path, metavar="FOLDER",
                   help="class pictures: those there are used, missing ones drawn; or a data set of them")  # fmt: skip
    d.add_argument("--prior-loss-weight", type=float, default=1.0, help="loss weight of class pictures")
    d.add_argument("--no-prior", action="store_true", help="without prior preservation")
    d.add_argument("--train-text-encoder", action="store_true", help="train the text encoders too")
    finetune_training.add(d, lora=True, text=True)
    d.add_argument("--lora", action="store_true", help="train a LoRA instead of all weights")
    d.add_argument("--pivotal", "--train-text-encoder-ti", dest="pivotal", action="store_true",
                   help="pivotal tuning: the identifier is a new word that trains beside a LoRA")  # fmt: skip
    _words(d, "words for the new word to start from, each one token (default: those of --class)")
    _lora(d)

    t = methods.add_parser("textual-inversion", help="learn a new word (token) for a subject or style",
                           epilog=_EPILOG)  # fmt: skip
    _common(t, "500", "5e-3, of a shipped model 1e-2")
    finetune_training.add(t)
    t.add_argument("--placeholder-token", "--token", dest="token", default="<thing>", help="the new word")
    _words(t, "words to start from, each one token")
    t.add_argument("--learnable-property", choices=("object", "style"), default="object", help="chooses the captions")
    t.add_argument("--template", action="append", default=[], metavar="TEXT", help="caption with {} for the new word")

    r = methods.add_parser("lora", help="learn a style or many things from captioned pictures, as a small file",
                           epilog=_EPILOG)  # fmt: skip
    _common(r, "1000", "1e-4, of a shipped model 4e-3")
    r.add_argument("--train-text-encoder", action="store_true", help="adapt the text encoders too")
    finetune_training.add(r, lora=True, text=True)
    _lora(r)

    _controlnet(methods)
    _ip_adapter(methods)
    _concat(methods)
    return p


CONCAT = {
    "inpaint": ("learn to paint what is under a mask, from a base that draws", "10000",
                "1e-5, of a shipped model 3e-4"),
    "instruct": ("learn to edit pictures by instructions, from pairs of pictures", "10000",
                 "5e-5, of a shipped model 3e-4"),
    "upscale": ("learn to enlarge pictures, from a base that draws", "10000", "5e-5, of a shipped model 3e-4"),
}  # fmt: skip
"""Methods that widen the base: help, usual steps and rates."""
CONDITIONS = ("canny", "grey", "blur", "small", "stored")


def _controlnet(methods: Any) -> None:
    c = methods.add_parser("controlnet", help="learn to follow a picture: edges, a sketch, a small or grey version",
                           epilog=_EPILOG)  # fmt: skip
    _common(c, "10000", "1e-5, of a shipped model 3e-4")
    finetune_training.add(c)
    c.add_argument("--condition", choices=CONDITIONS, default="canny", help="what is made of each picture for the "
                   "ControlNet to be shown; stored: pictures that the data set has beside")  # fmt: skip
    c.add_argument("--start", "--controlnet-model-name-or-path", dest="start", metavar="PATH",
                   help="a ControlNet that trains further (default: a copy of the base's encoder)")  # fmt: skip
    c.add_argument("--validation-image", dest="conditions", type=Path, action="append", default=[], metavar="PICTURE",
                   help="the condition of a --prompt, in their order; may be repeated")  # fmt: skip
    c.add_argument("--proportion-empty-prompts", dest="drop", type=float, default=0.0, metavar="SHARE",
                   help="captions that are left out, so that the picture says more (the authors: 0.5)")  # fmt: skip


def _ip_adapter(methods: Any) -> None:
    i = methods.add_parser("ip-adapter", epilog=_EPILOG,
                           help="learn to take a picture as a prompt beside the words")  # fmt: skip
    _common(i, "10000", "1e-4, of a shipped model 3e-4")
    finetune_training.add(i)
    i.add_argument("--image-encoder", "--image-encoder-path", dest="image_encoder", default="clip_emoji",
                   help="what sees the pictures: transformers' folder (models/image_encoder of the published ones), "
                   "clip_emoji, open_clip:ARCH:WEIGHTS, or a CLIP trained here")  # fmt: skip
    i.add_argument("--form", choices=("plain", "plus"), default="plain", help="plain: told of the picture as a whole; "
                   "plus: of its places")  # fmt: skip
    i.add_argument("--start", "--pretrained-ip-adapter-path", dest="start", metavar="PATH",
                   help="an IP-Adapter that trains further (default: keys and values of the text)")  # fmt: skip
    i.add_argument("--validation-image", dest="references", type=Path, action="append", default=[], metavar="PICTURE",
                   help="the picture that a --prompt is drawn with, in their order; may be repeated")  # fmt: skip


def _concat(methods: Any) -> None:
    """Methods that tell the network a picture by more channels."""
    for method, (help, steps, rates) in CONCAT.items():
        one = methods.add_parser(method, help=help, epilog=_EPILOG)
        _common(one, steps, rates)
        finetune_training.add(one)
        one.add_argument("--validation-image", dest="pictures", type=Path, action="append", default=[],
                         metavar="PICTURE", help="what a --prompt is drawn with, in their order")  # fmt: skip
        if method == "inpaint":
            one.add_argument("--validation-mask", dest="masks", type=Path, action="append", default=[],
                             metavar="MASK", help="where it is painted (white), in their order")  # fmt: skip
        one.add_argument("--proportion-empty-prompts", dest="drop", type=float, metavar="SHARE",
                         help="captions that are left out, for guidance (default: 0.1; instruct: 0.05, and as many "
                         "pictures, and both)")  # fmt: skip


def _common(p: Parser, steps: str, rates: str) -> None:
    p.add_argument("--images", "--instance-data-dir", dest="images", type=Path, required=True, metavar="FOLDER",
                   help="folder of pictures, or a data set that `ldm data build` or `ldm data index` made")  # fmt: skip
    p.add_argument("--base", default="emoji", help="shipped name, run or diffusers folder, single file or hub id")
    p.add_argument("--out", type=Path, help="run folder (default: runs/METHOD_FOLDER)")
    p.add_argument("--steps", "--max-train-steps", dest="steps", type=int, help=f"optimizer steps (default: {steps})")
    p.add_argument(
        "--batch",
        "--train-batch-size",
        dest="batch",
        type=int,
        default=2,
        help="samples a step, of all processes together",
    )
    p.add_argument("--accumulate", "--gradient-accumulation-steps", dest="accumulate", type=int, default=1,
                   help="micro-batches that make one step")  # fmt: skip
    p.add_argument("--lr", "--learning-rate", dest="lr", type=float, help=f"learning rate (default: {rates})")
    p.add_argument("--size", "--resolution", dest="size", type=int, help="side in pixels (default: the base's own)")
    p.add_argument("--seed", type=int, default=0, help="any whole number")
    p.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="sample prompt, drawn before, during and after training; may be repeated",
    )
    p.add_argument("--samples-every", type=int, default=100, metavar="STEPS", help="how often to draw them")
    p.add_argument("--zero-stage", type=int, default=1, help="DeepSpeed ZeRO stage, 0 to 3")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="to compute in")
    p.add_argument("--text-precision", choices=TEXT_PRECISIONS, default="fp32", help=TEXT_PRECISION_HELP)
    p.add_argument("--no-cache", action="store_true", help="encode pictures and captions anew at every step")
    p.add_argument("--gradient-checkpointing", nargs="?", const="block", choices=("none", "transformer", "block"),
                   help="save memory: compute activations again (default: none, of transformers block)")  # fmt: skip
    finetune_options.add(p)
    starts.add(p)
    p.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    p.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value",
                   help="any key of the config, such as train.optim.warmup=20; --set may be left out")  # fmt: skip


def _words(p: Parser, starts_from: str) -> None:
    p.add_argument("--initializer-token", dest="initializer", nargs="+", metavar="WORD", help=starts_from)
    p.add_argument("--num-vectors", type=int, default=1, help="embeddings that the new word stands for")
    p.add_argument("--max-norm", type=float, default=2.0,
                   help="longest embedding, in multiples of the vocabulary's median; 0: no limit")  # fmt: skip


def _lora(p: Parser) -> None:
    p.add_argument("--rank", type=int, help="of the LoRA: its size (default: 4, of transformers 16)")
    p.add_argument("--alpha", type=float, help="scale is alpha / rank (default: 1)")
    p.add_argument("--dropout", type=float, default=0.0, help="of the LoRA's input")
    p.add_argument("--rank-dropout", type=float, default=0.0, metavar="SHARE", help="of the LoRA's ranks")
    p.add_argument("--module-dropout", type=float, default=0.0, metavar="SHARE", help="of whole layers' corrections")
    p.add_argument("--scale-weight-norms", dest="weight_norm", type=float, default=0.0, metavar="NORM",
                   help="bound of each correction's norm (default: none)")  # fmt: skip
    p.add_argument("--algo", choices=("lora", "loha", "lokr", "oft"), default="lora",
                   help="what corrects, as LyCORIS calls it; oft turns outputs in blocks of --rank")  # fmt: skip
    p.add_argument("--factor", type=int, default=-1, help="of lokr: its small side (default: the most even split)")
    p.add_argument("--start-from", "--network-weights", dest="start_from", metavar="FILE",
                   help="a LoRA to go on from: file, folder or run, of the same layers and rank")  # fmt: skip
    p.add_argument("--targets", nargs="+",
                   help="attention feed_forward projection convolution time, or ends of layer names (default: "
                   "attention, of FLUX.1 feed_forward too)")  # fmt: skip
    p.add_argument(
        "--include", nargs="+", default=[], metavar="REGEX", help="of these layers, those whose name fits one"
    )
    p.add_argument("--exclude", nargs="+", default=[], metavar="REGEX", help="layers that are left out")
    p.add_argument("--rank-pattern", nargs="+", default=[], metavar="REGEX=RANK", help="other ranks by layers' names")
    p.add_argument("--dora", action="store_true", help="train a DoRA: direction and magnitude apart")
    p.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(rank)")


def tree(args: argparse.Namespace) -> dict[str, Any]:
    """The run's config as plain data."""
    return finetune_options.applied(_tree(args), args)


def _tree(args: argparse.Namespace) -> dict[str, Any]:
    """What the method makes of its choices."""
    from ldm.recipes import folder_runs

    booth = args.method == "dreambooth"
    pivotal = booth and args.pivotal
    low_rank = args.method == "lora" or (booth and (args.lora or pivotal))
    method = args.method.replace("-", "_") + ("_pivotal" if pivotal else "_lora" if booth and low_rank else "")
    if booth and not pivotal:
        for option, given, default in (
            ("--initializer-token", args.initializer, None),
            ("--num-vectors", args.num_vectors, 1),
            ("--max-norm", args.max_norm, 2.0),
        ):
            if given != default:
                raise ValueError(f"{option}: is of the new word that --pivotal trains; add --pivotal, or leave it out")
    if booth and args.identifier is None:
        args.identifier = "<thing>" if pivotal else "sks"
    choices = folder_runs.Choices(
        method=method, images=args.images, base=args.base, out=args.out, steps=args.steps, batch=args.batch,
        accumulate=args.accumulate, lr=args.lr, size=args.size, seed=args.seed, prompts=args.prompt,
        samples=args.samples_every, stage=args.zero_stage, precision=args.precision, text_precision=args.text_precision,
        cache=not args.no_cache,
        gradient_checkpointing=False if args.gradient_checkpointing == "none" else args.gradient_checkpointing,
        adapter=_pivotal(args) if pivotal else _adapter(args, low_rank),
        name=None if args.out is None else args.out.name, optim=finetune_training.optim(args),
        options=finetune_training.options(args), masks=args.masked_loss,
    )  # fmt: skip
    if args.method == "dreambooth":
        prior: dict[str, Any] | None = None
        if not args.no_prior:
            prior = {"count": args.num_class_images, "prompt": args.class_prompt}
            prior |= {} if args.class_data_dir is None else {"folder": str(args.class_data_dir)}
        return folder_runs.dreambooth(
            choices, identifier=args.identifier, noun=args.noun, prior=prior, weight=args.prior_loss_weight,
            prompt=args.instance_prompt,
        )  # fmt: skip
    if args.method == "lora":
        return folder_runs.lora(choices)
    if args.method == "controlnet":
        return folder_runs.controlnet(
            choices, condition=args.condition, start=args.start, conditions=args.conditions, drop=args.drop
        )
    if args.method == "ip-adapter":
        return folder_runs.ip_adapter(
            choices, image_encoder=args.image_encoder, form=args.form, start=args.start, references=args.references
        )
    if args.method in CONCAT:
        masks = getattr(args, "masks", [])
        return folder_runs.concat(choices, args.method, pictures=args.pictures, masks=masks, drop=args.drop)
    return folder_runs.inversion(
        choices, token=args.token, max_norm=args.max_norm, vectors=args.num_vectors, initializer=args.initializer or [],
        learn=args.learnable_property, templates=args.template,
    )  # fmt: skip


def _pivotal(args: argparse.Namespace) -> dict[str, Any]:
    start = args.initializer or args.noun.split()
    token = {"token": args.identifier, "vectors": args.num_vectors, "initializer": start}
    return {"kind": "pivotal", "tokens": [token], "lora": _adapter(args, True), "max_norm": args.max_norm}


def _adapter(args: argparse.Namespace, low_rank: bool) -> dict[str, Any]:
    from ldm.models.shipped import SHIPPED

    if args.method in ("textual-inversion", "controlnet", "ip-adapter"):
        return {}
    if args.method in CONCAT:
        return {"kind": "full"}
    if not low_rank:
        return {"kind": "full", "text": args.train_text_encoder}
    return {
        "kind": "lora", "rank": args.rank, "alpha": args.alpha, "dropout": args.dropout,
        "targets": args.targets or (["attention"] if args.base in SHIPPED else None),
        "text": args.train_text_encoder, "dora": args.dora, "rslora": args.rslora, **_more(args),
    }  # fmt: skip


def _more(args: argparse.Namespace) -> dict[str, Any]:
    """What is asked of a LoRA beyond the usual."""
    ranks = {}
    for entry in args.rank_pattern:
        pattern, _, rank = entry.rpartition("=")
        if not pattern or not rank.isdigit():
            raise ValueError(f"--rank-pattern {entry!r}: expected REGEX=RANK, such as attn2=8")
        ranks[pattern] = int(rank)
    asked = {
        "algo": args.algo, "include": args.include, "exclude": args.exclude, "rank_pattern": ranks,
        "rank_dropout": args.rank_dropout, "module_dropout": args.module_dropout, "max_norm": args.weight_norm,
        "factor": args.factor, "start": args.start_from,
    }  # fmt: skip
    usual = {"algo": "lora", "factor": -1}
    return {k: v for k, v in asked.items() if v and v != usual.get(k)}


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    if finetune_from.asked(argv):
        return finetune_from.main(argv)
    options = parser()
    method = [word.replace("_", "-") for word in argv[:1]]  # as a config calls it
    args, words = options.parse_known_args([*method, *argv[1:]])
    if args.method is None:
        options.error("the following arguments are required: method")
    if wrong := [w for w in words if not is_override(w)]:
        raise ValueError(f"override {wrong[0]!r}: expected key=value, such as train.steps=100")
    args.overrides = [*args.overrides, *words]
    from ldm.config.load import dump
    from ldm.config.schema import load_run
    from ldm.recipes.models import usable

    if args.images.name == "manifest.json" and args.images.is_file():
        args.images = args.images.parent
    if not args.images.is_dir():
        raise ValueError(f"--images: {str(args.images)!r}: no such folder")
    args.base = usable(args.base, "--base")
    config = load_run(tree(args), args.overrides)
    resolved = dump(config)
    if args.print_config:
        print(resolved, end="")
        return 0

    from functools import partial

    from ldm.recipes import assemble
    from ldm.recipes.run import run

    build = partial(assemble, config.task, config.data, config.train, config.seed, config.workers)
    code = run(build, config.train, config.out, seed=config.seed, resolved=resolved, start=starts.start(args))
    if code == 0:
        from ldm import dist

        tuned = f"--model {config.out}"
        how = {
            "controlnet": f"--model {args.base} --control {config.out}:PICTURE",
            "ip-adapter": f"--model {args.base} --image-prompt PICTURE --ip-adapter {config.out}",
        }.get(args.method, tuned)
        verb = (
            f"edit {args.method} PICTURE" + " MASK" * (args.method == "inpaint") if args.method in CONCAT else "sample"
        )
        dist.say(f"page: {config.out / 'page.html'}; pictures: ldm {verb} PROMPT {how}")
    return code
