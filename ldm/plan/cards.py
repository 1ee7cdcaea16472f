"""Which settings make a job fit into a card's memory: a few in a fixed order, those that cost no time first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ldm.plan.hardware import GB
from ldm.plan.report import digits
from ldm.plan.throughput import Cluster

LEVEL = 1.02
"""Two answers whose times differ by less are as quick as each other."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One or more `key=value` that take less memory together. `lossy`: weights are rounded to 8 or 4 bits.

    A later one of the same `kind` takes an earlier one's place.
    """

    words: tuple[str, ...]
    kind: str
    lossy: bool = False


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What some settings need. `parts`: bytes by part, `host` among them; `minutes` of a thousand steps, None where it
    does not fit. Of what was not counted to its end, "at least" is the only part. `picture`: seconds of one that is
    drawn.
    """

    parts: dict[str, float]
    minutes: float | None
    picture: float | None = None

    @property
    def total(self) -> float:
        """Bytes on the card."""
        return sum(v for k, v in self.parts.items() if k != "host")


@dataclass(frozen=True, kw_only=True)
class Way:
    """Settings with which a job fits, and what it then needs."""

    settings: tuple[Setting, ...]
    needs: Tried

    @property
    def words(self) -> tuple[str, ...]:
        """All `key=value` to add."""
        return tuple(word for setting in self.settings for word in setting.words)

    @property
    def lossy(self) -> bool:
        """Whether weights are rounded to 8 or 4 bits."""
        return any(s.lossy for s in self.settings)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found for `card`, of which `limit` bytes are usable. `before`: as the job is; `way` None: nothing fits,
    and `closest` needs least. `other`: the way that does not round weights, where `way` does.
    """

    name: str
    card: str
    limit: float
    before: Tried
    way: Way | None
    closest: Way
    other: Way | None = None
    warnings: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class Search:
    """`needs(words)` tells what a job takes with these settings added; `least(words)` bytes below which it cannot be,
    found without counting a step.
    """

    def __init__(
        self,
        needs: Callable[[tuple[str, ...]], Tried],
        least: Callable[[tuple[str, ...]], float],
        limit: float,
    ) -> None:
        self._needs, self._least, self.limit = needs, least, limit
        self._known: dict[tuple[str, ...], Tried] = {}

    def needs(self, settings: Sequence[Setting]) -> Tried:
        """What the job takes with these."""
        words = Way(settings=tuple(settings), needs=Tried(parts={}, minutes=None)).words
        if words not in self._known:
            self._known[words] = self._needs(words)
        return self._known[words]

    def fits(self, settings: Sequence[Setting]) -> bool:
        """Whether it fits with these."""
        words = tuple(word for setting in settings for word in setting.words)
        return self._least(words) <= self.limit and self.needs(settings).total <= self.limit

    def walk(self, settings: Sequence[Setting]) -> tuple[list[Setting], bool]:
        """Settings in their order until the job fits, without those that turn out not to be needed; whether it does."""
        taken: list[Setting] = []
        if self.fits(taken):
            return taken, True
        for setting in settings:
            taken = [*(s for s in taken if s.kind != setting.kind), setting]
            if self.fits(taken):
                break
        else:
            return taken, False
        for setting in taken[-2::-1]:  # the last was needed; the dearest of the others goes first
            fewer = [s for s in taken if s is not setting]
            if self.fits(fewer):
                taken = fewer
        return taken, True


def find(search: Search, settings: Sequence[Setting]) -> tuple[Way | None, Way, Way | None]:
    """(the quickest way that fits, the one that needs least, the way without rounding where the first rounds)."""
    plain, fits = search.walk([s for s in settings if not s.lossy])
    way = Way(settings=tuple(plain), needs=search.needs(plain)) if fits else None
    if way is not None and not _slows(way):
        return way, way, None
    rounded, small = search.walk(settings)
    lossy = Way(settings=tuple(rounded), needs=search.needs(rounded))
    if not small:
        return way, way or lossy, None
    if way is None or _minutes(lossy) * LEVEL < _minutes(way):
        return lossy, lossy, way if lossy.lossy else None
    return way, way, None


def _slows(way: Way) -> bool:
    """Whether the way moves weights, for which rounding them may be quicker."""
    return way.needs.parts.get("host", 0.0) > 0


def _minutes(way: Way) -> float:
    return float("inf") if way.needs.minutes is None else way.needs.minutes


def card_of(cluster: Cluster) -> str:
    """What is planned, in words."""
    memory, name = cluster.hardware.memory, cluster.hardware.name
    many = "a card" if cluster.world == 1 else f"{cluster.world} cards"
    return f"{many} of {memory:g} GB, as fast as {name}"


def text(answer: Answer) -> str:
    """The answer for a terminal."""
    return "\n".join(_lines(answer))


def _lines(answer: Answer) -> Iterator[str]:
    yield f"{answer.name} on {answer.card}: {answer.limit / GB:.1f} GB are usable"
    yield f"as it is: {_said(answer.before)}"
    if answer.way is None:
        lacking = (answer.closest.needs.total - answer.limit) / GB
        yield f"it does not fit: {digits(lacking, 1)} GB are lacking with"
        yield from _way(answer.closest)
    elif not answer.way.words:
        yield "it fits as it is"
    else:
        yield "it fits with"
        yield from _way(answer.way)
    if answer.other is not None:
        yield "or, with no weights of 8 or 4 bits, with"
        yield from _way(answer.other)
    yield from (f"warning: {line}" for line in answer.warnings)


def _way(way: Way) -> Iterator[str]:
    yield from (f"  {word}" for word in way.words)
    yield _said(way.needs)


def _said(needs: Tried) -> str:
    if "at least" in needs.parts:
        return f"at least {digits(needs.total / GB, 1)} GB without activations"
    parts = ", ".join(f"{k} {digits(v / GB, 2)}" for k, v in needs.parts.items() if v and k != "host")
    host = needs.parts.get("host", 0.0)
    took = "" if needs.minutes is None else f"; {digits(needs.minutes, 1)} minutes a thousand steps"
    took += "" if needs.picture is None else f", {digits(needs.picture, 1)} seconds a picture"
    beside = f", and {digits(host / GB, 2)} GB of the host's memory" if host else ""
    return f"{digits(needs.total / GB, 2)} GB ({parts}){beside}{took}"
