"""The optimizers as a table: what each needs, keeps and follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autosft.profiles.optimizers import OPTIMIZERS, bytes_in_words, needs
from autosft.ui.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table


def optimizers_table() -> Table:
    """Return a row for each optimizer: bytes a parameter, needs, weight decay as asked, and a remark."""
    table = new_table()
    for column in ("optimizer", "bytes", "needs", "decay", "remark"):
        table.add_column(column, no_wrap=column != "remark")
    for row in OPTIMIZERS.values():
        remark = f"refused: {row.refused}; use {row.nearest}" if row.refused else row.remark
        decay = "-" if row.refused else row.decay.value
        table.add_row(row.name, bytes_in_words(row), needs(row), decay, remark)
    table.caption = "bytes: of state for each trained parameter; all but the refused follow the schedule"
    return table
