"""Queues for tests: in a SQLite file, and in a real PostgreSQL where the pgserver wheel is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from autosft.service.store.queue_store import QueueStore, open_queue
from tests.studies.conftest import empty_sqlite, postgres_server, sqlite_url, url

__all__ = ("empty_sqlite", "postgres_server", "queue", "sqlite_url", "url")


@pytest.fixture
def queue(url: str) -> Iterator[QueueStore]:
    opened = open_queue(url)
    yield opened
    opened.close()
