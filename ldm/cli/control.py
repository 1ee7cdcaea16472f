"""The options of ControlNets: what they are shown, and how strongly, at which steps they work."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage


def add(p: argparse.ArgumentParser) -> None:
    """The options, for a verb that draws."""
    p.add_argument(
        "--control", action="append", default=[], metavar="CONTROLNET:PICTURE[:SCALE]",
        help="a ControlNet (run, diffusers folder, single file, hub id), the condition picture that it is shown, such "
        "as edges.png, resized to what is drawn, and how strongly (1); may be repeated",
    )  # fmt: skip
    p.add_argument(
        "--control-steps", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
        help="the share of the steps in which ControlNets work",
    )  # fmt: skip
    p.add_argument(
        "--guess", action="store_true",
        help="ControlNets work on the prompt's half of guidance alone, and less at fine levels: for empty prompts",
    )  # fmt: skip


def parsed(entry: str) -> tuple[str, Path, float]:
    """ControlNet, picture and scale of an entry. Raises ValueError for another form and where there is no picture."""
    both, scale = picture_and_scale(entry)
    head, _, last = both.rpartition(":")
    if not (head and last):
        raise ValueError(f"--control {entry!r}: expected CONTROLNET:PICTURE or CONTROLNET:PICTURE:SCALE")
    if not Path(last).is_file():
        raise ValueError(f"--control {entry!r}: {last!r}: no such picture")
    return head, Path(last), scale


def picture_and_scale(entry: str) -> tuple[str, float]:
    """What stands before the last colon and the number behind it; all of the entry and 1 where there is none."""
    head, colon, last = entry.rpartition(":")
    if colon and not Path(last).exists():
        with contextlib.suppress(ValueError):
            return head, float(last)
    return entry, 1.0


def digest(path: Path) -> str:
    """A short hash of a file."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for what no model is needed to refuse."""
    from ldm.pipeline.control import check_use

    for entry in args.control:
        _, _, scale = parsed(entry)
        check_use(scale, *args.control_steps, name=f"--control {entry!r}")
    if not args.control and (args.guess or tuple(args.control_steps) != (0.0, 1.0)):
        raise ValueError(f"{'--guess' if args.guess else '--control-steps'}: is of ControlNets; add --control")


def digests(args: argparse.Namespace) -> dict[str, list[str]]:
    """For the record of a picture: short hashes of the condition pictures' files, in their order."""
    return {"conditions": [digest(parsed(entry)[1]) for entry in args.control]}


def controlled(pipeline: TextToImage, args: argparse.Namespace) -> TextToImage:
    """The pipeline under the ControlNets that are asked for; itself where there are none."""
    if not args.control:
        return pipeline
    from ldm.checkpoint.control_files import load_control
    from ldm.data.decode import load
    from ldm.pipeline import Control
    from ldm.recipes.models import usable

    found = []
    for entry in args.control:
        source, picture, scale = parsed(entry)
        start, end = args.control_steps
        network = load_control(usable(source, "--control"))
        shown, name = load(picture, stencil=True), f"--control {source!r}"
        how = {"scale": scale, "start": start, "end": end, "guess": args.guess, "name": name}
        found.append(Control(network=network, picture=shown, **how))
    return pipeline.controlled(found)
