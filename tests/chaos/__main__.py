"""`python -m tests.chaos`: the long form; a table, and the same as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.chaos.disks import full, read_only
from tests.chaos.kills import kill_often


def main() -> int:
    """Exit code 1 if anything that survived differs from the undisturbed run."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        table = kill_often(Path(folder), args.kills, args.seed)
        print(table.text(), flush=True)
        disks = [test(Path(folder)) for test in (full, read_only)]
    good = table.curve_equal and table.weights_equal and not table.wrongly_read
    for disk in disks:
        print(f"disk {disk.kind}: {disk.skipped or disk.record()}")
        good &= bool(disk.skipped) or (disk.curve_equal and not disk.lost_checkpoints and 0 not in disk.codes)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"kills": table.record(), "disks": [d.record() for d in disks], "passed": good}
    args.out.write_text(json.dumps(result, indent=1))
    print(f"{'passed' if good else 'FAILED'}; written: {args.out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
