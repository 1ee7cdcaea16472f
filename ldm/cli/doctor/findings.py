"""What a check says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Level = Literal["stops", "slows", "note"]
LEVELS = get_args(Level)


@dataclass(frozen=True)
class Finding:
    """`key` names it for programs; `mend` is a command, or a setting, or "" where there is nothing to do.

    "stops": something that is wanted here cannot run. "slows": it runs, worse than it could. "note": worth knowing.
    """

    level: Level
    key: str
    what: str
    mend: str = ""

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def at(facts: Any, *path: str) -> Any:
    """facts["a"]["b"] of ("a", "b"); None where any of them is missing, as after a trial that was cut short."""
    for name in path:
        facts = facts.get(name) if isinstance(facts, dict) else None
    return facts
