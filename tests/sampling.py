"""Long tables, of which `make test` runs a sample and `make thorough` the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import pytest
from _pytest.mark import ParameterSet


class Named(Protocol):
    """A row of a table with a name."""

    @property
    def name(self) -> str: ...


def sample_of(rows: Sequence[Named], names: Collection[str]) -> list[ParameterSet]:
    """Return all rows as parameters; those without one of the names are left to `make thorough`."""
    assert set(names) < {row.name for row in rows}, "a sample, of rows that there are"
    return [
        pytest.param(row, id=row.name, marks=() if row.name in names else pytest.mark.thorough)
        for row in rows
    ]


def every(step: int, rows: Iterable[tuple[Any, ...]], ids: Iterable[str]) -> list[ParameterSet]:
    """Return all rows as parameters; all but each `step`-th are left to `make thorough`."""
    return [
        pytest.param(*row, id=name, marks=() if number % step == 0 else pytest.mark.thorough)
        for number, (row, name) in enumerate(zip(rows, ids, strict=True))
    ]
