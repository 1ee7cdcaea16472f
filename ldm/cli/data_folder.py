"""`ldm data captions|check FOLDER`: a folder of pictures before it becomes a data set."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

_MOST = 20


def add(verbs: Any) -> None:
    """Both verbs."""
    c = verbs.add_parser("captions", help="list or change the captions of a folder of pictures, in place")
    c.add_argument(
        "folder", type=Path, help="folder of pictures with .txt or .json files, or a metadata.jsonl, .csv or .tsv"
    )
    c.add_argument("--set", dest="texts", nargs=2, action="append", default=[], metavar=("PICTURE", "CAPTION"),
                   help="the caption of one picture, by its name as listed; may be repeated")  # fmt: skip
    c.add_argument("--replace", nargs=2, metavar=("OLD", "NEW"), help="in all captions")
    c.add_argument("--trigger", metavar="WORD", help="put a word before all captions that do not begin with it")
    c.set_defaults(run=_captions)
    k = verbs.add_parser(
        "check", help="what training would find in a folder: captions, small pictures, look-alikes, buckets"
    )
    k.add_argument("folder", type=Path, help="folder of pictures")
    k.add_argument("--size", type=int, help="side to train at (the largest usual one that half of the pictures have)")
    k.add_argument("--json", action="store_true", help="as JSON")
    k.set_defaults(run=_check)


def _captions(args: argparse.Namespace) -> int:
    from ldm.data.captioning import edit, listed

    if not (args.texts or args.replace or args.trigger is not None):
        for shown in listed(args.folder):
            print(f"{shown.name}: {shown.problem or ' | '.join(shown.captions) or '(no caption)'}")
        return 0
    replace = None if args.replace is None else (args.replace[0], args.replace[1])
    changed = edit(args.folder, texts=dict(args.texts), replace=replace, trigger=args.trigger)
    print(f"{len(changed)} captions changed in {args.folder}" + "".join(f"\n  {n}" for n in changed[:_MOST]))
    return 0


def _check(args: argparse.Namespace) -> int:
    from ldm.data.captioning import check
    from ldm.progress import Bar

    with Bar("looking", "pictures", leave=False) as bar:
        found = check(args.folder, args.size, bar.to)
    if args.json:
        print(json.dumps(asdict(found), indent=1, ensure_ascii=False))
        return 0
    print(f"{found.pictures} pictures; training at {found.side} pixels")
    for name, why in found.bad.items():
        print(f"cannot be used: {name}: {why}")
    for what, names in (
        ("without a caption", found.uncaptioned),
        (f"smaller than {found.side} pixels", [f"{n} ({w}x{h})" for n, (w, h) in found.small.items()]),
    ):
        if names:
            more = f", and {len(names) - _MOST} more" if len(names) > _MOST else ""
            print(f"{len(names)} {what}: {', '.join(names[:_MOST])}{more}")
    for group in found.alike:
        print(f"look alike: {', '.join(group)}")
    for bucket, count in found.buckets.items():
        print(f"bucket {bucket}: {count} pictures")
    return 0
