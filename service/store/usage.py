"""What users have used: device-seconds by hour, halved with each half-life when they are compared."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from autosft.service.values import Usage
from autosft.studies.store import tables

HOUR_S = 3600.0
WEEK_S = 7 * 24 * HOUR_S
#: Half-lives after which what was used counts for nothing: a thousandth is left.
NUM_HALF_LIVES = 10


def add(connection: Connection, owner: str, device_s: float, *, now: float) -> None:
    """Add device-seconds to a user's present hour."""
    table = tables.service_usage
    this = (table.c.owner == owner) & (table.c.hour == int(now // HOUR_S))
    added = sa.update(table).where(this).values(device_s=table.c.device_s + device_s)
    if not connection.execute(added).rowcount:
        columns = {"owner": owner, "hour": int(now // HOUR_S), "device_s": device_s}
        connection.execute(sa.insert(table), columns)


def read(connection: Connection, *, now: float, half_life_s: float) -> dict[str, Usage]:
    """Return what each user has used; those who have used nothing are left out.

    An hour's seconds are decayed from its middle.
    """
    table = tables.service_usage
    oldest_s = max(WEEK_S, NUM_HALF_LIVES * half_life_s)
    query = sa.select(table).where(table.c.hour > (now - oldest_s) / HOUR_S - 1)
    found: dict[str, Usage] = {}
    for row in connection.execute(query).mappings():
        age_s = max(0.0, now - (row["hour"] + 0.5) * HOUR_S)
        before = found.get(row["owner"], Usage())
        found[row["owner"]] = Usage(
            decayed_s=before.decayed_s + row["device_s"] * 0.5 ** (age_s / half_life_s),
            week_s=before.week_s + (row["device_s"] if age_s <= WEEK_S else 0.0),
        )
    return found
