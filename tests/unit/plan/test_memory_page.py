"""The table of docs/memory.md: every card, family and job, and the figures that its command finds."""

from __future__ import annotations

from itertools import product

import pytest

from bench.memory import BEGIN, CARDS, FAMILIES, FAMILY_PAGES, HEAD, PAGE, Family, rows, table, written


def page() -> list[list[str]]:
    return written(PAGE.read_text(encoding="utf-8"))


def test_every_card_family_and_job_has_a_row() -> None:
    wanted = [
        [f"{card} GB", family.title, job]
        for family, job, card in product(FAMILIES, ("sampling", "LoRA", "all weights"), CARDS)
    ]
    assert [row[:3] for row in page()] == wanted


def test_every_figure_is_marked_and_fits() -> None:
    for row in page():
        assert len(row) == len(HEAD)
        assert row[-1] in ("planned", "measured")
        if not row[3].startswith("none: "):
            assert float(row[4].split()[0]) <= 0.92 * int(row[0].split()[0])
            assert float(row[5]) > 0


def test_a_table_is_read_as_it_is_written() -> None:
    found = [["8 GB", "SD 1.5", "LoRA", "`frozen=bf16`", "2.9", "3.0", "planned"]]
    assert BEGIN in PAGE.read_text(encoding="utf-8")
    assert written(f"{BEGIN}\n{table(found)}<!-- the end of what python -m bench memory writes -->") == found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.preset)
def test_the_page_of_a_family_has_its_rows(family: Family) -> None:
    (text,) = [t for path in FAMILY_PAGES.glob("*.md") if f"<!-- cards: {family.title} -->" in (t := path.read_text())]
    lines = text.partition("<!-- cards: ")[2].partition("<!-- the end of the cards -->")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    assert rows == [[row[0], *row[2:]] for row in page() if row[1] == family.title]
    assert f"ldm plan --sample {family.preset}" in text


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.preset)
def test_the_table_is_what_the_command_finds(family: Family) -> None:
    assert [list(row) for row in rows([family])] == [row for row in page() if row[1] == family.title]
