"""`python -m tests.golden [check|write|files]`: short trainings of every task kind, against the figures of before.

`check` (the default) trains and compares every loss and a sum over the exported weights with `losses.json`, digit by
digit; `write` replaces that file, which belongs before a refactoring and never after it; `files` replaces the
small run and exports in `made/`, which later code must still load. A processor's own kernels would round otherwise, so
all runs take plain ones.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

PLAIN = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "LDM_AUTO_PRECISION": "fp32",
}


def main(argv: list[str]) -> int:
    """Exit code 1 when a figure is another."""
    verb = argv[0] if argv else "check"
    if verb not in ("check", "write", "files"):
        raise SystemExit(f"golden: expected check, write or files, got {verb!r}")
    if any(os.environ.get(k) != v for k, v in PLAIN.items()):  # libraries read them as they load
        os.execve(sys.executable, [sys.executable, "-m", "tests.golden", *argv], dict(os.environ) | PLAIN)
    from tests.golden import runs

    with tempfile.TemporaryDirectory() as folder:
        root = runs.project(Path(folder))
        if verb == "files":
            runs.keep(root)
            return 0
        found = {}
        for world in (1, 2):
            for name in runs.KINDS:
                found[f"{name}, {world}"] = runs.figures(root, name, world)
                print(f"{name}, {world}: {found[f'{name}, {world}']['losses']}", flush=True)
    if verb == "write":
        runs.write(found)
        return 0
    odd = runs.differences(found)
    print("\n".join(odd) or f"{len(found)} runs as before, digit by digit")
    return int(bool(odd))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
