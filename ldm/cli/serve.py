"""`ldm serve`: a page in the browser that draws from words."""

from __future__ import annotations

from ldm.cli.options import TEXT_PRECISION_HELP, TEXT_PRECISIONS, Parser
from ldm.models.shipped import DEFAULT, SHIPPED

EXAMPLES = ("a red apple", "a smiling face with sunglasses", "woman firefighter, medium-dark skin tone", "a red heart")


def parser() -> Parser:
    """Options of the verb."""
    p = Parser(
        prog="ldm serve",
        description="Draw pictures of prompts in a browser. Needs `pip install 'ldm[web]'`.",
    )
    p.add_argument("--model", default=DEFAULT, help="shipped name, run or diffusers folder, single file or hub id")
    p.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="fp32", help="what the network computes in"
    )
    p.add_argument("--text-precision", choices=TEXT_PRECISIONS, help=TEXT_PRECISION_HELP + " (as --precision)")
    p.add_argument("--device", default=None, help="cpu, cuda, ...; default: a GPU if there is one")
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    p.add_argument("--port", type=int, default=7860)
    return p


def main(argv: list[str]) -> int:
    """Serve until interrupted; ValueError for users' mistakes."""
    args = parser().parse_args(argv)
    if not 1 <= args.port <= 65535:
        raise ValueError(f"--port: must be in [1, 65535], got {args.port}")
    from ldm import dist
    from ldm.pipeline import TextToImage
    from ldm.recipes.models import usable
    from ldm.web.serve import build_app, check_gradio

    check_gradio()
    pipeline = TextToImage.load(
        usable(args.model, "--model"), device=args.device or dist.device(), precision=args.precision,
        text_precision=args.text_precision,
    )  # fmt: skip
    app = build_app(pipeline, args.model, EXAMPLES if args.model in SHIPPED else ())
    try:
        app.launch(server_name=args.host, server_port=args.port, quiet=False, share=False)
    except OSError as error:
        raise ValueError(f"--port: {args.port} cannot be used ({error})") from error
    return 0
