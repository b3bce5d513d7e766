"""docs/plans.md says what the product says."""

from __future__ import annotations

from pathlib import Path

import guide_plans
import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "plans.md"


def table_in(text: str, title: str) -> list[list[str]]:
    """Return the cells of the rows below a guide's title."""
    lines = text.split(f"**{title}**\n\n")[1].split("\n\n", maxsplit=1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.slow
def test_the_small_guide_is_answered_as_the_document_says() -> None:
    guide = guide_plans.GUIDES[0]
    shown = table_in(DOCUMENT.read_text(encoding="utf-8"), guide.title)
    said = list(guide_plans.rows(guide))
    exact = [0, 1, 2, 3, 4, 9]  # all but memory and speed
    assert [[row[i] for i in exact] for row in shown] == [[row[i] for i in exact] for row in said]
    for before, now in zip(shown, said, strict=True):
        for column in (5, 6):  # needs, at most
            assert float(before[column].split()[0]) == pytest.approx(float(now[column].split()[0]), rel=0.05)
