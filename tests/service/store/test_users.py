"""Users of a queue and their tokens, over SQLite and PostgreSQL."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.service.store.queue_store import QueueStore, open_queue
from autosft.service.values import Role, User


def test_a_token_is_its_users_until_it_is_revoked(queue: QueueStore) -> None:
    ann = User(name="ann", role=Role.ADMIN, shares=2.0, max_devices=4, device_hours_a_week=100.0)
    bob = User(name="bob")
    tokens = {user.name: queue.users.add(user, now=0.0) for user in (bob, ann)}
    assert queue.users.list() == (ann, bob)
    assert queue.users.verify(tokens["ann"]) == ann
    assert queue.users.verify(tokens["bob"]) == bob
    for wrong in ("", "x", tokens["ann"][:-1], tokens["ann"] + "x", "\udcff"):
        assert queue.users.verify(wrong) is None
    queue.users.revoke("bob", now=1.0)
    assert queue.users.verify(tokens["bob"]) is None
    assert [user.is_revoked for user in queue.users.list()] == [False, True]
    again = queue.users.add(bob, now=2.0)
    assert queue.users.verify(again) == bob
    assert queue.users.verify(tokens["bob"]) is None


@pytest.mark.parametrize(
    ("user", "said"),
    [
        (User(name=""), "1 to 200"),
        (User(name="a" * 201), "has 201"),
        (User(name="a", shares=0.0), "0 shares"),
        (User(name="a", shares=float("nan")), "nan shares"),
        (User(name="a", max_devices=-1), "-1 devices"),
        (User(name="a", device_hours_a_week=float("inf")), "inf device-hours"),
    ],
)
def test_a_user_that_cannot_be_is_refused(queue: QueueStore, user: User, said: str) -> None:
    with pytest.raises(UserError, match=said):
        queue.users.add(user, now=0.0)
    assert queue.users.list() == ()


def test_names_are_given_once(queue: QueueStore) -> None:
    queue.users.add(User(name="ann"), now=0.0)
    with pytest.raises(UserError, match="already a user"):
        queue.users.add(User(name="ann"), now=1.0)
    for name in ("bob", ""):
        with pytest.raises(UserError, match="no user"):
            queue.users.revoke(name, now=1.0)


def test_tokens_are_kept_nowhere(sqlite_url: str, tmp_path: Path) -> None:
    queue = open_queue(sqlite_url)
    token = queue.users.add(User(name="ann"), now=0.0)
    queue.close()
    with sqlite3.connect(tmp_path / "studies.db") as connection:
        dump = "\n".join(connection.iterdump())
    connection.close()
    assert "ann" in dump
    assert token not in dump
