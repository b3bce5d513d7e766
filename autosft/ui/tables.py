"""Tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autosft.ui.terminal import new_console

if TYPE_CHECKING:
    from rich.table import Table


def short_source(name: str) -> str:
    """Shorten a long path to its end."""
    return name if len(name) <= 24 else "…" + name[-23:]


def new_table() -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)


def show_table(table: Table) -> None:
    """Write a table: as wide as the terminal, and unwrapped into files and pipes."""
    import sys

    new_console(width=None if sys.stdout.isatty() else 200).print(table)
