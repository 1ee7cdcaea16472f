"""From facts to findings: what is wrong, how much it matters, and the command that mends it. Pure functions.

Those of cards, drivers and kernels are in `checks_gpu`, of packages in `checks_packages`, of the rest in
`checks_machine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ldm.cli.doctor import checks_gpu, checks_machine, checks_packages
from ldm.cli.doctor.findings import LEVELS, Finding

Check = Callable[[dict[str, Any]], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (*checks_packages.CHECKS, *checks_gpu.CHECKS, *checks_machine.CHECKS)


def diagnose(facts: dict[str, Any]) -> list[Finding]:
    """All findings, what stops work first."""
    found = [finding for check in CHECKS for finding in check(facts)]
    return sorted(found, key=lambda f: LEVELS.index(f.level))


def stops(findings: list[Finding]) -> bool:
    """Whether something stops work."""
    return any(f.level == "stops" for f in findings)
