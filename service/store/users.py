"""Users and their tokens, of which only a hash is kept."""

from __future__ import annotations

import hashlib
import secrets

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from autosft.profiles.errors import UserError
from autosft.service.store.item_rows import user_from
from autosft.service.values import User
from autosft.studies.store import tables
from autosft.studies.store.database import begin, readable_errors

MAX_NAME_LENGTH = 200


class Users:
    """The users of a queue."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reading=True)

    def add(self, user: User, *, now: float) -> str:
        """Add a user, or one again that was revoked; return the token, which is kept nowhere.

        Raises UserError for a name that is empty, too long or taken, and for shares or quotas that are not
        positive.
        """
        _check(user)
        token = secrets.token_urlsafe(32)
        table = tables.service_users
        columns = {
            "name": user.name,
            "role": user.role.value,
            "shares": user.shares,
            "max_devices": user.max_devices,
            "device_hours_a_week": user.device_hours_a_week,
            "token_sha256": _sha256(token),
            "created_at": now,
            "revoked_at": None,
        }
        with readable_errors(self._engine.url), begin(self._engine) as connection:
            this = table.c.name == user.name
            query = sa.select(table).where(this).with_for_update()
            known = connection.execute(query).mappings().one_or_none()
            if known is None:
                connection.execute(sa.insert(table), columns)
            elif known["revoked_at"] is None:
                raise UserError(
                    f"There is already a user named {user.name!r}.",
                    remedy="Revoke them first to give them another token.",
                )
            else:
                connection.execute(sa.update(table).where(this), columns)
        return token

    def list(self) -> tuple[User, ...]:
        """Return all users by name, revoked ones included."""
        query = sa.select(tables.service_users).order_by(tables.service_users.c.name)
        with readable_errors(self._engine.url), begin(self._reading) as connection:
            return tuple(user_from(row) for row in connection.execute(query).mappings())

    def revoke(self, name: str, *, now: float) -> None:
        """End a user's access; what they have queued stays.  Raises UserError without one."""
        table = tables.service_users
        with readable_errors(self._engine.url), begin(self._engine) as connection:
            live = (table.c.name == name) & table.c.revoked_at.is_(None)
            if not connection.execute(sa.update(table).where(live), {"revoked_at": now}).rowcount:
                raise UserError(
                    f"There is no user named {name!r} with access.", remedy="autosft serve users list"
                )

    def verify(self, token: str) -> User | None:
        """Return whose token this is, None if it is nobody's or was revoked.

        A lookup by the hash of 256 random bits: how long it takes says nothing about the token.
        """
        table = tables.service_users
        query = sa.select(table).where(table.c.token_sha256 == _sha256(token), table.c.revoked_at.is_(None))
        with readable_errors(self._engine.url), begin(self._reading) as connection:
            row = connection.execute(query).mappings().one_or_none()
            return None if row is None else user_from(row)


def _check(user: User) -> None:
    if not user.name.strip() or len(user.name) > MAX_NAME_LENGTH:
        raise UserError(
            f"A user's name has 1 to {MAX_NAME_LENGTH} characters; this one has {len(user.name)}.",
            remedy="Choose another.",
        )
    for what, value in (
        ("shares", user.shares),
        ("devices at once", user.max_devices),
        ("device-hours a week", user.device_hours_a_week),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{value:g} {what} are not possible.", remedy="Give a number above 0.")


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
