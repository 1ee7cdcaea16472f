"""How long `ldm --help` takes, beside an empty interpreter, `import torch`, and the command line of diffusers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from bench.timing import Options, interleaved, report


def command(*argv: str) -> Callable[[], object]:
    """Run it in a new interpreter; its output is thrown away."""

    def once() -> None:
        subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return once


def run(options: Options) -> dict[str, Any]:
    """Measure."""
    cases = {
        "ldm --help": command("-m", "ldm.cli", "--help"),
        "python": command("-c", "pass"),
    }
    pairs = [("ldm --help", "python")]
    if not options.quick:
        cases |= {
            "ldm train --help": command("-m", "ldm.cli", "train", "--help"),
            "import torch": command("-c", "import torch"),
            "diffusers-cli --help": command("-m", "diffusers.commands.diffusers_cli", "--help"),
        }
        pairs += [("ldm --help", "import torch"), ("ldm --help", "diffusers-cli --help")]
    seconds = interleaved(cases, options.times(10), warmup=1)
    return report("start of the command line", seconds, pairs)
