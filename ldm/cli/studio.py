"""`ldm studio [FOLDER ...]`: pictures, training, watching, drawing and models on one page in the browser."""

from __future__ import annotations

import argparse
import importlib
import os
import secrets
from pathlib import Path
from typing import Any

from ldm.cli.options import Parser

HERE = ("127.0.0.1", "localhost", "::1")


def parser() -> Parser:
    """Options of the verb."""
    p = Parser(
        prog="ldm studio",
        description="One page for one person on their own machine: pictures and captions, training, watching, drawing, "
        "models. What it does is done by commands, which it shows. Needs `pip install 'ldm[web]'`.",
    )
    p.add_argument("folders", nargs="*", type=Path, metavar="FOLDER",
                   help="folders that the page may read and write below (the one it is started in)")  # fmt: skip
    p.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where trainings are")
    p.add_argument("--drawn", type=Path, default=Path("drawn"), metavar="FOLDER", help="where drawn pictures go")
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, with a token in the address")
    p.add_argument("--port", type=int, default=7860)
    p.add_argument("--token", help="in the address, where another host is asked for (default: a new one)")
    return p


def main(argv: list[str]) -> int:
    """Serve until interrupted; ValueError for users' mistakes."""
    args = parser().parse_args(argv)
    if not 1 <= args.port <= 65535:
        raise ValueError(f"--port: must be in [1, 65535], got {args.port}")
    if args.token is not None and len(args.token) < 8:
        raise ValueError(f"--token: must have at least 8 characters, got {len(args.token)}")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is told to anybody
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from ldm.cli import kept
    from ldm.web.serve import check_gradio
    from ldm.web.studio.places import Places

    check_gradio()
    places = Places.of(args.folders or [Path()], args.runs, args.drawn)
    kept.start()
    token = args.token or (None if args.host in HERE else secrets.token_urlsafe(16))
    _serve(args, places, token)
    return 0


def _serve(args: argparse.Namespace, places: Any, token: str | None) -> None:
    from ldm.web.studio.page import launch

    shown = "127.0.0.1" if args.host in ("0.0.0.0", "::") else args.host
    address = f"http://{shown}:{args.port}/" + (f"?token={token}" if token else "")
    try:
        told = f"ldm studio: {address}   (Ctrl-C ends the page; trainings go on)"
        how = {"host": args.host, "port": args.port, "token": token}
        launch(places, run, ready=lambda: print(told, flush=True), **how)
    except OSError as error:
        raise ValueError(f"--port: {args.port} cannot be used ({error})") from error


def run(argv: list[str]) -> int:
    """A command in this process; ValueError for all that goes wrong in a way that a sentence tells."""
    from ldm.cli.__main__ import VERBS, about

    if not argv or argv[0] not in VERBS:
        raise ValueError(f"no such command: {' '.join(argv)}")
    try:
        return importlib.import_module(f"ldm.cli.{argv[0]}").main(argv[1:])
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    except (ValueError, FloatingPointError):
        raise
    except Exception as error:
        told = about(error)
        if told is None:
            raise
        raise ValueError(told) from error
