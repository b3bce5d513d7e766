"""Measurements of earlier trials in a database."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from autosft.scheduler.decide.history import NOTHING_LEARNED, Learned, learned_from
from autosft.studies.store.database import parse_url
from autosft.studies.store.records import open_records


def learned_so_far(url: str) -> Learned:
    """Return what earlier trials of all studies in a database have measured; never creates a database.

    Raises UserError for a database that cannot be used, before minutes are spent.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        return NOTHING_LEARNED
    with closing(open_records(url)) as records:
        return learned_from(records.memory_observations())
