"""A command that runs as an item of a queue: a database that goes away does not end the item."""

from __future__ import annotations

import pytest

from autosft import cli
from autosft.profiles.errors import UserError
from autosft.studies.store.database import DatabaseError


@pytest.mark.parametrize(
    ("is_item", "error", "code"),
    [
        (True, DatabaseError("it does not answer"), 75),
        (True, UserError("wrong"), 2),
        (False, DatabaseError("it does not answer"), 2),
    ],
)
def test_a_database_that_is_away_is_no_wrong_request(
    is_item: bool, error: UserError, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.delenv("AUTOSFT_QUEUE_ITEM", raising=False)
    if is_item:
        monkeypatch.setenv("AUTOSFT_QUEUE_ITEM", "1")
    assert cli.main(["studies"]) == code
