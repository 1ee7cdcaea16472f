"""`ldm doctor`: what this machine and environment give, what is wrong with them, and the command that mends it.

Nothing heavy is imported here: whatever may be missing, broken or hang is tried in processes of their own.
"""

from __future__ import annotations

import json
from pathlib import Path

from ldm.cli.options import Parser

LIMIT = 60.0
"""Seconds after which a process that tries something is ended."""


def parser() -> Parser:
    """Options of the verb."""
    p = Parser(
        prog="ldm doctor",
        description="What this machine and this environment give, what is wrong, and the command that mends it. "
        "The exit code is 0 unless something stops work.",
    )
    p.add_argument("--quick", action="store_true", help="try everything, measure nothing")
    p.add_argument("--json", action="store_true", help="as one JSON object")
    p.add_argument("--folder", type=Path, default=Path(), help="where runs will be written, whose disk is looked at")
    p.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="the longest that one trial may take")
    return p


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_args(argv)
    if not 1 <= args.limit <= 3600:
        raise ValueError(f"--limit must be in [1, 3600] seconds, got {args.limit:g}")
    if not args.folder.is_dir():
        raise ValueError(f"--folder: {str(args.folder)!r} is not a folder")

    from ldm.cli.doctor.checks import diagnose, stops
    from ldm.cli.doctor.facts import collect
    from ldm.cli.doctor.measures import measure
    from ldm.cli.doctor.screen import anonymous, text

    facts = collect(args.folder, args.limit)
    if not args.quick:
        facts["measured"] = measure(facts, args.folder, args.limit)
    findings = diagnose(facts)
    facts = anonymous(facts)
    if args.json:
        record = facts | {"findings": [anonymous(f.record()) for f in findings], "fit": not stops(findings)}
        print(json.dumps(record, indent=1, allow_nan=False))
    else:
        print(text(facts, findings))
    return 1 if stops(findings) else 0
