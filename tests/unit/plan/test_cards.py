"""The search for settings: a job whose needs are known, so that every answer can be told beforehand."""

from __future__ import annotations

import pytest

from ldm.plan.cards import Search, Setting, Tried, find
from ldm.plan.hardware import CARDS, HARDWARE, of_memory

HALF, SMALL = Setting(kind="frozen", words=("frozen=bf16",)), Setting(kind="frozen", words=("frozen=nf4",), lossy=True)
AGAIN = Setting(kind="again", words=("again=yes",))
BLOCKS = [Setting(kind="blocks", words=(f"blocks={n}",)) for n in (4, 2, 1)]
ALL = [HALF, AGAIN, SMALL, *BLOCKS]


def needs(words: tuple[str, ...]) -> Tried:
    """Weights of 16, 8 or 2 and activations of 10 or 3; 8 blocks, whose moving takes time."""
    told = dict(word.split("=") for word in words)
    whole = {"bf16": 8.0, "nf4": 2.0}.get(told.get("frozen", ""), 16.0)
    share = int(told.get("blocks", 8)) / 8
    minutes = 10 + 3 * ("again" in told) + 2 * (told.get("frozen") == "nf4") + 20 * (1 - share)
    return Tried(
        parts={"frozen": whole * share, "activations": 3.0 if "again" in told else 10.0, "host": whole * (1 - share)},
        minutes=minutes,
    )


def search(limit: float) -> Search:
    return Search(needs, lambda words: needs(words).parts["frozen"], limit)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (26, ()),
        (18, ("frozen=bf16",)),
        (11, ("frozen=bf16", "again=yes")),
        (5, ("again=yes", "frozen=nf4")),  # quicker than moving blocks of bf16
        (4, ("again=yes", "frozen=nf4", "blocks=4")),
    ],
)
def test_the_first_settings_that_fit(limit: float, words: tuple[str, ...]) -> None:
    way, closest, _ = find(search(limit), ALL)
    assert way is not None
    assert closest is way
    assert way.words == words
    assert way.needs.total <= limit


def test_what_turned_out_not_to_be_needed_is_left_out() -> None:
    """Rounded weights alone are enough under 12.5, where bf16 and computing again came before."""
    way, fits = search(12.5).walk([HALF, Setting(kind="more", words=("more=1",)), SMALL])
    assert fits
    assert [s.words for s in way] == [("frozen=nf4",)]


def test_a_way_without_rounding_is_named_beside() -> None:
    way, _, other = find(search(5), ALL)
    assert way is not None
    assert way.lossy
    assert other is not None
    assert not other.lossy
    assert other.words == ("frozen=bf16", "again=yes", "blocks=2")


def test_where_nothing_fits_the_least_is_told() -> None:
    way, closest, other = find(search(1), ALL)
    assert way is None
    assert other is None
    assert closest.needs.total == pytest.approx(3.25)


def test_nothing_is_counted_that_cannot_fit() -> None:
    counted: list[tuple[str, ...]] = []

    def counting(words: tuple[str, ...]) -> Tried:
        counted.append(words)
        return needs(words)

    find(Search(counting, lambda words: needs(words).parts["frozen"], 11), ALL)
    assert all(needs(words).parts["frozen"] <= 11 for words in counted)
    assert len(counted) == len(set(counted))


def test_cards_by_their_memory() -> None:
    sizes = [HARDWARE[name].memory for name in CARDS]
    assert sizes == sorted(sizes)
    assert [of_memory(n).name for n in (8, 10, 12, 16, 24, 500)] == [
        "rtx4060", "rtx3060", "rtx3060", "rtx4060ti", "rtx3090", "h200",
    ]  # fmt: skip
    assert of_memory(10).memory == 10
    with pytest.raises(ValueError, match="card: 0 GB; expected a size above 0, such as 12"):
        of_memory(0)
