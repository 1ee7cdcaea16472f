"""docs/samplers.md shows the samplers that exist."""

from __future__ import annotations

from pathlib import Path

from ldm.sampling import SAMPLERS
from ldm.sampling.table import table

DOCS = Path(__file__).parents[3] / "docs" / "samplers.md"


def test_the_page_holds_the_table():
    """After a change: `python -m ldm.sampling.table` prints the new table."""
    text = DOCS.read_text(encoding="utf-8")
    begin, end = "<!-- table: begin -->\n", "<!-- table: end -->"
    assert text.split(begin)[1].split(end)[0] == table()


def test_every_sampler_is_complete():
    for name, info in SAMPLERS.items():
        assert info.name == name
        assert info.paper
        assert info.order >= 1
        assert info.cost >= 1
        assert info.eta_range[0] <= info.eta <= info.eta_range[1]
